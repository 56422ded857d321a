"""Long recordings to clips: cut at pauses, with the words that were said, and no others."""

import itertools
import json

import numpy as np
import pytest
import soundfile

from fastconformer import cli
from fastconformer.audio.files import load_audio
from fastconformer.recordings.timestamps import Span
from fastconformer.recordings.transcript import Transcript
from training.data.segments import agreement, cut_at_pauses, find_segments
from training.data.utterances import read_utterances
from training.segment import main

RATE = 16000


def spoken(text: str, pause_after=(), word_s=0.4, gap_s=0.05, pause_s=1.0, spaces=True):
    """Words with times, a pause after those of these numbers."""
    words, at = [], 0.5
    for number, word in enumerate(text.split() if spaces else list(text)):
        words.append(Span(word, at, at + word_s))
        at += word_s + (pause_s if number in pause_after else gap_s)
    return words, at + 0.5


def test_cuts_lie_in_pauses_and_clips_are_not_too_long():
    words, _ = spoken("a " * 40, pause_after=(9, 19, 29))
    assert cut_at_pauses(words, 0.3, 6.0) == [(0, 10), (10, 20), (20, 30), (30, 40)]
    assert cut_at_pauses(words, 0.3, 11.0) == [(0, 20), (20, 40)]
    short = cut_at_pauses(words, 0.3, 2.0)
    assert all(words[b - 1].end - words[a].start <= 2.0 for a, b in short)
    assert [i for a, b in short for i in range(a, b)] == list(range(40))


TEXT = "the quick brown fox jumps over the lazy dog and runs away into the dark wood again"


def test_each_clip_has_its_words():
    words, seconds = spoken(TEXT, pause_after=(4, 9))
    found = find_segments(words, f"Chapter one. {TEXT} The end of it.", seconds, max_s=3.5)
    assert " ".join(s.text for s in found) == TEXT and not any(s.reason for s in found)
    assert all(s.score == 1 for s in found) and found[0].text == "the quick brown fox jumps"
    for before, after in itertools.pairwise(found):
        assert before.end <= after.start
    # heard a little wrong, written with capitals and marks: the text's own words
    wrong, seconds = spoken(TEXT.replace("lazy", "lasy").replace("wood", "would"), (4, 9))
    found = find_segments(wrong, TEXT.title() + ".", seconds, max_s=3.5)
    assert " ".join(s.text for s in found) == TEXT.title() + "."
    assert all(0.8 < s.score <= 1 for s in found) and not any(s.reason for s in found)


def test_what_does_not_fit_is_left_out():
    said, seconds = spoken(TEXT + " la la la la la oh oh", pause_after=(4, 9, 16))
    found = find_segments(said, TEXT, seconds, max_s=3.5)
    assert found[-1].reason and found[-1].score < 0.3  # a song behind it
    assert " ".join(s.text for s in found if not s.reason) == TEXT
    # a word of the text that was not heard at a cut: it may have been said in either clip
    lost = TEXT.replace("jumps over", "jumps suddenly over")
    words, seconds = spoken(TEXT, pause_after=(4, 9))
    found = find_segments(words, lost, seconds, max_s=3.5)
    assert [bool(s.reason) for s in found] == [True, True, False]
    # a passage that was never read is no reason
    passage = TEXT.replace(
        "jumps over", "jumps " + "of which nobody ever spoke a word " * 3 + "over"
    )
    found = find_segments(words, passage, seconds, max_s=3.5)
    assert not any(s.reason for s in found) and found[0].text == "the quick brown fox jumps"


def test_scripts_without_spaces():
    text = "今天天气很好我们去公园散步然后回家吃饭明天还要上班所以早点休息"
    words, seconds = spoken(text, pause_after=(5, 17), spaces=False)
    found = find_segments(words, f"标题在前面说一下{text}结束的话", seconds, max_s=6.0)
    assert "".join(s.text for s in found) == text and len(found) >= 3
    assert agreement("Ab c", "abc") == 1 and agreement("abcd", "abxd") == 0.75


class Heard:
    """Stands for a model that hears the words at these times."""

    sample_rate = RATE

    def __init__(self, words):
        self.words = words

    def transcribe(self, inputs, head=None, timestamps=False):
        assert len(inputs[0]) > RATE and timestamps
        text = " ".join(word.text for word in self.words)
        return [Transcript(text, [], [], None, self.words, None, 0.0, "ctc", 1.0)]


def test_a_recording_becomes_a_manifest(tmp_path, monkeypatch, capsys):
    words, seconds = spoken(TEXT.replace("lazy", "laser") + " la la la la la la", (4, 9, 16))
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, round(seconds * RATE))
    soundfile.write(tmp_path / "long.wav", samples, RATE, subtype="PCM_16")
    (tmp_path / "long.txt").write_text(f"Chapter one. {TEXT} The end.")
    monkeypatch.setattr(cli, "load_model", lambda options: Heard(words))
    command = [str(tmp_path / "long.wav"), str(tmp_path / "long.txt"), "--model=x", "--lang=en"]
    assert main([*command, "--max-s=3.5", "-o", str(tmp_path / "out")]) == 0
    assert "3 clips" in capsys.readouterr().out
    found, bad = read_utterances(tmp_path / "out" / "manifest.jsonl")
    assert " ".join(u.text for u in found) == TEXT and not bad and found[0].lang == "en"
    written = np.concatenate([load_audio(u.audio_path, RATE) for u in found])
    assert len(written) / RATE == pytest.approx(sum(u.duration_s for u in found), abs=0.01)
    (left,) = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").open()]
    assert left["heard"].startswith("la la") and left["reason"] and left["score"] < 0.5
    assert main([*command, "--min-score=7", "-o", str(tmp_path / "out")]) == 2
