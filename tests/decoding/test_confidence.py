"""Confidences of tokens and words against NeMo's own (tests/golden/record_confidence.py)."""

import json

import pytest
import torch
from conftest import TESTS, golden, load_case

import fastconformer
from fastconformer.decoding import Confidence, DecodingOptions
from fastconformer.recordings.timestamps import Span, word_spans

RECORDED = json.loads((TESTS / "golden" / "confidence.json").read_text())


def options_of(entry) -> DecodingOptions:
    method = entry["method"]
    return DecodingOptions(
        confidence=Confidence(
            measure=method.get("entropy_type", "max_prob"),
            alpha=method["alpha"],
            norm=method.get("entropy_norm", "exp"),
            aggregation=entry["aggregation"],
            include_duration=entry["tdt_include_duration"],
        )
    )


@pytest.mark.parametrize("name", RECORDED)
def test_confidences_are_nemos(name):
    case = load_case(golden(name))
    model = fastconformer.load_model(case.folder / "model.nemo")
    encoded, lengths = case.tensors["encoded"], case.tensors["encoded_len"]
    seen = set()
    for entry in RECORDED[name]:
        options, head = options_of(entry), entry["head"]
        found = model.decode(encoded, lengths, head, options)
        for hypothesis, expected in zip(found, entry["hyps"], strict=True):
            assert hypothesis.confidences == pytest.approx(expected["tokens"], abs=2e-5), entry
            transcript = model.transcript(
                hypothesis, head, 1.0, timestamps=True, confidence=options.confidence
            )
            if expected["words"] is not None:
                words = [word.confidence for word in transcript.words]
                assert words == pytest.approx(expected["words"], abs=2e-5), entry
            seen.update(hypothesis.confidences)
    assert len(seen) > 100


@torch.no_grad()
def test_beams_and_alignments_have_confidences_of_greedy_where_they_agree():
    case = load_case(golden("hybrid_tdt_ctc_bpe"))
    model = fastconformer.load_model(case.folder / "model.nemo")
    encoded, lengths = case.tensors["encoded"], case.tensors["encoded_len"]
    for head in model.heads:
        greedy = model.decode(encoded, lengths, head, DecodingOptions(confidence=True))
        beam = model.decode(encoded, lengths, head, DecodingOptions(confidence=True, beam=4))
        same = [(a, b) for a, b in zip(greedy, beam) if a.frames == b.frames]
        assert same
        for a, b in same:
            assert b.confidences == pytest.approx(a.confidences, abs=1e-5)


def test_a_word_counts_the_mark_of_its_start():
    """As in NeMo's transcribe(): "▁" before a mark belongs to the mark's word."""
    tokenizer = fastconformer.load_model(golden("ctc_bpe") / "model.nemo").tokenizer
    pieces = ["▁the", "▁", "."]
    sure = zip(pieces, (0.9, 0.3, 0.8), strict=True)
    tokens = [Span(tokenizer.join([piece]), i, i + 1, c) for i, (piece, c) in enumerate(sure)]
    words = word_spans(tokens, pieces, tokenizer, Confidence(aggregation="mean").aggregate)
    assert [word.text for word in words] == ["the", "."]
    assert [word.confidence for word in words] == pytest.approx([0.9, 0.55])


@pytest.mark.parametrize(
    "options", [{"measure": "shannon"}, {"alpha": 0}, {"norm": "log"}, {"aggregation": "sum"}]
)
def test_an_unknown_confidence_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        Confidence(**options)


def test_a_measure_by_name():
    assert DecodingOptions(confidence="renyi").confidence == Confidence(measure="renyi")
    assert DecodingOptions(confidence="tsallis").confidence == Confidence()
    for wrong in ("tsalis", 3, 0.5):
        with pytest.raises(ValueError, match=f"is {wrong!r}, expected"):
            DecodingOptions(confidence=wrong)
    case = load_case(golden("ctc_bpe"))
    model = fastconformer.load_model(case.folder / "model.nemo")
    clip = case.tensors["audio"][0, : int(case.tensors["audio_len"][0])].numpy()
    by_name, by_object = (
        model.transcribe([clip], timestamps=True, confidence=c)[0]
        for c in ("gibbs", Confidence("gibbs"))
    )
    assert by_name.words == by_object.words and by_name.words[0].confidence is not None
    text = by_name.text
    assert model.align(clip, text, confidence="gibbs") == model.align(
        clip, text, Confidence("gibbs")
    )
