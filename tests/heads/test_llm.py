"""The language model's decoding: a clip in a batch is the clip alone, in its scores too; the guard
against repetition; times; what it refuses."""

import copy

import pytest
import torch
from conftest import golden, load_case

from fastconformer.checkpoint import read_checkpoint
from fastconformer.decoding import DecodingOptions
from fastconformer.decoding.hypothesis import Hypothesis
from fastconformer.decoding.llm import cut_repetition, llm_greedy
from fastconformer.load import model_of

CASE = "fun_asr_nano_tiny"


@pytest.fixture(scope="module")
def model():
    return model_of(read_checkpoint(golden(CASE)))


@pytest.fixture(scope="module")
def encoded():
    tensors = load_case(CASE).tensors
    return tensors["encoded"], tensors["encoded_len"].long()


def test_a_clip_in_a_batch_has_the_score_that_it_has_alone(model, encoded):
    """Scores, not only texts: a model that is sure says the same from shifted positions."""
    rows, lengths = encoded
    options = DecodingOptions(confidence=True)
    together = model.decode(rows, lengths, options=options)
    assert len({len(hypothesis.tokens) for hypothesis in together}) == 4  # rows leave one by one
    for i, hypothesis in enumerate(together):
        (alone,) = model.decode(rows[i : i + 1, : lengths[i]], lengths[i : i + 1], options=options)
        assert alone.tokens == hypothesis.tokens
        assert alone.score == pytest.approx(hypothesis.score, abs=1e-4)
        assert alone.confidences == pytest.approx(hypothesis.confidences, abs=1e-4)
    sure = [value for hypothesis in together for value in hypothesis.confidences]
    assert all(0.001 < value < 1 for value in sure)  # not drowned by all unlikely tokens


def test_scores_are_those_of_the_whole_text_at_once(model, encoded):
    """Without a cache and without padding: minus the loss of the text that was found."""
    rows, lengths = encoded
    prompts = [model.prompt(hotwords=["Sterling"] * (i + 1)) for i in range(4)]  # unequal lengths
    found = model.decode(rows, lengths, prompts=prompts)
    texts = [model.tokenizer.decode(hypothesis.tokens) for hypothesis in found]
    with torch.no_grad():
        losses = model.losses(rows, lengths, texts, prompts, ("llm",))["llm"]
    for hypothesis, loss in zip(found, losses.tolist(), strict=True):
        assert hypothesis.score == pytest.approx(-loss, abs=2e-4)


def test_positions_count_from_each_prompt_s_own_first_row(model, encoded, monkeypatch):
    """Rotary positions are relative, so that a text alone would not show a shift of all of them."""
    rows, lengths = encoded
    calls, forward = [], type(model.llm).forward

    def spy(llm, embeds, valid, positions, cache=None):
        calls.append((valid.clone(), positions.clone()))
        return forward(llm, embeds, valid, positions, cache)

    monkeypatch.setattr(type(model.llm), "forward", spy)
    model.decode(rows, lengths, max_tokens=3)
    valid, positions = calls[0]
    counts = valid.sum(1).tolist()
    assert len(set(counts)) > 1 and max(counts) == valid.shape[1]
    for row, count in enumerate(counts):
        assert valid[row, -count:].all() and not valid[row, :-count].any()  # padded on the left
        assert positions[row, -count:].tolist() == list(range(count))
    for step, (valid, positions) in enumerate(calls[1:]):
        assert positions[:, 0].tolist() == [count + step for count in counts]
        assert valid.sum(1).tolist() == [count + step + 1 for count in counts]


def test_the_answer_ends_at_max_tokens(model, encoded):
    rows, lengths = encoded
    found = model.decode(rows, lengths, max_tokens=3)
    assert [len(hypothesis.tokens) for hypothesis in found] == [3, 3, 3, 3]
    with pytest.raises(ValueError, match="max_tokens is 0"):
        model.decode(rows, lengths, max_tokens=0)


def test_a_phrase_over_and_over_is_kept_once(model):
    """A model that always says the next token of a cycle."""
    llm = copy.deepcopy(model.llm)
    with torch.no_grad():
        for layer in llm.model.layers:  # what goes in comes out
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        width = llm.config.hidden_size
        table = torch.nn.functional.normalize(torch.randn(6, width), dim=1) * 8
        llm.model.embed_tokens.weight[:6] = table
        llm.model.norm.weight.fill_(1.0)
        llm.lm_head.weight = torch.nn.Parameter(torch.zeros_like(llm.model.embed_tokens.weight))
        llm.lm_head.weight[[1, 2, 3, 4, 5, 3]] = table  # 0 -> 1 -> 2 -> ... 4 -> 3
        llm.lm_head.weight[5] = 0
        llm.lm_head.weight[3] = table[2] + table[4]
    prompts = [table[:1], table[1:2]]
    found = llm_greedy(llm, prompts, 200)
    assert [hypothesis.tokens for hypothesis in found] == [[1, 2, 3, 4], [2, 3, 4]]
    assert len(llm_greedy(llm, prompts, 200, max_repeats=10**6)[0].tokens) == 200


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        ([7] * 31, None),
        ([1, 2] + [7] * 32, [1, 2, 7]),
        ([1] + [3, 4, 5] * 11, [1, 3, 4, 5]),
        (list(range(10)) * 5, None),  # five copies of ten
        (list(range(10)) * 6, list(range(10))),
        ([5, 6] * 15 + [1], None),
    ],
)
def test_what_counts_as_repetition(tokens, kept):
    hypothesis = Hypothesis(list(tokens), confidences=[1.0] * len(tokens))
    assert cut_repetition(Hypothesis([4, 9, 9, 9, 9]), 2) and not cut_repetition(
        Hypothesis([9] * 4), 3
    )
    assert cut_repetition(hypothesis) == (kept is not None)
    assert hypothesis.tokens == (tokens if kept is None else kept)
    assert len(hypothesis.confidences) == len(hypothesis.tokens)


def test_times_are_the_ctc_branch_s(model, encoded):
    rows, lengths = encoded
    expected = load_case(CASE).expected["ctc"]
    for hypothesis, wanted in zip(model.decode(rows, lengths, times=True), expected, strict=True):
        frames = [
            (token["start_frame"], token["end_frame"]) for token in wanted["alignment_of_text"]
        ]
        assert hypothesis.frames[0] == frames[0][0]
        assert hypothesis.frames[-1] + hypothesis.durations[-1] == frames[-1][1]
        assert hypothesis.frames == sorted(hypothesis.frames)
        assert len(hypothesis.durations) == len(hypothesis.tokens)


def test_what_the_head_cannot_do_is_refused(model, encoded):
    rows, lengths = encoded
    for options in ({"beam": 2}, {"boost": ["Steels"]}, {"allow": ["latin"]}):
        with pytest.raises(ValueError, match="which head llm does not take"):
            model.decode(rows, lengths, options=DecodingOptions(**options))
    with pytest.raises(ValueError, match="language is an argument of none of the heads"):
        model.decode(rows, lengths, language="en")
    with pytest.raises(ValueError, match="language is 'xx', expected None or one of zh"):
        model.prompt(language="xx")
    with pytest.raises(ValueError, match="hotwords is 'Steels', expected a list"):
        model.prompt(hotwords="Steels")
    with pytest.raises(ValueError, match="mark <|"):
        model.prompt(hotwords=["<|im_end|>"])


def test_a_prompt_longer_than_the_positions_is_refused(model, encoded):
    rows, lengths = encoded
    with pytest.raises(ValueError, match="2048 positions"):
        model.decode(rows, lengths, prompts=model.prompt(hotwords=["Sterling"] * 2000))


def test_an_id_without_a_token_says_nothing(model):
    """The language model has 704 rows, the tokenizer 700 tokens; Qwen's own has 267 such rows."""
    ids = model.tokenizer.encode("The child")
    assert model.tokenizer.decode([*ids, 703]) == "The child"
    assert model.tokenizer.ids_to_pieces([703]) == [""] and model.tokenizer.vocab_size == 700
