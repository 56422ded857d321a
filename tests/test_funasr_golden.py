"""Fun-ASR-Nano against FunASR's own numbers, bottom-up: encoder, adaptor, inputs, losses,
gradients, texts under every prompt, CTC."""

import json

import pytest
import soundfile
import torch
from conftest import golden, load_case

from fastconformer.checkpoint import read_checkpoint
from fastconformer.decoding import ctc_align
from fastconformer.load import model_of
from fastconformer.text.chat import answer_ids, chat_ids, context_header

CASE = "fun_asr_nano_tiny"


@pytest.fixture(scope="module")
def case():
    return load_case(CASE)


@pytest.fixture(scope="module")
def model():
    return model_of(read_checkpoint(golden(CASE)))


@pytest.fixture(scope="module")
def batch():
    """(prompts, texts) of train.jsonl."""
    lines = [json.loads(line) for line in (golden(CASE) / "train.jsonl").read_text().splitlines()]
    chats = [line["messages"] for line in lines]
    prompts = [chat[1]["content"].partition("<|startofspeech|>")[0] for chat in chats]
    return prompts, [chat[2]["content"] for chat in chats]


def close(found, expected, lengths, atol):
    for row, wanted, length in zip(found, expected, lengths.tolist(), strict=False):
        torch.testing.assert_close(row[:length], wanted[:length], rtol=0, atol=atol)


def test_encoder_and_adaptor(model, case):
    features, lengths = case.tensors["features"].transpose(1, 2), case.tensors["features_len"]
    with torch.no_grad():
        rows = features.transpose(1, 2) * 64**0.5
        rows = rows + sinusoids_like(rows)
        valid = torch.arange(rows.shape[1]) < lengths[:, None]
        first = model.audio_encoder.encoders0[0](rows, valid)
        encoded, encoded_lengths = model.encode(features, lengths)
        adapted, counts = model.adapt(encoded, encoded_lengths)
    close(first, case.tensors["layer0_out"], lengths, 1e-4)
    assert encoded_lengths.tolist() == case.tensors["encoded_len"].tolist()
    close(encoded, case.tensors["encoded"], encoded_lengths, 2e-5)
    assert counts.tolist() == case.tensors["batch/fake_token_len"].flatten().tolist()
    close(adapted, case.tensors["adaptor_out"], case.tensors["adaptor_len"], 4e-5)


def sinusoids_like(rows):
    position = torch.arange(1, rows.shape[1] + 1)[:, None]
    half = rows.shape[2] // 2
    angle = position * 10000.0 ** (-torch.arange(half) / (half - 1))
    return torch.cat((angle.sin(), angle.cos()), dim=1)


def test_from_audio_to_encoded(model, case):
    clips = [
        soundfile.read(golden(CASE) / f"audio/clip_{i}.wav", dtype="float32")[0] for i in (0, 3)
    ]
    lengths = torch.tensor([len(clip) for clip in clips])
    audio = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(c) for c in clips], batch_first=True)
    with torch.no_grad():
        encoded, lengths = model.encode(*model.featurize(audio, lengths))
    close(encoded, case.tensors["encoded"][[0, 3]], lengths, 1e-3)  # what features differ by


def test_ctc_log_probs_and_loss(model, case, batch):
    encoded, lengths = case.tensors["encoded"], case.tensors["encoded_len"].long()
    with torch.no_grad():
        log_probs = model.ctc_log_probs(encoded, lengths)
        loss = model.losses(encoded, lengths, case.expected["train_texts"], heads=("ctc",))["ctc"]
    close(log_probs, case.tensors["ctc_log_probs"], lengths, 2e-4)
    torch.testing.assert_close(loss.double(), case.tensors["ctc_loss"], rtol=1e-5, atol=0)


def test_ctc_texts_and_alignment(model, case):
    encoded, lengths = case.tensors["encoded"], case.tensors["encoded_len"].long()
    found = model.decode(encoded, lengths, "ctc")
    log_probs = model.ctc_log_probs(encoded, lengths)
    for i, (hypothesis, wanted) in enumerate(zip(found, case.expected["ctc"], strict=True)):
        assert hypothesis.tokens == wanted["ids"] == model.ctc_tokenizer.encode(wanted["text"])
        assert model.ctc_tokenizer.decode(hypothesis.tokens) == wanted["text"]
        (aligned,) = ctc_align(log_probs[i : i + 1], lengths[i : i + 1], [wanted["ids"]])
        spans = zip(aligned.frames, aligned.durations, strict=True)
        ends = [(token["start_frame"], token["end_frame"]) for token in wanted["alignment_of_text"]]
        assert [(frame, frame + span) for frame, span in spans] == ends


def test_rows_that_the_language_model_is_given():
    from fastconformer.heads.llm import speech_rows

    expected = load_case(CASE).expected["fake_token_len_by_lfr_frames"]
    assert speech_rows(torch.arange(1, len(expected) + 1)).tolist() == expected


def test_prompts(model, case):
    for wanted in case.expected["prompts"]:
        options = {name: wanted[name] for name in ("language", "hotwords", "itn")}
        assert model.prompt(**options) == wanted["prompt"]


def test_inputs_and_labels_of_a_batch(model, case, batch):
    prompts, texts = batch
    adapted, counts = case.tensors["adaptor_out"], case.tensors["batch/fake_token_len"].flatten()
    with torch.no_grad():
        ids, embeds, valid, labels = model.llm_inputs(adapted, counts, texts, prompts)
    wanted = case.tensors
    assert torch.equal(ids, wanted["batch/input_ids"].clamp(min=0))
    assert torch.equal(valid, wanted["batch/attention_mask"] == 1)
    assert torch.equal(labels, wanted["batch/labels_ids"].where(wanted["batch/labels_ids"] != -1,
                                                                torch.tensor(-100)))  # fmt: skip
    torch.testing.assert_close(embeds[valid], wanted["inputs_embeds"][valid], rtol=0, atol=1e-4)
    with torch.no_grad():
        positions = (valid.cumsum(1) - 1).clamp(min=0)
        logits = model.llm.lm_head(model.llm(embeds, valid, positions))
    length = len(wanted["logits_0"])
    torch.testing.assert_close(logits[0, :length], wanted["logits_0"], rtol=0, atol=1e-4)


def test_ids_of_other_forms_of_the_chat(model, case, batch):
    prompts, texts = batch
    answer = answer_ids(model.tokenizer, texts[0])
    forms = {
        "train_sample_multi_context_prompt": (context_header(prompts[0]) + prompts[0], True, True),
        "train_sample_no_think_no_system": (prompts[0], False, False),
    }
    for name, (prompt, system, think) in forms.items():
        before, behind = chat_ids(model.tokenizer, prompt, system, think)
        wanted = case.expected[name]
        assert before + [0] * wanted["fake_token_len"][0] + behind + answer == wanted["input_ids"]
        assert len(before) == wanted["fbank_beg"][0]


def test_loss_and_gradients(model, case, batch):
    prompts, texts = batch
    model.zero_grad()
    features, lengths = case.tensors["features"].transpose(1, 2), case.tensors["features_len"]
    losses = model.losses(*model.encode(features, lengths), texts, prompts, ("llm",))["llm"]
    counts = torch.tensor([len(answer_ids(model.tokenizer, text)) for text in texts])
    each = torch.tensor(case.expected["loss"]["each"])
    torch.testing.assert_close(losses.detach() / counts, each, rtol=1e-5, atol=0)
    loss = losses.sum() / counts.sum()
    assert loss.item() == pytest.approx(case.expected["loss"]["batch"], rel=1e-5)
    loss.backward()
    parameters = dict(model.named_parameters())
    for name, wanted in case.tensors.items():
        if name.startswith("grad/"):
            found = parameters[name.removeprefix("grad/")].grad
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    for part, wanted in case.expected["loss"]["grad_norm"].items():
        grads = [p.grad for p in getattr(model, part).parameters() if p.grad is not None]
        assert float(torch.nn.utils.get_total_norm(grads)) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("number", range(4))
def test_texts_under_every_prompt_in_one_batch(model, case, number):
    """Clips of four lengths in one batch: left padding, positions from each prompt's own start."""
    wanted = case.expected["transcribe"][number]
    encoded, lengths = case.tensors["encoded"], case.tensors["encoded_len"].long()
    prompt = model.prompt(**wanted["options"])
    found = model.decode(encoded, lengths, prompts=prompt, max_tokens=wanted["max_length"])
    for hypothesis, result in zip(found, wanted["results"], strict=True):
        assert [*hypothesis.tokens, model.config.llm.eos_token_id] == result["ids"]
        assert model.tokenizer.decode(hypothesis.tokens) == result["text"]
