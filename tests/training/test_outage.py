"""Data that goes away: for a moment, for longer, for good."""

import json
import threading

import numpy as np
import pytest
import soundfile
import torch

import training.loop.train
from fastconformer import load_model
from training.data.store import AudioStore, StorageGone
from training.data.utterances import Utterance, read_utterances
from training.finetune import main

RATE = 16000


def clips(folder, count: int) -> list[Utterance]:
    folder.mkdir()
    found = []
    for i in range(count):
        samples = np.random.default_rng(i).integers(-3000, 3000, RATE // 10).astype(np.int16)
        soundfile.write(folder / f"{i}.wav", samples, RATE)
        found.append(Utterance(str(folder / f"{i}.wav"), "a", 0.1, None, "m.jsonl", i + 1))
    return found


def test_a_file_that_comes_back_is_read(tmp_path):
    there, away = tmp_path / "there", tmp_path / "away"
    store = AudioStore(clips(there, 3), RATE, cache_gb=0.0, retry=3)
    expected = store.samples(1)
    there.rename(away)
    threading.Timer(0.7, away.rename, [there]).start()
    assert np.array_equal(store.samples(1), expected)
    assert store.n_unusable == 0


def test_what_was_not_reached_is_tried_in_the_next_epoch(tmp_path):
    store = AudioStore(clips(tmp_path / "a", 3), RATE, cache_gb=0.0, retry=0)
    path = tmp_path / "a" / "1.wav"
    path.rename(tmp_path / "1.wav")
    assert store.samples(1, epoch=4) is None
    (tmp_path / "1.wav").rename(path)
    assert store.samples(1, epoch=4) is None  # an epoch is the same however it is read
    assert store.samples(1, epoch=5) is not None and store.n_unusable == 0
    # what is damaged stays so, and is not waited for
    path.write_bytes(b"RIFF of nothing")
    patient = AudioStore(store.utterances, RATE, cache_gb=0.0, retry=60)
    assert patient.samples(1, epoch=0) is None and patient.n_unusable == 1


def test_many_in_a_row_are_no_accident(tmp_path):
    store = AudioStore(clips(tmp_path / "a", 20), RATE, cache_gb=0.0, retry=0)
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(StorageGone, match="cannot be reached any more"):
        for index in range(20):
            store.samples(index, epoch=0)


def at_step(number: int, do, monkeypatch):
    """Calls `do` before the step of this number."""
    step, calls = training.loop.train.take_step, []

    def taken(*arguments):
        calls.append(1)
        if len(calls) == number:
            do()
        return step(*arguments)

    monkeypatch.setattr(training.loop.train, "take_step", taken)


@pytest.fixture
def far(corpus):
    """A recipe over the corpus's clips in a folder of their own, read at every step."""
    recipe, run = corpus
    folder = recipe.parent / "clips"
    folder.mkdir()
    for name in ("train.jsonl", "dev.jsonl"):
        lines = [json.loads(line) for line in (recipe.parent / name).open()]
        for line in lines:
            path = recipe.parent / line["audio_filepath"]
            if path.exists():
                path.rename(folder / path.name)
            line["audio_filepath"] = f"clips/{path.name}"
        (recipe.parent / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["data.cache_gb=0", "data.num_workers=0", "trainer.max_steps=8"]
    return [str(recipe), *options, "trainer.val_every_steps=8"], run, folder


def losses(run) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").open()]


def test_a_run_over_a_hiccup_is_the_undisturbed_one(far, monkeypatch):
    command, run, folder = far
    assert main([*command, f"output={run}_calm"]) == 0
    away = folder.with_name("away")

    def hiccup():
        folder.rename(away)
        threading.Timer(1.0, away.rename, [folder]).start()

    at_step(2, hiccup, monkeypatch)
    assert main(command) == 0
    assert losses(run) == losses(run.with_name("run_calm"))
    models = (load_model(path / "last").state_dict() for path in (run, run.with_name("run_calm")))
    one, other = models
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_a_run_whose_storage_is_gone_stops_with_a_checkpoint(far, monkeypatch, capsys):
    command, run, folder = far
    assert main([*command, f"output={run}_calm"]) == 0
    away = folder.with_name("away")
    with monkeypatch.context() as patched:
        at_step(3, lambda: folder.rename(away), patched)
        assert main([*command, "data.retry=0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the data cannot be reached any more: ")
    assert "the same command goes on from there" in error and error.count("\n") == 1
    away.rename(folder)
    assert main(command) == 0
    done = losses(run)
    assert len(done) == 8 and done[:3] == losses(run.with_name("run_calm"))[:3]


# --- lines that are no lines --------------------------------------------------------------------


def test_odd_numbers_and_half_characters_are_bad_lines(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1600), RATE)
    good = '{"audio_filepath": "a.wav", "duration": 0.1, "text": "a"}'
    lines = [good.replace("0.1", "1" * 400), good.replace("0.1", "9" * 5000)]
    lines += [good.replace("0.1", "1e400"), good.replace('"a"}', '"a\\ud83d b"}'), good]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(lines))
    found, bad = read_utterances(path)
    assert [u.line for u in found] == [5]
    reasons = ["bad_duration", "not_json", "bad_duration", "bad_text"]
    assert [d.reason for d in bad] == reasons and all(len(d.detail) < 300 for d in bad)


def test_junk_is_no_manifest(tmp_path):
    path = tmp_path / "song.mp3"
    path.write_bytes(np.random.default_rng(0).integers(0, 255, 1 << 20).astype(np.uint8).tobytes())
    with pytest.raises(ValueError, match="is no manifest: none of its first 1000 lines"):
        read_utterances(path)
