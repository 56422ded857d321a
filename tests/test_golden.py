"""Every stage of every golden case against NeMo's own numbers, bottom-up."""

import pytest
import torch
from conftest import golden, load_case

import fastconformer
from fastconformer.losses import rnnt_loss, tdt_loss
from fastconformer.recordings.timestamps import segment_spans, word_spans

CASES = [
    "ctc_bpe",
    "rnnt_bpe",
    "tdt_bpe",
    "hybrid_tdt_ctc_bpe",
    "hybrid_rnnt_ctc_bpe",
    "local_attn_g0",
    "local_attn_g1",
    # recorded by make_golden.py: other subsampling, contexts, norms, characters
    "stream_chunked_hybrid_rnnt",
    "striding4_ctc_char",
    "hybrid_tdt_char",
    "reduction_striding",
]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    case = load_case(golden(request.param))
    case.model = fastconformer.load_model(case.folder / "model.nemo")
    return case


def assert_valid_close(actual, expected, lengths, tolerance, time_dim=1):
    """Compares the frames below each clip's length."""
    for row, length in enumerate(lengths.tolist()):
        a = actual[row].narrow(time_dim - 1, 0, length).double()
        e = expected[row].narrow(time_dim - 1, 0, length).double()
        assert (a - e).abs().max() <= tolerance


def tolerance(case, key):
    return case.expected["suggested_tolerance"][key]


def test_features(case):
    t = case.tensors
    features, lengths = case.model.featurize(t["audio"], t["audio_len"])
    assert lengths.tolist() == t["features_len"].tolist()
    assert_valid_close(features, t["features"], lengths, tolerance(case, "features"), time_dim=2)


@torch.no_grad()
def test_encoder_stages(case):
    t, encoder = case.tensors, case.model.encoder
    subsampled, lengths = encoder.pre_encode(t["features"], t["features_len"])
    assert_valid_close(subsampled, t["subsampled"], lengths, tolerance(case, "encoded"))
    x, pos_emb, att_mask, pad_mask = encoder.prepare(subsampled, lengths)
    first = encoder.layers[0](x, pos_emb, att_mask, pad_mask)
    assert_valid_close(first, t["layer0_out"], lengths, tolerance(case, "encoded"))
    encoded, lengths = case.model.encode(t["features"], t["features_len"])
    assert lengths.tolist() == t["encoded_len"].tolist()
    assert_valid_close(encoded, t["encoded"], lengths, tolerance(case, "encoded"))


@torch.no_grad()
def test_heads(case):
    t, model = case.tensors, case.model
    if "ctc" in model.heads:
        log_probs = model.ctc_log_probs(t["encoded"])
        assert_valid_close(
            log_probs, t["ctc_log_probs"], t["encoded_len"], tolerance(case, "ctc_log_probs")
        )
    if model.heads[0] != "ctc":
        assert_valid_close(model.decoder(t["targets"]), t["pred_out"], t["targets_len"] + 1, 1e-5)
        logits = model.joint_logits(t["encoded"], t["targets"], t["targets_len"])
        for b, (n, u) in enumerate(zip(t["encoded_len"].tolist(), t["targets_len"].tolist())):
            difference = logits[b, :n, : u + 1] - t["joint_logits"][b, :n, : u + 1]
            assert difference.abs().max() <= tolerance(case, "joint_logits")


def test_losses(case):
    t, model = case.tensors, case.model
    encoded = t["encoded"].clone().requires_grad_()
    losses = model.losses(encoded, t["encoded_len"], t["targets"], t["targets_len"])
    names = {"tdt": "tdt_loss", "rnnt": "rnnt_loss", "ctc": "ctc_loss"}
    for head, loss in losses.items():
        expected = t[names[head]].double()
        assert ((loss - expected).abs() / expected).max() <= tolerance(case, "loss_relative")
    if model.heads[0] == "ctc":
        return
    model.zero_grad()
    losses[model.heads[0]].mean().backward()
    output = model.joint.joint_net[-1]
    gradients = {
        "grad_encoded": encoded.grad,
        "grad_joint_out": output.weight.grad,
        "grad_joint_out_bias": output.bias.grad,
        "grad_embed": model.decoder.prediction["embed"].weight.grad,
    }
    for name, actual in gradients.items():
        limit = tolerance(case, "grad_relative_to_max") * t[name].abs().max()
        assert (actual - t[name]).abs().max() <= limit, name


@pytest.mark.parametrize("kind", ["rnnt_branch_loss"])
def test_losses_of_the_stored_logits(case, kind):
    t = case.tensors
    if "joint_logits" not in t:
        pytest.skip("a CTC model has no joint")
    arguments = (t["joint_logits"].double(), t["targets"], t["encoded_len"], t["targets_len"])
    kwargs = case.expected["transducer"]["loss_kwargs"]
    blank = case.expected["transducer"]["blank_id"]
    for reduction, expected in case.expected["transducer"]["loss_reductions"].items():
        if case.model.heads[0] == "tdt":
            options = dict(durations=kwargs["durations"], sigma=kwargs["sigma"])
            actual = tdt_loss(*arguments, blank=blank, reduction=reduction, **options)
        else:
            actual = rnnt_loss(*arguments, blank=blank, reduction=reduction)
        assert float(actual) == pytest.approx(expected, rel=1e-6)
    if kind in t:
        tokens = t["joint_logits"][..., : blank + 1].double()
        actual = rnnt_loss(tokens, *arguments[1:], blank=blank, reduction="none")
        assert torch.allclose(actual, t[kind].double(), rtol=1e-6)


def strategies(case):
    """(head, overrides, hypotheses) of the greedy entries that NeMo could decode."""
    for part, head in (("transducer", case.model.heads[0]), ("ctc", "ctc")):
        for name, entry in case.expected.get(part, {}).get("decoding", {}).items():
            # `greedy` counts max_symbols otherwise and `greedy_batch` stores wrong durations for
            # batches (README of the golden data): `greedy_batch`'s tokens, batch-1 durations
            comparable = name.startswith("greedy_batch") or (head == "ctc" and name == "greedy")
            if comparable and "error" not in entry:
                yield head, name, entry


def test_greedy(case):
    t, model, seen = case.tensors, case.model, 0
    for head, name, entry in strategies(case):
        max_symbols = model.config.max_symbols
        if "greedy.max_symbols" in entry.get("overrides", {}):
            max_symbols = entry["overrides"]["greedy.max_symbols"]
        object.__setattr__(model.config, "max_symbols", max_symbols)
        hypotheses = model.decode_greedy(t["encoded"], t["encoded_len"], head)
        for hypothesis, expected in zip(hypotheses, entry["hyps"], strict=True):
            assert hypothesis.tokens == expected["ids"], name
            assert hypothesis.frames == expected["timestamp"], name
            assert model.tokenizer.decode(hypothesis.tokens) == expected["text"], name
            if "bs1_with_durations" in name:
                assert hypothesis.durations == expected["durations"]
        seen += 1
        object.__setattr__(
            model.config, "max_symbols", type(model.config).from_nemo(model.config.nemo).max_symbols
        )
    assert seen


def test_word_and_segment_frames(case):
    t, model = case.tensors, case.model
    for key, utterances in case.expected.get("timestamps_from_encoded_bs1", {}).items():
        head = "ctc" if key == "ctc" else model.heads[0]
        for b, expected in enumerate(utterances):
            if "error" in expected:
                continue
            n = t["encoded_len"][b : b + 1]
            (hypothesis,) = model.decode_greedy(t["encoded"][b : b + 1, : int(n)], n, head)
            tokens = model.head(head).token_spans(hypothesis, model.tokenizer)
            assert [(s.start, s.end) for s in tokens] == [
                (c["start_offset"], c["end_offset"]) for c in expected["char"]
            ]
            words = word_spans(
                tokens, model.tokenizer.ids_to_pieces(hypothesis.tokens), model.tokenizer
            )
            assert [(w.text, w.start, w.end) for w in words] == [
                (w["word"], w["start_offset"], w["end_offset"]) for w in expected["word"]
            ]
            segments = segment_spans(
                words, model.config.segment_separators, model.config.segment_gap_frames
            )
            assert [(s.text, s.start, s.end) for s in segments] == [
                (s["segment"], s["start_offset"], s["end_offset"]) for s in expected["segment"]
            ]


def test_transcribe(case):
    t, model = case.tensors, case.model
    clips = [audio[:n] for audio, n in zip(t["audio"], t["audio_len"].tolist())]
    for key in ("rnnt", "ctc"):
        head = "ctc" if key == "ctc" else model.heads[0]
        texts = case.expected.get("transcribe_plain_batched", {}).get(key)
        if texts:
            # group and instance norm look at the whole padded clip, in NeMo too
            invariant = model.config.encoder.conv_norm_type in ("batch_norm", "layer_norm")
            for batch_size in (1, 2, len(clips)) if invariant else (len(clips),):
                transcripts = model.transcribe(clips, head=head, batch_size=batch_size)
                assert [transcript.text for transcript in transcripts] == texts
        # NeMo does not count a reduction between layers: its times are too early by its factor
        slower = model.config.encoder.frame_factor / model.config.encoder.subsampling_factor
        timed = case.expected.get("transcribe_timestamps_bs1", {}).get(key)
        if timed and "error" not in timed:
            transcripts = model.transcribe(clips, head=head, batch_size=1, timestamps=True)
            for transcript, expected in zip(transcripts, timed, strict=True):
                if "error" in expected or transcript.duration < 1:
                    continue  # NeMo's times of a short clip count the silence it puts in front
                for kind, name in (("words", "word"), ("segments", "segment")):
                    spans = [(s.text, s.start, s.end) for s in getattr(transcript, kind)]
                    assert [s[0] for s in spans] == [e[name] for e in expected[name]]
                    for span, e in zip(spans, expected[name]):
                        times = e["start"] * slower, e["end"] * slower
                        assert span[1:] == pytest.approx(times, abs=1e-6)


@pytest.mark.parametrize("name", ["ctc_bpe", "hybrid_tdt_ctc_bpe"])
def test_what_the_stages_refuse(name):
    """By a ValueError; torch's CTC loss alone would read beyond its memory."""
    model = fastconformer.load_model(golden(name) / "model.nemo")
    tensors = load_case(name).tensors
    encoded, lengths = tensors["encoded"], tensors["encoded_len"]
    targets, n_tokens = tensors["targets"], tensors["targets_len"]
    for wrong in (
        (lengths, targets * 0 + 10**6, n_tokens),
        (lengths, targets * 0 - 1, n_tokens),
        (lengths, targets * 0 + model.blank_id, n_tokens),
        (lengths, targets, n_tokens + 1),
        (lengths + 9, targets, n_tokens),
        (lengths, targets[:1], n_tokens),
        (lengths, targets.float(), n_tokens),
    ):
        with pytest.raises(ValueError, match="expected"):
            model.losses(encoded, *wrong)
    with pytest.raises(ValueError, match="expected"):
        model.featurize(tensors["audio"][0], tensors["audio_len"][:1])
    with pytest.raises(ValueError, match="expected"):
        model.encode(tensors["features"][:, :5], tensors["features_len"])
