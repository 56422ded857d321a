"""Canary's head against NeMo, stage by stage: states, log-probabilities, losses, gradients, greedy
and beam decoding, eight training steps."""

import functools

import pytest
import torch
from conftest import load_case

from fastconformer import load_model
from fastconformer.decoding import DecodingOptions

CASES = ["canary_flash_agg", "canary_v2_unified", "canary_v1_agg"]
BEAMS = {
    "beam_1": {},
    "beam_4": {"beam": 4},
    "beam_4_lp1": {"beam": 4, "length_penalty": 1.0},
}


@functools.cache
def loaded(name):
    case = load_case(name)
    return load_model(case.folder / "model.nemo"), case


@pytest.fixture(params=CASES)
def golden_model(request):
    return loaded(request.param)


def encoded_of(model, case):
    return model.encode(*model.featurize(case.tensors["audio"], case.tensors["audio_len"]))


def close_up_to(lengths, found, expected, atol):
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, :length], expected[row, :length], atol=atol, rtol=0)


def test_head(golden_model):
    model, case = golden_model
    assert model.heads == ("aed",)
    assert model.config.aed.vocab_size == case.expected["head_num_classes"]
    for name in ("ctc", "tdt"):
        with pytest.raises(ValueError, match=f"head is '{name}', this model has aed"):
            model.head(name)
    encoded, _ = encoded_of(model, case)
    with pytest.raises(ValueError, match="head is 'ctc', this model has aed"):
        model.ctc_log_probs(encoded)
    with pytest.raises(ValueError, match="this model has aed"):
        model.joint_logits(encoded, torch.zeros(3, 2, dtype=torch.long))


@torch.no_grad()
def test_forward(golden_model):
    model, case = golden_model
    tensors, tolerance = case.tensors, case.expected["suggested_tolerance"]
    features, lengths = model.featurize(tensors["audio"], tensors["audio_len"])
    assert lengths.tolist() == tensors["features_len"].tolist()
    encoded, lengths = model.encode(features, lengths)
    assert lengths.tolist() == tensors["encoded_len"].tolist()
    close_up_to(lengths, encoded, tensors["encoded"], tolerance["encoded"])
    states, _ = model.head("aed").states(encoded, lengths)
    close_up_to(lengths, states, tensors["enc_states"], tolerance["enc_states"])
    ids, n_ids = tensors["prompted_transcript"][:, :-1], tensors["prompted_transcript_len"] - 1
    log_probs = model.aed_log_probs(encoded, lengths, ids)
    assert log_probs.dtype == torch.float32
    close_up_to(n_ids, log_probs, tensors["decoder_log_probs"], tolerance["decoder_log_probs"])
    padding = torch.arange(ids.shape[1]) >= n_ids[:, None]
    anything = model.aed_log_probs(encoded, lengths, ids.masked_fill(padding, -100))
    close_up_to(n_ids, anything, log_probs, 1e-6)


OPTIONS = [(smoothing, masked) for smoothing in (0.0, 0.1) for masked in (False, True)]


@pytest.mark.parametrize("smoothing, masked", OPTIONS)
def test_losses(golden_model, smoothing, masked):
    model, case = golden_model
    tensors = case.tensors
    encoded, lengths = encoded_of(model, case)
    prompts = tensors["prompt_len"] if masked else None
    batch = tensors["prompted_transcript"], tensors["prompted_transcript_len"]
    losses = model.losses(
        encoded, lengths, *batch, prompt_lengths=prompts, label_smoothing=smoothing
    )["aed"]
    name = f"label_smoothing_{smoothing}_mask_prompt_{str(masked).lower()}"
    of_clips = case.expected["loss_per_utterance"][name]
    torch.testing.assert_close(
        losses, torch.tensor(of_clips["sum_per_utterance"]), rtol=1e-4, atol=1e-6
    )
    n_tokens = model.head("aed").counts(*batch, prompts).sum(1)
    assert n_tokens.tolist() == of_clips["tokens"]
    loss = losses.sum() / (n_tokens.sum() + 1e-6)
    step = case.expected["training_step_loss_eval_mode"][name]
    assert loss.item() == pytest.approx(step, rel=1e-4)
    gradients = case.expected.get(f"grad_norms_{name}")
    if gradients:
        model.zero_grad()
        loss.backward()
        found = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        assert found.keys() == gradients.keys()
        for parameter, norm in gradients.items():  # keys have no bias that softmax would see
            assert found[parameter] == pytest.approx(norm, rel=2e-3, abs=1e-6), parameter
        if masked:
            table = model.transf_decoder._embedding.token_embedding.weight.grad
            torch.testing.assert_close(table, tensors["grad_token_embedding"], atol=1e-4, rtol=1e-3)
        model.zero_grad()


def test_the_loss_defaults_to_the_config():
    for name in ("canary_flash_agg", "canary_v1_agg"):  # 0.0 and 0.1
        model, case = loaded(name)
        smoothing = model.config.loss.label_smoothing
        batch = case.tensors["prompted_transcript"], case.tensors["prompted_transcript_len"]
        encoded = encoded_of(model, case)
        default = model.losses(*encoded, *batch)["aed"]
        given = model.losses(*encoded, *batch, label_smoothing=smoothing)["aed"]
        other = model.losses(*encoded, *batch, label_smoothing=0.5)["aed"]
        assert torch.equal(default, given) and not torch.allclose(default, other)
        with pytest.raises(ValueError, match="label_smoothing is 1.0"):
            model.losses(*encoded, *batch, label_smoothing=1.0)


@pytest.mark.parametrize("name", BEAMS)
def test_decoding(golden_model, name):
    """From the batch, against NeMo's own search, mended, clip by clip."""
    model, case = golden_model
    encoded, lengths = encoded_of(model, case)
    options = DecodingOptions(**BEAMS[name])
    leading = " " if model.tokenizer.kind == "agg" else ""
    for block in case.expected["decoding"]:
        for prompt in (block["prompt_ids"], block["slots"]):
            found = model.decode(encoded, lengths, options=options, prompt=prompt)
            for clip, (hypothesis, expected) in enumerate(zip(found, block["mended"][name])):
                if block["float64_same"][name][clip]:
                    assert hypothesis.tokens == expected["ids"]
                    assert hypothesis.score == pytest.approx(expected["score"], abs=1e-3)
                    assert hypothesis.frames == [] and hypothesis.durations is None
                    text = expected["text"].removeprefix(leading)
                    assert model.tokenizer.decode(hypothesis.tokens) == text


@pytest.mark.parametrize("name", BEAMS)
def test_prompts_of_all_lengths_in_one_batch(golden_model, name):
    """A clip alone, and among clips with other prompts: the same text."""
    model, case = golden_model
    encoded, lengths = encoded_of(model, case)
    blocks = case.expected["decoding"]
    prompts = [blocks[i]["prompt_ids"] for i in range(len(blocks)) for _ in range(3)]
    options = DecodingOptions(**BEAMS[name])
    many = len(blocks)
    found = model.decode(
        encoded.repeat(many, 1, 1), lengths.repeat(many), options=options, prompt=prompts
    )
    for row, hypothesis in enumerate(found):
        block, clip = blocks[row // 3], row % 3
        if block["float64_same"][name][clip]:
            assert hypothesis.tokens == block["mended"][name][clip]["ids"]


def test_the_limit_is_the_clips_own(golden_model):
    """NeMo's limit with a delta of 3, where its batch's longest clip meets it."""
    model, case = golden_model
    encoded, lengths = encoded_of(model, case)
    options = DecodingOptions(max_generation_delta=3)
    prompt = case.expected["decoding"][0]["prompt_ids"]
    for clip, length in enumerate(lengths.tolist()):
        one = encoded[clip : clip + 1], lengths[clip : clip + 1]
        (found,) = model.decode(*one, options=options, prompt=prompt)
        (free,) = model.decode(*one, prompt=prompt)
        assert found.tokens == free.tokens[: length + 4 - len(prompt)]
    (one,) = model.decode(
        *one, options=DecodingOptions(max_generation_delta=-len(prompt) * 9), prompt=prompt
    )  # negative: as many as there are positions
    assert len(one.tokens) <= model.config.aed.max_sequence_length


def test_wrong_prompts_are_refused(golden_model):
    model, case = golden_model
    encoded, lengths = encoded_of(model, case)
    for prompt, reason in (
        ([[4], [4]], "2 prompts for 3 clips"),
        ([], "expected token ids"),
        ([4, 10**6], "expected token ids"),
        ([4] * 128, "the prompt has 128 tokens, the decoder has 128 positions"),
        ({"rhyme": "yes"}, "no slot 'rhyme'"),
        ({"source_lang": "xx"}, "source_lang is 'xx', expected one of"),
    ):
        with pytest.raises(ValueError, match=reason):
            model.decode(encoded, lengths, prompt=prompt)


def test_a_line_longer_than_the_decoder_is_refused():
    model, _ = loaded("canary_flash_agg")
    line = {"text": "word " * 200, "source_lang": "en", "target_lang": "en"}
    with pytest.raises(ValueError, match="tokens with the prompt, the decoder takes at most 129"):
        model.decoder_ids(line)
    ids, n_prompt = model.decoder_ids(line | {"text": "good"})
    assert ids[:n_prompt] == model.prompt_ids() and ids[-1] == model.tokenizer.eos_id


def test_repeats_can_be_bounded(golden_model):
    """No phrase comes again more often than asked, and texts without loops stay."""
    model, case = golden_model
    encoded, lengths = encoded_of(model, case)
    bounded = DecodingOptions(max_repeats=1)
    changed = 0
    for block in case.expected["decoding"]:
        free = model.decode(encoded, lengths, prompt=block["prompt_ids"])
        found = model.decode(encoded, lengths, options=bounded, prompt=block["prompt_ids"])
        for before, after in zip(free, found):
            if repeats(before.tokens) <= 1:
                assert after.tokens == before.tokens
            changed += after.tokens != before.tokens
            assert repeats(after.tokens) <= 1
    assert changed or case.folder.name != "canary_v1_agg"


def repeats(tokens):
    """Most times that a phrase of up to 24 tokens follows itself."""
    most = 0
    for length in range(1, 25):
        run = 0
        for i in range(length, len(tokens)):
            run = run + 1 if tokens[i] == tokens[i - length] else 0
            most = max(most, run // length)
    return most


def test_confidences(golden_model):
    model, case = golden_model
    encoded, lengths = encoded_of(model, case)
    for beam in (1, 3):
        options = DecodingOptions(beam=beam, confidence=True)
        for hypothesis in model.decode(encoded, lengths, options=options):
            assert len(hypothesis.confidences) == len(hypothesis.tokens)
            assert all(0 <= sure <= 1 for sure in hypothesis.confidences)


def test_only_what_a_head_takes():
    model, case = loaded("canary_flash_agg")
    encoded, lengths = encoded_of(model, case)
    with pytest.raises(ValueError, match="eps_ is an argument of none"):
        model.losses(encoded, lengths, torch.ones(3, 4).long(), torch.full((3,), 4), eps_=1)
    with pytest.raises(ValueError, match="length_penalty is -1"):
        DecodingOptions(length_penalty=-1)
    other = load_model(load_case("ctc_bpe").folder / "model.nemo")
    with pytest.raises(ValueError, match="length_penalty is 1.0, which head ctc does not take"):
        other.decode(
            torch.zeros(1, 4, other.config.encoder.d_out),
            torch.tensor([4]),
            options=DecodingOptions(length_penalty=1.0),
        )
    with pytest.raises(ValueError, match="take no prompt"):
        other.prompt_ids(source_lang="en")
    assert (other.tokenizer.bos_id, other.tokenizer.eos_id, other.tokenizer.pad_id) == (None,) * 3
    assert other.aligner is None


@pytest.mark.parametrize("name", CASES)
def test_training_steps(name):
    """NeMo's protocol: eight steps of AdamW in eval mode, two batches in turn."""
    case = load_case(name)
    model, steps = load_model(case.folder / "model.nemo"), case.expected["train_steps"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-3)
    tensors = case.tensors
    for step, expected in enumerate(steps["log"]):
        suffix = "_b" if step % 2 else ""
        ids, n_ids = (tensors[f"prompted_transcript{suffix}{end}"] for end in ("", "_len"))
        prompts = tensors[f"prompt{suffix}_len"]
        losses = model.losses(
            *encoded_of(model, case), ids, n_ids, prompt_lengths=prompts, label_smoothing=0.1
        )["aed"]
        loss = losses.sum() / (model.head("aed").counts(ids, n_ids, prompts).sum() + 1e-6)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        optimizer.step()
        assert loss.item() == pytest.approx(expected["loss"], rel=2e-3)
        assert norm.item() == pytest.approx(expected["grad_norm"], rel=2e-2)
    table = model.transf_decoder._embedding.token_embedding.weight
    # AdamW's first steps go by a gradient's sign, which of a tiny one is rounding
    far = (table - tensors["token_embedding_after_steps"]).abs() > 5e-4
    assert far.float().mean() < 1e-3


def test_a_task_is_passed_over_where_prompts_have_none():
    """NeMo's manifests say `taskname`; validation asks later Canaries without it, as training."""
    model, _ = loaded("canary_v2_unified")
    line = {"source_lang": "en", "target_lang": "en", "pnc": "no", "taskname": "asr"}
    head = model.head("aed")
    assert head.for_lines([line]) == head.for_lines([{**line, "taskname": None}])
