"""Canary from audio to text, against what NeMo's transcribe() gave: prompts by every road, times of
both kinds, the long file."""

import functools
import logging

import numpy as np
import pytest
import soundfile
from conftest import SAMPLES, load_case

from fastconformer import load_model
from fastconformer.heads import aed
from fastconformer.transcribe import main

CASES = ["canary_flash_agg", "canary_v2_unified", "canary_v1_agg"]


@functools.cache
def loaded(name):
    case = load_case(name)
    audio, lengths = case.tensors["audio"], case.tensors["audio_len"]
    clips = [row[:length].numpy() for row, length in zip(audio, lengths)]
    return load_model(case.folder / "model.nemo"), case, clips


# Slots that NeMo's road from files drops without a word: we take them.
DROPPED = {"task", "itn", "emotion", "diarize", "decodercontext"}


def recorded(name):
    """(inputs, our arguments, batch size, NeMo's hypotheses) of all calls that NeMo got right."""
    _, case, _ = loaded(name)
    for call in case.expected["transcribe"]:
        arguments = {k: v for k, v in call["kwargs"].items() if k != "role"}
        arguments |= arguments.pop("slots", {})
        if "_manifest" in arguments:
            call_wide = arguments.get("call", {})
            arguments = {"prompt": arguments["_manifest"], **call_wide}
        dropped = call["inputs"] == "files" and DROPPED & arguments.keys()
        lost = call["inputs"] == "arrays" and len(call.get("hyps", ())) == 1
        if "hyps" not in call or dropped or lost or "decodercontext" in arguments:
            continue
        if arguments.get("timestamps") and name == "canary_v1_agg":
            continue  # NeMo gives none, without a word
        yield call["inputs"], arguments, call["batch_size"], call["hyps"]


def times(spans):
    return [(span.text, round(span.start, 2), round(span.end, 2)) for span in spans]


@pytest.mark.parametrize("name", CASES)
def test_what_nemo_transcribes(name):
    model, _, clips = loaded(name)
    leading = " " if model.tokenizer.kind == "agg" else ""
    n_calls = 0
    for inputs, arguments, batch_size, expected in recorded(name):
        is_long = inputs == "long_file"
        given = [np.concatenate(clips * 7)] if is_long else clips
        found = model.transcribe(given, batch_size=batch_size, **arguments)
        assert len(found) == len(expected)
        for transcript, hypothesis in zip(found, expected):
            n_calls += 1
            assert transcript.text == hypothesis["text"].removeprefix(leading), arguments
            assert (transcript.head, transcript.token_frames) == ("aed", [])
            assert transcript.token_durations is None
            if not is_long:  # there NeMo gives all pieces' tokens
                assert transcript.tokens == hypothesis["ids"]
            if not arguments.get("timestamps"):
                assert transcript.words is None
                continue
            # NeMo counts a piece's start in whole frames
            tolerance = 0.05 if is_long else 0.011
            for ours, nemo, key in (
                (transcript.words, hypothesis["timestamp"]["word"], "word"),
                (transcript.segments, hypothesis["timestamp"]["segment"], "segment"),
            ):
                assert [span.text for span in ours] == [span[key] for span in nemo]
                for end in ("start", "end"):
                    found_s = [getattr(span, end) for span in ours]
                    assert found_s == pytest.approx([s[end] for s in nemo], abs=tolerance)
    assert n_calls > 20


def test_every_slot_is_heard_by_every_road(tmp_path):
    """NeMo drops some slots of files, others of manifests; here the road makes no difference."""
    model, case, clips = loaded("canary_flash_agg")
    slots = {"source_lang": "en", "target_lang": "en", "decodercontext": "hello world"}
    expected = [
        hypothesis["text"].removeprefix(" ").replace("<|11|>", "")  # no time tokens in a text
        for call in case.expected["transcribe"]
        if call["inputs"] == "arrays" and call["kwargs"] == slots and call["batch_size"] == 3
        for hypothesis in call["hyps"]
    ]
    paths = []
    for i, clip in enumerate(clips):
        soundfile.write(tmp_path / f"{i}.wav", clip, 16000, subtype="PCM_16")
        paths.append(tmp_path / f"{i}.wav")
    roads = [
        {"inputs": clips, **slots},
        {"inputs": paths, **slots},
        {"inputs": paths, "prompt": slots},
        {"inputs": clips, "prompt": [slots] * 3, "batch_size": 2},
        {"inputs": clips, "prompt": model.prompt_ids(**slots)},
        {"inputs": clips, "prompt": {"decodercontext": "hello world"}, "source_lang": "en"},
    ]
    for road in roads:
        assert [t.text for t in model.transcribe(road.pop("inputs"), **road)] == expected


def test_a_prompt_for_each_clip():
    model, _, clips = loaded("canary_v1_agg")
    slots = [{"pnc": "no"}, {"source_lang": "de", "task": "ast"}, {}]
    together = model.transcribe(clips, prompt=slots, batch_size=3)
    for clip, own, transcript in zip(clips, slots, together):
        (alone,) = model.transcribe(clip, prompt=own)
        assert alone.text == transcript.text


def test_silence_is_empty():
    """An EOS in first place ends the text, where NeMo's beam goes on from it."""
    model, case, clips = loaded("canary_v1_agg")
    blocks = [b for b in case.expected["decoding"] for h in b["mended"]["beam_1"] if not h["ids"]]
    assert blocks
    for beam in (1, 4):
        found = model.transcribe(clips, prompt=blocks[0]["prompt_ids"], beam=beam)
        empty = [not h["ids"] for h in blocks[0]["mended"]["beam_1" if beam == 1 else "beam_4"]]
        assert [not t.text for t in found] == empty


def test_what_cannot_be_asked():
    flash, _, clips = loaded("canary_flash_agg")
    for arguments, reason in (
        ({"source_lang": "xx"}, "slot source_lang is 'xx', expected one of .*de"),
        ({"rhyme": "yes"}, "no slot 'rhyme'; slots of format canary2 are decodercontext, emotion"),
        ({"pnc": "maybe"}, "slot pnc is 'maybe', expected one of yes"),
        ({"task": "ast"}, "no slot 'task'"),
        ({"prompt": [4], "pnc": "no"}, "prompt is given as ids, pnc beside it"),
        ({"head": "ctc"}, "head is 'ctc', this model has aed"),
        ({"prompt": {"decodercontext": "word " * 200}}, "the decoder has 128 positions"),
    ):
        with pytest.raises(ValueError, match=reason):
            flash.transcribe(clips[0], **arguments)
    other = load_model(load_case("ctc_bpe").folder / "model.nemo")
    with pytest.raises(ValueError, match="source_lang is 'en', but this model's heads take no"):
        other.transcribe(clips[0], source_lang="en")


@pytest.mark.parametrize("name", ["canary_flash_agg", "canary_v2_unified"])
def test_what_is_known_beside_the_audio(name, tmp_path):
    """Phrases and a language model are asked through the search; a lock leaves its letters."""
    model, _, clips = loaded(name)
    plain = model.transcribe(clips)
    word = plain[1].text.split()[0]
    assert [t.text for t in model.transcribe(clips, boost={"zzz": 5.0})] == [t.text for t in plain]
    found = model.transcribe(clips, boost={word: 2.0}, beam=2)
    assert found[1].text == plain[1].text and found[1].score > plain[1].score + 1
    arpa = tmp_path / "lm.arpa"
    rows = ["-9\t<unk>", "-1\t<s>", "-1\t</s>", f"-0.1\t{word}"]
    arpa.write_text("\\data\\\nngram 1=4\n\n\\1-grams:\n" + "\n".join(rows) + "\n\n\\end\\\n")
    with_lm = model.transcribe(clips, lm=arpa, lm_weight=0.1)
    assert all(t.score != p.score for t, p in zip(with_lm, plain))
    assert [t.text for t in model.transcribe(clips, allow=["en"])] == [t.text for t in plain]
    with pytest.raises(ValueError, match="no piece of the tokenizer has letters of it"):
        model.transcribe(clips, allow=["greek"])


def test_times_need_a_slot_or_an_aligner(capsys):
    model, case, clips = loaded("canary_v1_agg")
    with pytest.raises(ValueError, match="prompts of format canary have no slot for"):
        model.transcribe(clips[0], timestamps=True)
    names = [str(SAMPLES / "digits_8k" / f"{n}_theo_0.flac") for n in (1, 2)]
    for wish in (["--timestamps"], ["--format", "ctm"]):
        assert main([*names, "--model", str(case.folder / "model.nemo"), *wish]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_translation_needs_its_task(caplog):
    model, _, clips = loaded("canary_v1_agg")
    aed._tell_task.cache_clear()
    with caplog.at_level(logging.WARNING):
        model.transcribe(clips, target_lang="<|en|>")  # what is spoken unless another is said
        assert not caplog.records
        for _ in range(2):
            model.transcribe(clips, source_lang="de", target_lang="en")
        model.transcribe(clips, target_lang="de")
    assert len(caplog.records) == 2 and "task stays asr" in caplog.text
    assert "source_lang is en and target_lang de" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model.transcribe(clips, source_lang="de", target_lang="en", task="ast")
    assert not caplog.records


@pytest.mark.parametrize("name", ["canary_flash_agg", "canary_v2_unified"])
def test_long_recordings(name):
    """Beyond 40 s in pieces, every word within the recording, times growing; cut in pauses too."""
    model, _, clips = loaded(name)
    long = np.concatenate([*clips, np.zeros(32000, np.float32)] * 10)
    seconds = len(long) / 16000
    assert seconds > 60
    for mode in ("auto", "quiet"):
        (found,) = model.transcribe(long, timestamps=True, long=mode)
        assert found.duration == pytest.approx(seconds)
        times = [t for word in found.words for t in (word.start, word.end)]
        assert all(0 <= t <= seconds + 0.1 for t in times)
        assert [w.start for w in found.words] == sorted(w.start for w in found.words)
        (plain,) = model.transcribe(long, long=mode)
        assert plain.words is None and plain.text
        both = model.transcribe([long, clips[0]], long=mode, batch_size=2)
        assert [t.text for t in both] == [plain.text, model.transcribe(clips[0])[0].text]


def test_a_damaged_alignment_is_told(caplog):
    """A text with more tokens than the clip has frames has no times, and says so."""
    model, _, clips = loaded("canary_v2_unified")
    with caplog.at_level(logging.WARNING):
        found = model.transcribe(clips[0][:3000], timestamps=True, min_duration_s=0)[0]
    if found.text.split() and not found.words:
        assert "no times for" in caplog.text


def test_train_mode_comes_back():
    model, _, clips = loaded("canary_flash_agg")
    model.train()
    try:
        model.transcribe(clips[0])
        assert model.transf_decoder.training and model.training
    finally:
        model.eval()
