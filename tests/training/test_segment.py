"""Long recordings to clips: cut at pauses, with the words that were said, and no others."""

import itertools
import json
import types

import numpy as np
import pytest
import soundfile

import fastconformer
from fastconformer.audio.files import load_audio
from fastconformer.checkpoint.nemo_archive import read_nemo
from fastconformer.text.tokenizer import AggregateTokenizer, CharTokenizer
from tests.conftest import SAMPLES, TESTS, extra, golden
from training.data import segments
from training.data.passages import quiet_steps, runs, words_of_text
from training.data.segments import find_segments
from training.data.utterances import read_utterances
from training.finetune import main as finetune
from training.segment import main

RATE = 16000
BASE = TESTS.parent / "models" / "base_tiny.nemo"
STRANGE = [
    "The harbour master counted seven barges before the fog came down",
    "Nobody in the village had ever tasted a pineapple",
    "Sixteen violins were left in the cupboard behind the stage",
    "She painted the kitchen yellow and the stairs a deep green",
]


def talk(count: int):
    """The first sentences of a reading: samples, and (start of its speech, end, text) of each."""
    samples = load_audio(SAMPLES / "talk.ogg", RATE)
    lines = (SAMPLES / "talk_sentences.jsonl").read_text().splitlines()
    return samples, sentences(samples, lines[:count])


def sentences(samples, lines: list[str]):
    quiet, said = quiet_steps(samples, RATE), []
    for line in map(json.loads, lines):
        first, end = round(line["offset"] * 100), round((line["offset"] + line["duration"]) * 100)
        loud = np.flatnonzero(~quiet[first:end])
        text = line.get("text_pnc", line["text"])
        said.append(((first + loud[0]) / 100, (first + loud[-1] + 1) / 100, text))
    return said


def check(clips, said):
    """The share of sentences that the clips hold, whole, and with no word of another one."""
    kept = set()
    for clip in clips:
        inside = [
            i for i, (a, b, _) in enumerate(said) if min(b, clip.end) - max(a, clip.start) > 0.25
        ]
        assert " ".join(said[i][2] for i in inside) == clip.text
        assert abs(clip.start - said[inside[0]][0]) <= 0.2
        assert abs(clip.end - said[inside[-1]][1]) <= 0.2
        kept |= set(inside)
    return kept


def test_a_weak_model_keeps_what_fits_and_leaves_out_the_rest():
    """It hears 2 of 3 letters at most; a sentence more, one less, other words in front and behind,
    ten seconds of noise."""
    samples, said = talk(8)
    cut = round(said[4][1] * RATE) + 3000
    noise = np.random.default_rng(0).normal(0, 0.05, 10 * RATE).astype(np.float32)
    if samples.dtype == np.int16:
        noise = (noise * 32768).astype(np.int16)
    samples = np.concatenate((samples[:cut], noise, samples[cut : round(said[7][1] * RATE) + 4000]))
    said = [(a + 10 * (i > 4), b + 10 * (i > 4), text) for i, (a, b, text) in enumerate(said)]
    texts = [text for _, _, text in said]
    written = [*STRANGE[:2], *texts[:2], STRANGE[2], *texts[2:6], *texts[7:], STRANGE[3]]
    model = fastconformer.load_model(BASE)
    found = find_segments(model, samples, "\n".join(written), max_s=12.0)
    kept = check([s for s in found if not s.reason], said)
    assert kept <= {0, 1, 2, 3, 4, 5, 7} and len(kept) >= 6
    unsaid = " ".join(s.text for s in found if "not said" in s.reason)
    assert all(text in unsaid for text in STRANGE)
    noise = [s for s in found if s.start <= said[4][1] + 1 and s.end >= said[5][0] - 1.5]
    assert noise and all(s.reason for s in noise)
    without = [s for s in found if s.reason == "no words of the text"]
    assert any(s.start < said[6][1] and s.end > said[6][0] for s in without)  # not written
    for before, after in itertools.pairwise(s for s in found if s.heard or not s.reason):
        assert before.end <= after.start


def test_a_recording_becomes_a_manifest_that_finetune_takes(tmp_path, capsys):
    _, said = talk(3)
    (tmp_path / "talk.txt").write_text("\n".join(text for _, _, text in said))
    out = tmp_path / "out"
    command = [
        str(SAMPLES / "talk.ogg"),
        str(tmp_path / "talk.txt"),
        f"--model={BASE}",
        "--lang=en",
    ]
    short = load_audio(SAMPLES / "talk.ogg", RATE)[: round(said[2][1] * RATE) + 4000]
    soundfile.write(tmp_path / "talk.wav", short, RATE)
    command[0] = str(tmp_path / "talk.wav")
    assert main([*command, "-o", str(out)]) == 0
    assert "left out" in capsys.readouterr().out
    found, bad = read_utterances(out / "manifest.jsonl")
    assert " ".join(u.text for u in found) == " ".join(text for _, _, text in said) and not bad
    assert found[0].lang == "en" and (out / "left_out.jsonl").exists()
    for clip in found:
        assert len(load_audio(clip.audio_path, RATE)) / RATE == pytest.approx(
            clip.duration_s, abs=0.01
        )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output: {tmp_path / 'run'}\nmodel: {{init_from: {BASE}}}\n"
        f"data: {{train: [{out / 'manifest.jsonl'}]}}\nloss: {{heads: ctc}}\n"
        "trainer: {max_steps: 1, threads: 1, device: cpu}\n"
    )
    assert finetune([str(recipe)]) == 0 and (tmp_path / "run" / "model.nemo").exists()
    for wrong in ("--min-score=7", "--min-score=nan", "--max-s=nan", "--pause-s=0"):
        assert main([*command, wrong, "-o", str(out)]) == 2
    assert main([*command, "--min-score=-0.001", "-o", str(out)]) == 1
    assert "nothing fits" in capsys.readouterr().err


class Heard:
    """Stands for a model that hears each of these characters in a tenth of a second."""

    sample_rate, blank_id = RATE, None

    config = types.SimpleNamespace(frame_seconds=0.1)

    def __init__(self, monkeypatch, heard: str, labels: list[str]):
        self.tokenizer = CharTokenizer(labels)
        self.blank_id = len(labels)
        ids = [self.tokenizer.ids.get(char, self.blank_id) for char in heard]

        def frame_losses(model, samples, tokens, head, batch_size, lang):
            best = np.array(ids + [self.blank_id] * (len(samples) // 1600 - len(ids)))
            columns = np.array([*tokens, self.blank_id])
            return np.where(best[:, None] == columns, 0, -8).astype(np.float32), best

        monkeypatch.setattr(segments, "frame_losses", frame_losses)
        voice = np.random.default_rng(0).normal(0, 0.1, len(heard) * 1600 + 3200)
        for i, char in enumerate(heard + "  "):
            voice[i * 1600 : (i + 1) * 1600] *= char != " "
        self.samples = voice.astype(np.float32)


def test_scripts_without_spaces(monkeypatch):
    text = "今日天气很好，我们去公园散步。然后回家吃饭，明天还要上班。所以早点休息吧。"
    labels = sorted(set(text) - set("，。") | set("标题在前面说下结束的话还没到"))
    heard = (
        "  今日天气很好     我们去公园散步     然后回家吃饭     明天还要上班     所以早点休息吧    "
    )
    model = Heard(monkeypatch, heard, labels)
    found = find_segments(model, model.samples, f"标题在前面说一下{text}还没到结束的话", max_s=4.0)
    kept = [s for s in found if not s.reason]
    assert "".join(s.text for s in kept) == text and len(kept) >= 2
    assert all(s.text[-1] in "，。" and s.score > -0.2 for s in kept)
    assert {s.text for s in found if s.reason and s.text} == {"标题在前面说一下", "还没到结束的话"}
    thai = words_of_text("สวัสดีครับ", CharTokenizer(sorted(set("สวัสดีครับ"))))
    assert len(thai) > 3 and sum(len(word.tokens) for word in thai) == 10


def test_one_word_too_many_or_too_few_is_found_by_a_strong_model(monkeypatch):
    lines = [
        "the quick brown fox jumps over",
        "the lazy dog and runs away",
        "into the dark wood again",
    ]
    gap = "      "
    labels = list("abcdefghijklmnopqrstuvwxyz")
    said = f"  {gap.join(lines)}{gap}".replace("lazy dog", "lazy old grey dog")
    model = Heard(monkeypatch, said.replace("dark ", ""), labels)
    found = find_segments(model, model.samples, "\n".join(lines))
    assert [s.text for s in found if not s.reason] == lines[:1]
    reasons = {s.text: s.reason for s in found}
    assert reasons[lines[1]] == "words that the text has not"
    assert reasons[lines[2]] == "words of the text that were not said"


def test_words_are_written_as_the_model_can():
    tokenizer = fastconformer.load_model(BASE).tokenizer
    text = "“Don't!” she said — in 1818:\nBLACK cats."
    words = words_of_text(text, tokenizer)
    assert [tokenizer.decode(list(w.tokens)) for w in words] == [
        *("don't", "she", "said", "in", "black", "cats")
    ]
    assert [text[w.start : w.end] for w in words][2:4] == ["said —", "in 1818:"]
    assert [w.clause for w in words] == [True, False, False, True, False, True]
    assert [w.sentence for w in words] == [True, False, False, True, False, True]


def test_words_are_written_in_their_language():
    """Pieces of the second language have ids behind those of the first."""
    model = read_nemo(golden("hybrid_tdt_ctc_bpe") / "model.nemo").tokenizer_files
    both = AggregateTokenizer(dict.fromkeys(("en", "es"), model["tokenizer.model"]))
    half = both.languages["en"].vocab_size
    tokens = [w.tokens for w in words_of_text("two is it.", both.languages["en"])]
    for lang, first in (("en", 0), ("es", half)):
        found = words_of_text("two is it.", both, lang)
        assert [w.tokens for w in found] == [tuple(first + i for i in ids) for ids in tokens]
    with pytest.raises(ValueError, match="needs its language, one of en, es"):
        words_of_text("two", both)


def test_pauses_are_found_in_noise_and_digital_silence():
    rng = np.random.default_rng(0)
    for floor in (0.0, 1e-4, 3e-3):
        level = np.full(10 * RATE, 0.1)
        level[3 * RATE : 4 * RATE] = level[7 * RATE : round(7.5 * RATE)] = floor
        quiet = quiet_steps((rng.normal(0, 1, len(level)) * level).astype(np.float32), RATE)
        (first, second) = runs(quiet)
        assert np.allclose([*first, *second], [300, 400, 700, 750], atol=4)
    assert not quiet_steps(rng.normal(0, 0.1, RATE).astype(np.float32), RATE).any()


@pytest.mark.slow
def test_a_chapter():
    """13.5 minutes of which base_tiny hears nine words of ten wrong."""
    folder = extra("data", "longform_en")
    lines = (folder / "segments.jsonl").read_text().splitlines()
    samples = load_audio(folder / json.loads(lines[0])["audio_filepath"], RATE)
    said = sentences(samples, lines)
    model = fastconformer.load_model(BASE)
    found = find_segments(model, samples, "\n".join(text for _, _, text in said))
    clips = [s for s in found if not s.reason]
    for clip in clips:
        inside = [text for a, b, text in said if min(b, clip.end) - max(a, clip.start) > 0.25]
        assert clip.text in " ".join(inside)
    kept = sum(len(clip.text.split()) for clip in clips)
    assert kept >= 0.9 * sum(len(text.split()) for _, _, text in said)
