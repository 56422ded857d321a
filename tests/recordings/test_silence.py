"""Recordings without speech, and silence around speech."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import golden

import fastconformer
from fastconformer.audio.files import load_audio
from fastconformer.recordings.silence import doubt, doubt_within, sounding, steady_stretches
from fastconformer.recordings.transcript import Transcript
from fastconformer.transcribe import main

ROOT = Path(__file__).parents[2]
RATE = 16000
SAMPLES = ROOT / "samples"


def level(samples: np.ndarray, db: float) -> np.ndarray:
    return (samples / samples.std() * 10 ** (db / 20)).astype(np.float32)


def without_speech(seconds: float) -> dict[str, np.ndarray]:
    """Room noise, machines, music: no speech in any."""
    rng, n = np.random.default_rng(0), int(seconds * RATE)
    t = np.arange(n) / RATE
    spectrum = np.fft.rfft(rng.standard_normal(n))
    pink = np.fft.irfft(spectrum / np.sqrt(np.maximum(1, np.arange(len(spectrum)))), n)
    hum = sum(np.sin(2 * np.pi * 50 * k * t) / k for k in (1, 2, 3, 5))
    chord = sum(np.sin(2 * np.pi * hz * t) for hz in (261.6, 329.6, 392.0))
    notes, since = 220 * 2 ** (rng.integers(0, 24, n // 4000 + 1) / 12), t % 0.25
    pitch = notes[np.arange(n) // 4000]
    melody = sum(np.sin(2 * np.pi * pitch * k * t) / k**1.5 for k in range(1, 6))
    return {
        "white": level(rng.standard_normal(n), -60),
        "louder": level(rng.standard_normal(n), -30),
        "pink": level(pink, -50),
        "hum": level(hum, -40),
        "chord": level(chord, -20),
        "melody": level(melody * np.exp(-3 * since) * np.minimum(1, since * 100), -20),
    }


@pytest.fixture(scope="module")
def base():
    return fastconformer.load_model(ROOT / "models" / "base_tiny.nemo")


@pytest.fixture(scope="module", params=["base", "rnnt_bpe", "canary_v2_unified"])
def model(request, base):
    name = request.param
    return base if name == "base" else fastconformer.load_model(golden(name) / "model.nemo")


def test_no_speech_gives_no_text_or_a_doubtful_one(model):
    sounds = without_speech(1.5)
    zeros = [np.zeros(2 * RATE, np.float32), np.zeros(30 * RATE, np.int16)]
    for head in model.heads:
        for transcript in model.transcribe(zeros, head=head, timestamps=True):
            assert (transcript.text, transcript.tokens, transcript.token_frames) == ("", [], [])
            assert not transcript.words and not transcript.segments and not transcript.doubtful
        found = model.transcribe(list(sounds.values()), head=head)
        for name, transcript in zip(sounds, found, strict=True):
            assert not transcript.text or transcript.doubtful, (name, transcript)


@pytest.mark.parametrize(
    ("path", "kind"), [("english/009600062.ogg", np.int16), ("espeak.wav", np.float32)]
)
def test_silence_around_speech_changes_nothing(base, path, kind):
    clip = load_audio(SAMPLES / path, RATE)[: 3 * RATE]
    clip = clip if kind == np.float32 else np.round(clip * 32767).astype(np.int16)
    for head in base.heads:
        [alone] = base.transcribe([clip], head=head, timestamps=True)
        assert alone.text and not alone.doubtful
        for before, after in ((1, 0), (0, 10), (60, 60)):
            silence = np.zeros(before * RATE, kind), np.zeros(after * RATE, kind)
            padded = np.concatenate((silence[0], clip, silence[1]))
            [found] = base.transcribe([padded], head=head, timestamps=True)
            assert (found.text, found.tokens, found.score) == (
                alone.text,
                alone.tokens,
                alone.score,
            )
            assert found.duration == pytest.approx(alone.duration + before + after)
            for spans, moved in ((alone.words, found.words), (alone.segments, found.segments)):
                assert [(s.text, s.start + before, s.end + before) for s in spans] == [
                    (s.text, pytest.approx(s.start), pytest.approx(s.end)) for s in moved
                ]


def test_only_long_digital_silence_is_cut_off():
    rng = np.random.default_rng(0)
    speech = rng.standard_normal(RATE).astype(np.float32) / 10
    config = types.SimpleNamespace(frame_seconds=640 / RATE, looks_at_all=True)
    model = types.SimpleNamespace(sample_rate=RATE, config=config)

    def bounds(before_s, after_s, of=0.0):
        pad = [np.full(int(s * RATE), of, np.float32) for s in (before_s, after_s)]
        return sounding(model, np.concatenate((pad[0], speech, pad[1])))

    assert bounds(0.4, 0.4) == (0, int(1.8 * RATE))
    assert bounds(0.51, 0.6) == (int(0.51 * RATE) // 640 * 640, int(1.51 * RATE))
    assert bounds(0.6, 0.6, of=1e-4) == (0, int(2.2 * RATE))  # a quiet room
    assert sounding(model, np.zeros(100, np.float32)) == (0, 0)
    model.config.looks_at_all = False  # features are not normalised over the clip
    assert bounds(0.51, 0.6) == (0, int(2.11 * RATE))
    assert sounding(model, np.zeros(100, np.float32)) == (0, 0)


def test_speech_is_not_doubtful():
    """Not even that of which a model is unsure."""
    paths = [p for p in sorted(SAMPLES.rglob("*")) if p.suffix in (".wav", ".flac", ".ogg")]
    paths = [p for p in paths if p.stem not in ("noise", "rir")]
    assert len(paths) > 20
    for path in paths:
        samples = load_audio(path, RATE)
        unsure = Transcript("a", [1], [0], None, None, None, -9.0, "ctc", len(samples) / RATE)
        assert doubt(unsure, samples, RATE) is None, path


def test_no_stretch_of_speech_is_steady():
    for path in ("talk.ogg", "jfk.flac", "english/009600127.ogg", "english/096150003.ogg"):
        assert steady_stretches(load_audio(SAMPLES / path, RATE), RATE) == []


@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_noise_between_speech_is_doubtful(kind):
    """Where something is written in it, and there alone."""
    speech = load_audio(SAMPLES / "jfk.flac", RATE)
    for name, noise in without_speech(6.0).items():
        whole = np.concatenate((speech, noise, speech))
        whole = whole if kind == np.float32 else np.round(whole * 32767).astype(np.int16)
        [(start, end)] = steady_stretches(whole, RATE)
        # the pauses of speech beside it may be steady too
        assert 9.0 < start < 11.1 and 16.9 < end < 19.0, name
        beside = [0.5, 9.0, start + 0.2, end - 0.2, 19.0]
        assert doubt_within(beside, whole, RATE) is None
        why = doubt_within([*beside, 14.0], whole, RATE, first_s=100.0)
        assert why.startswith(f"from {100 + start:.1f} to {100 + end:.1f} s the sound is steady")
    assert doubt_within([14.0], np.zeros(20 * RATE, kind), RATE) is None


def test_noise_in_a_long_recording(model):
    """For every head: no text is written in it, or the transcript says where."""
    speech = load_audio(SAMPLES / "espeak.wav", RATE)
    for noise in (without_speech(6.0)[name] for name in ("louder", "hum", "melody")):
        whole = np.concatenate((np.zeros(RATE, np.float32), speech, noise, speech))
        first, end = 1.0 + len(speech) / RATE, 1.0 + len(speech) / RATE + 6.0
        frame_s = model.config.frame_seconds
        for head in model.heads:
            [found] = model.transcribe([whole], head=head)
            times = [frame * frame_s for frame in found.token_frames]
            inside = [time for time in times if first + 1 < time < end - 1]
            assert not inside or found.doubtful, (head, found)


def test_the_command_says_what_is_doubtful(tmp_path, capsys):
    import soundfile

    soundfile.write(tmp_path / "noise.wav", without_speech(2.0)["louder"], RATE)
    model, out = str(ROOT / "models/base_tiny.nemo"), tmp_path / "out.jsonl"
    assert main([str(tmp_path / "noise.wav"), "--model", model, "-o", str(out)]) == 0
    assert "noise.wav: the text is doubtful: the sound is steady" in capsys.readouterr().err
    assert "steady" in json.loads(out.read_text())["doubtful"]
