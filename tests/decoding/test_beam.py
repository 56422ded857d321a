"""Beam search, language models, phrases and alignment against sums over all paths."""

import gzip
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding import DURATIONS, D, V, transducer

from fastconformer import load_model
from fastconformer.decoding import ctc_align, read_arpa, transducer_greedy
from fastconformer.decoding.ctc_beam import ctc_beam
from fastconformer.decoding.fusion import Fusion, PhraseScorer, language_model_scorer
from fastconformer.decoding.transducer_beam import transducer_beam
from fastconformer.text.tokenizer import CharTokenizer

ROOT = Path(__file__).parents[2]
BASE = ROOT / "models" / "base_tiny.nemo"


def collapsed(path, blank):
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


def all_texts(log_probs):
    """{tokens: log p} of one clip (T, V+1), by every path."""
    blank, sums = log_probs.shape[1] - 1, {}
    for path in itertools.product(range(blank + 1), repeat=len(log_probs)):
        score = sum(float(log_probs[t, label]) for t, label in enumerate(path))
        tokens = collapsed(path, blank)
        sums[tokens] = sums.get(tokens, 0.0) + math.exp(score)
    return {tokens: math.log(p) for tokens, p in sums.items()}


def random_log_probs(seed, batch, frames, classes, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(batch, frames, classes, generator=generator)).log_softmax(-1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(0, 5), scale=st.sampled_from([0.5, 2, 6]))
def test_ctc_beam_finds_the_most_probable_text(seed, frames, scale):
    log_probs = random_log_probs(seed, 3, frames, 4, scale)
    lengths = torch.tensor([frames, max(0, frames - 1), frames // 2])
    found = ctc_beam(log_probs, lengths, beam=200)
    for b, (hypothesis, n) in enumerate(zip(found, lengths.tolist())):
        texts = all_texts(log_probs[b, :n])
        assert hypothesis.score == pytest.approx(max(texts.values()), abs=1e-2)  # sure blanks
        assert texts[tuple(hypothesis.tokens)] == pytest.approx(max(texts.values()), abs=1e-2)
        (alone,) = ctc_beam(log_probs[b : b + 1, :n], lengths[b : b + 1], beam=3)
        together = ctc_beam(log_probs, lengths, beam=3)[b]
        assert alone.tokens == together.tokens


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    frames=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    data=st.data(),
)
def test_alignment_is_the_best_of_all_paths(seed, frames, data):
    log_probs = random_log_probs(seed, len(frames), max(frames), 4)
    tokens = [data.draw(st.lists(st.integers(0, 2), max_size=n)) for n in frames]
    found = ctc_align(log_probs, torch.tensor(frames), tokens)
    for b, (n, ids, hypothesis) in enumerate(zip(frames, tokens, found)):
        paths = [
            path for path in itertools.product(range(4), repeat=n)
            if collapsed(path, 3) == tuple(ids)
        ]  # fmt: skip
        scores = [sum(float(log_probs[b, t, x]) for t, x in enumerate(path)) for path in paths]
        assert hypothesis.score == pytest.approx(max(scores, default=-math.inf), abs=1e-4)
        if not paths:
            assert not hypothesis.frames
            continue
        best = paths[scores.index(max(scores))]
        runs = [(t, x) for t, x in enumerate(best) if x != 3 and (t == 0 or best[t - 1] != x)]
        assert hypothesis.frames == [t for t, _ in runs]
        assert sum(hypothesis.durations) == sum(x != 3 for x in best)


def test_alignment_in_blocks_is_the_alignment(monkeypatch):
    log_probs = random_log_probs(1, 2, 700, 20)
    tokens = [torch.randint(0, 19, (n,)).tolist() for n in (200, 80)]
    lengths = torch.tensor([700, 640])
    whole = ctc_align(log_probs, lengths, tokens)
    monkeypatch.setattr("fastconformer.decoding.ctc_alignment._ONE_BLOCK", 1)
    assert ctc_align(log_probs, lengths, tokens) == whole


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    durations=st.sampled_from(DURATIONS),
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    max_symbols=st.sampled_from([1, 3, 10]),
)
def test_a_transducer_beam_of_one_is_greedy(seed, durations, lengths, max_symbols):
    decoder, joint = transducer(len(durations), seed)
    encoded = torch.randn(len(lengths), max(lengths), D, generator=torch.manual_seed(seed))
    arguments = (encoded, torch.tensor(lengths), decoder, joint, V)
    greedy = transducer_greedy(*arguments, durations, max_symbols)
    beam = transducer_beam(*arguments, 1, durations, max_symbols)
    for a, b in zip(greedy, beam, strict=True):
        assert (a.tokens, a.frames, a.durations) == (b.tokens, b.frames, b.durations)


@torch.no_grad()
def all_transducer_texts(encoded, decoder, joint, durations, max_symbols):
    """{tokens: log p} of one clip (T, D), by every path of at most `max_symbols` tokens a frame."""
    projected, sums = joint.enc(encoded), {}

    def follow(frame, on_frame, tokens, output, state, score):
        if frame >= len(encoded):
            sums[tokens] = sums.get(tokens, 0.0) + math.exp(score)
            return
        logits = joint.step(projected[frame], joint.pred(output)[0])
        of_token = logits[: V + 1].log_softmax(-1)
        of_arc = logits[V + 1 :].log_softmax(-1) if durations else torch.zeros(1)
        for arc, skip in enumerate(durations or (0,)):
            for token in range(V + 1):
                after = score + float(of_token[token]) + float(of_arc[arc])
                if token == V:
                    follow(frame + max(skip, 1), 0, tokens, output, state, after)
                    continue
                stays = 0 if skip else on_frame + 1
                step = skip + (stays >= max_symbols)
                out, new = decoder.step(torch.tensor([token]), state)
                follow(
                    frame + step, 0 if stays >= max_symbols else stays,
                    (*tokens, token), out, new, after,
                )  # fmt: skip

    follow(0, 0, (), *decoder.start(1), 0.0)
    return {tokens: math.log(p) for tokens, p in sums.items()}


@pytest.mark.parametrize("durations", [(), (0, 1, 2), (1, 2)])
def test_a_wide_transducer_beam_finds_the_most_probable_text(durations):
    for seed in range(2):
        decoder, joint = transducer(len(durations), seed)
        encoded = torch.randn(2, 2, D, generator=torch.manual_seed(seed))
        found = transducer_beam(
            encoded, torch.tensor([2, 1]), decoder, joint, V, 500, durations, 1, score_norm=False
        )
        for b, hypothesis in enumerate(found):
            texts = all_transducer_texts(encoded[b, : 2 - b], decoder, joint, durations, 1)
            # paths of one text that end with different numbers of arcs are not summed
            assert texts[tuple(hypothesis.tokens)] >= max(texts.values()) - math.log(2)
            assert hypothesis.score <= texts[tuple(hypothesis.tokens)] + 1e-3


def test_a_wider_beam_finds_better_scores():
    decoder, joint = transducer(5, seed=4)
    encoded, lengths = torch.randn(6, 40, D), torch.randint(10, 41, (6,))
    arguments = (encoded, lengths, decoder, joint, V)
    scores = [
        torch.tensor([
            h.score for h in transducer_beam(*arguments, k, (0, 1, 2, 3, 4), score_norm=False)
        ])
        for k in (1, 2, 8)
    ]  # fmt: skip
    assert scores[2].sum() > scores[1].sum() > scores[0].sum()
    alone = transducer_beam(encoded[2:3, : lengths[2]], lengths[2:3], *arguments[2:], 8)
    assert alone[0].tokens == transducer_beam(*arguments, 8)[2].tokens


ARPA = r"""
\data\
ngram 1=5
ngram 2=4
ngram 3=1

\1-grams:
-1.0	<unk>
-99	<s>	-0.5
-0.7	</s>
-0.6	cat	-0.3
-0.9	sat	-0.2

\2-grams:
-0.2	<s> cat	-0.1
-0.4	cat sat	-0.25
-0.3	sat </s>
-0.8	cat cat

\3-grams:
-0.05	<s> cat sat

\end\
"""


def test_arpa_backs_off_as_written(tmp_path):
    (tmp_path / "lm.arpa").write_text(ARPA)
    model = read_arpa(tmp_path / "lm.arpa")
    assert model.order == 3
    for words, log10 in (
        (["cat", "sat"], -0.2 - 0.05 - 0.25 - 0.3),  # "cat sat" </s> by way of "sat </s>"
        (["cat", "cat"], -0.2 - 0.1 - 0.8 - 0.3 - 0.7),
        (["sat", "dog"], -0.5 - 0.9 - 0.2 - 1.0 - 0.7),
        ([], -0.5 - 0.7),
    ):
        assert model.sentence(words) == pytest.approx(log10 * math.log(10), abs=1e-5), words
    with gzip.open(tmp_path / "lm.arpa.gz", "wt") as file:
        file.write(ARPA)
    assert read_arpa(tmp_path / "lm.arpa.gz").sentence(["cat"]) == model.sentence(["cat"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no .1-grams"),
        ("hello\nworld\n" * 600, "no .1-grams"),
        (ARPA.replace("\\end\\", ""), "ends early"),
        (ARPA.replace("-0.4	cat sat	-0.25\n", ""), "ends early|history"),
        (ARPA.replace("-0.9	sat	-0.2", "-0.9	dog"), "sat"),
        (ARPA.replace("-0.9	sat", "x	sat"), "could not convert"),
        (ARPA.replace("\\2-grams", "\\3-grams"), "follows order 1"),
    ],
)
def test_what_is_no_arpa_is_told(tmp_path, text, reason):
    (tmp_path / "lm.arpa").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_arpa(tmp_path / "lm.arpa")


CHARS = CharTokenizer([" ", *"acdgost", ","])


def total(scorer, text):
    fusion = Fusion([scorer])
    state, score = fusion.start()[None], 0.0
    for token in CHARS.encode(text):
        added, after = fusion.score(state, torch.tensor([[token, 0]]))
        score, state = score + float(added[0, 0]), after[:, 0]
    return score + float(fusion.final(state))


def test_words_are_scored_as_the_model_scores_them(tmp_path):
    (tmp_path / "lm.arpa").write_text(ARPA)
    model = read_arpa(tmp_path / "lm.arpa")
    scorer = language_model_scorer(model, CHARS, 1.0, 0.0, "cpu")
    for text in ("cat sat", "cat  cat sat", " sat cat", "dog", "", "cat, sat"):
        words = text.replace(",", "").split()
        assert total(scorer, text) == pytest.approx(model.sentence(words), abs=1e-4), text
    weighted = language_model_scorer(model, CHARS, 0.5, 2.0, "cpu")
    expected = 0.5 * model.sentence(["cat", "sat"]) + 4.0
    average = language_model_scorer(model, CHARS, 0.5, None, "cpu")
    assert average.bonus == pytest.approx(0.5 * model.entropy())
    assert total(weighted, "cat sat") == pytest.approx(expected, abs=1e-4)


def test_tokens_are_scored_as_pieces_or_in_nemos_spelling(tmp_path):
    for spell in (lambda i: CHARS.pieces[i] if i else "▁", lambda i: chr(100 + i)):
        a, c, t = spell(1), spell(2), spell(7)
        rest = "".join(
            f"-1.5\t{spell(i)}\n" for i in range(len(CHARS.pieces)) if i not in (1, 2, 7)
        )
        (tmp_path / "lm.arpa").write_text(
            f"\\data\\\nngram 1={len(CHARS.pieces) + 1}\nngram 2=2\n\n\\1-grams:\n-2\t<unk>\n"
            f"-1\t{a}\t-0.5\n-1.2\t{c}\t-0.4\n-1.3\t{t}\n{rest}\n\\2-grams:\n-0.1\t{c} {a}\n"
            f"-0.2\t{a} {t}\n\n\\end\\\n"
        )
        scorer = language_model_scorer(read_arpa(tmp_path / "lm.arpa"), CHARS, 1.0, 0.0, "cpu")
        assert total(scorer, "cat") == pytest.approx((-1.2 - 0.1 - 0.2) * math.log(10), abs=1e-5)
        assert total(scorer, "ac") == pytest.approx((-1 - 0.5 - 1.2) * math.log(10), abs=1e-5)


@pytest.mark.parametrize(
    ("text", "paid"),
    [
        ("cat", {"cat": 1}),
        ("a cat sat", {"cat": 1}),
        ("cats", {}),
        ("scat", {}),
        ("cat cat, cat", {"cat": 3}),
        ("cat dog", {"cat": 1, "cat dog": 1}),
        ("cat cat dog", {"cat": 2, "cat dog": 1}),
        ("cat do", {"cat": 1}),
        ("", {}),
    ],
)
def test_phrases_pay_when_they_are_whole(text, paid):
    weights = {"cat": 2.0, "cat dog": 1.0}
    expected = sum(n * weights[phrase] * len(phrase) for phrase, n in paid.items())
    scorer = PhraseScorer(weights, CHARS, "cpu")
    assert total(scorer, text) == pytest.approx(expected, abs=1e-4)
    assert total(PhraseScorer({"Cat": 2.0, "CAT dog": 1.0}, CHARS, "cpu"), text) <= expected


def test_fusion_changes_what_a_beam_finds(tmp_path):
    """Two texts equally probable to the audio: the one that the language model, or a phrase,
    expects is found, by CTC and by TDT."""
    log_probs = torch.full((1, 4, 10), -8.0)
    for t, chars in enumerate(("cc", "ao", "tg", "  ")):
        log_probs[0, t, CHARS.encode(chars)] = -0.7
    log_probs[0, 1, CHARS.encode("o")] += 0.1
    n = torch.tensor([4])
    found = ctc_beam(log_probs, n, 8)[0].tokens
    assert CHARS.decode(found).strip() in ("cot", "cog")
    (tmp_path / "lm.arpa").write_text(ARPA)
    model = language_model_scorer(read_arpa(tmp_path / "lm.arpa"), CHARS, 0.5, 0.0, "cpu")
    for scorer in (model, PhraseScorer({"cat": 0.3}, CHARS, "cpu")):
        assert CHARS.decode(ctc_beam(log_probs, n, 8, Fusion([scorer]))[0].tokens).strip() == "cat"


def test_words_that_the_model_lacks_are_not_glued(tmp_path):
    """A small model of another domain: the words of real speech stay apart."""
    (tmp_path / "lm.arpa").write_text(ARPA)
    model = read_arpa(tmp_path / "lm.arpa")
    speech = load_model(BASE)
    clips = [ROOT / "samples" / "jfk.flac", ROOT / "samples" / "sentence.wav"]
    for head in ("ctc", "tdt"):
        alone = speech.transcribe(clips, head=head, beam=4)
        with_lm = speech.transcribe(clips, head=head, beam=4, lm=model)
        counts = [sum(len(t.text.split()) for t in found) for found in (alone, with_lm)]
        assert counts[1] >= 0.8 * counts[0]
