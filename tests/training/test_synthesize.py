"""The spoken corpus: repeatable, disjoint splits, text convention, acoustics."""

import importlib.util
import json
import re
import sys

import numpy as np
import pytest
import soundfile

from training.speech.sounds import SAMPLE_RATE_HZ, room, shaped_noise, trim
from training.speech.texts import (
    DIGITS,
    TEENS,
    TENS,
    hindi_text,
    is_heldout,
    number_words,
    plain_text,
    quickstart_text,
    read_sentences,
)
from training.speech.voices import ACCENTS, HELDOUT_VARIANTS, TRAIN_VARIANTS, the_speaker
from training.synthesize import main

espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="eSpeak NG (espeakng-loader) is not installed",
)


def corpus(folder):
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def speak(folder, *options):
    assert main([str(folder), "--vocabulary", "quickstart", *options]) == 0
    return corpus(folder)


@espeak
def test_corpus_repeats_with_any_number_of_processes(tmp_path):
    """40 clips are more than one process speaks, so every second one starts afresh."""
    entries = speak(tmp_path / "a", "--count", "40", "--seed", "5")
    assert speak(tmp_path / "b", "--count", "40", "--seed", "5", "--jobs", "2") == entries
    for entry in entries:
        one, two = (tmp_path / name / entry["audio_filepath"] for name in "ab")
        assert one.read_bytes() == two.read_bytes(), entry
    other = speak(tmp_path / "c", "--count", "40", "--seed", "6")
    assert {e["text"] for e in other} != {e["text"] for e in entries}


@espeak
def test_manifest_tells_the_truth(tmp_path):
    for entry in speak(tmp_path, "--count", "12", "--voices", "heldout"):
        info = soundfile.info(tmp_path / entry["audio_filepath"])
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert entry["duration"] == info.frames / 16000 and 0.5 < entry["duration"] < 12
        assert entry["speaker"].split("+")[1] in HELDOUT_VARIANTS
        assert re.fullmatch(r"[a-z']+( [a-z']+)*", entry["text"]) and is_heldout(entry["text"])
        samples, _ = soundfile.read(tmp_path / entry["audio_filepath"])
        assert 0.05 < np.abs(samples).max() <= 0.95
        assert samples.std() > 0.002


@espeak
def test_splits_share_neither_voices_nor_sentences(tmp_path):
    train = speak(tmp_path / "train", "--count", "32")
    heldout = speak(tmp_path / "heldout", "--count", "12", "--voices", "heldout")
    for key in ("text", "speaker"):
        assert not {e[key] for e in train} & {e[key] for e in heldout}
    assert len({e["text"] for e in train}) == 32
    assert len({e["speaker"] for e in train}) > 20


@espeak
def test_every_voice_exists_and_differs():
    speaker = the_speaker()
    sounds = {}
    for variant in [*TRAIN_VARIANTS, *HELDOUT_VARIANTS]:
        sounds[variant] = speaker.speak("seven", f"en-us+{variant}").tobytes()
    assert len(set(sounds.values())) == len(sounds)
    assert all(len(speaker.speak("seven", accent)) for accent in ACCENTS)
    with pytest.raises(ValueError, match="no voice 'en-us[+]nobody'"):
        speaker.speak("seven", "en-us+nobody")
    with pytest.raises(ValueError, match="no voice 'atlantean'"):
        speaker.speak("seven", "atlantean")


@espeak
def test_hours_end_a_corpus(tmp_path):
    entries = speak(tmp_path, "--count", "60", "--hours", "0.005")
    seconds = [entry["duration"] for entry in entries]
    assert sum(seconds[:-1]) < 18 <= sum(seconds)
    names = {entry["audio_filepath"] for entry in entries}
    assert {f"audio/{p.name}" for p in (tmp_path / "audio").iterdir()} == names


@espeak
def test_sentences_digits_and_phrases(tmp_path):
    text = tmp_path / "text.tsv"
    text.write_text("".join(f"{k}\tX\tthe {w} sat on the {w}'s mat\n" for k, w in enumerate(
        f"{a}{b}at" for a in "bcfhmprsv" for b in "hlrt")))  # fmt: skip
    out = tmp_path / "out"
    options = ["--sentences", str(text), "--count", "6", "--digits", "5", "--phrases", "4"]
    assert main([str(out), *options]) == 0
    entries = corpus(out)
    assert len(entries) == 15
    number = set(DIGITS) | {"hundred", *TEENS, *TENS}
    assert sum(set(e["text"].split()) <= number for e in entries) >= 5


def test_missing_library_names_the_extra(tmp_path, monkeypatch, capsys):
    the_speaker.cache_clear()
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    assert main([str(tmp_path), "--vocabulary", "quickstart", "--count", "2"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install .[quickstart]" in err
    assert not (tmp_path / "manifest.jsonl").exists()


def test_bad_usage(tmp_path, capsys):
    for options in ([], ["--vocabulary", "x"], ["--vocabulary", "quickstart", "--jobs", "0"]):
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path / "o"), *options])
        assert stop.value.code == 2
    capsys.readouterr()
    assert main([str(tmp_path / "o"), "--sentences", str(tmp_path / "gone.txt")]) == 1
    (tmp_path / "empty.txt").touch()
    assert main([str(tmp_path / "o"), "--sentences", str(tmp_path / "empty.txt")]) == 1
    assert capsys.readouterr().err.count("\n") == 2


def test_text_convention():
    assert plain_text("Don\u2019t stop \u2014 'caf\u00e9', now!") == "don't stop cafe now"
    assert plain_text("in 1867 they") is None  # which words were spoken is unknown


def test_sentences_are_cut_without_losing_words(tmp_path):
    path = tmp_path / "text.txt"
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "klmnop" for c in "rstuvw"]
    path.write_text(" ".join(words[:100]) + "\n" + " ".join(words[100:]) + "\nno 2 here\n\nyes\n")
    pieces = read_sentences([path], np.random.default_rng(0), max_words=9)
    assert " ".join(pieces).split() == [*words, "yes"]
    lengths = [len(piece.split()) for piece in pieces]
    assert max(lengths) <= 9 and lengths.count(1) == 1  # the sentence of one word


@pytest.mark.parametrize(
    "number, words",
    [(0, "zero"), (13, "thirteen"), (40, "forty"), (59, "fifty nine"), (100, "one hundred"),
     (412, "four hundred twelve"), (999, "nine hundred ninety nine")],
)  # fmt: skip
def test_number_words(number, words):
    assert number_words(number) == words


def test_quickstart_grammar_is_small_and_rich():
    rng = np.random.default_rng(0)
    texts = [quickstart_text(rng) for _ in range(20000)]
    assert len({word for text in texts for word in text.split()}) <= 100
    assert len(set(texts)) > 3000


def test_noise_slope_and_power():
    noise = shaped_noise(np.random.default_rng(0), 1 << 17, -3.0)
    assert noise.std() == pytest.approx(1, abs=1e-3)
    power = np.abs(np.fft.rfft(noise)) ** 2
    octaves = [power[1 << k : 2 << k].mean() for k in range(8, 16)]
    slopes = np.diff(10 * np.log10(octaves))
    assert slopes.mean() == pytest.approx(-3, abs=0.1)


def test_room_decays_by_60_db():
    response = room(np.random.default_rng(0), 0.5, 6.0)
    assert len(response) == SAMPLE_RATE_HZ // 2 and response[0] == 1
    tail = response[1:]
    assert 10 * np.log10(np.sum(tail**2)) == pytest.approx(-6, abs=0.01)
    early, late = (np.sum(part**2) for part in (tail[200:1000], tail[-800:]))
    expected_db = 60 * (len(response) - 400 - 600) / len(response)
    assert 10 * np.log10(early / late) == pytest.approx(expected_db, abs=2)


def test_trim():
    assert trim(np.array([0, 0, 0.5, 0, -0.5, 0, 0])).tolist() == [0.5, 0, -0.5]
    assert len(trim(np.zeros(5))) == 0


@espeak
def test_hindi_is_spoken_and_labelled(tmp_path):
    command = [str(tmp_path), "--vocabulary", "hindi", "--count", "6", "--seed", "3"]
    assert main(command) == 0
    entries = corpus(tmp_path)
    assert len(entries) == 6 and {entry["lang"] for entry in entries} == {"hi"}
    for entry in entries:
        assert entry["speaker"].startswith("hi+") and entry["duration"] > 0.5
        assert re.fullmatch(r"[\u0900-\u097f ]+", entry["text"])
    words = {word for i in range(400) for word in hindi_text(np.random.default_rng(i)).split()}
    assert 70 < len(words) < 110
