"""The speed benchmark on a tiny model: what it writes, what a worker's end says, and bad usage."""

import json
import sys

import pytest
import torch
from conftest import SAMPLES, golden

from benchmarks.random_model import cut_clips
from benchmarks.rtfx import main
from benchmarks.workers import Worker, WorkerFailed

MODEL = str(golden("hybrid_tdt_ctc_bpe") / "model.nemo")
ONCE = ["--rounds", "1", "--batch-sizes", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads():
    """The command sets their number; the tests that follow keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_numbers_of_a_manifest(tmp_path, capsys):
    """With no recording at hand: the benchmark's own is for those who name no clips."""
    manifest, out = tmp_path / "m.jsonl", tmp_path / "new" / "out.json"
    line = {"audio_filepath": str(SAMPLES / "sentence.wav"), "text": "sunday is the best part"}
    manifest.write_text(json.dumps(line) + "\n")
    arguments = ["--model", MODEL, "--manifest", str(manifest), "--out", str(out), *ONCE]
    assert main(arguments) == 0
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert row["wer"] > 0 and row["rtfx_memory"] > 0 and row["rtfx_files"] > 0
    assert row["peak_mib"] > 100 and result["versions"]["torch"] == torch.__version__
    assert "RTFx" in capsys.readouterr().out
    assert main([*arguments, "--head", "rnnt"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rtfx: ours:float32 failed: ") and line.endswith("has tdt, ctc")


def test_numbers_of_a_recording_published_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    audio = ["--audio", str(SAMPLES / "jfk.flac"), "--clip-count", "3", "--longest", "6"]
    arguments = ["--model", MODEL, *audio, *ONCE]
    assert main(arguments) == 0
    (row,) = json.loads((tmp_path / "runs" / "benchmarks" / "rtfx.json").read_text())["rows"]
    assert row["rtfx_memory"] > 0 and "wer" not in row


def test_clips_of_a_recording_that_is_too_short():
    clips = cut_clips(SAMPLES / "sentence.wav", 4, 1.0, 4.0)
    assert [round(len(c) / 16000, 2) for c in clips] == [1.0, 2.0, 2.6, 2.6]


def test_a_worker_that_ends(tmp_path):
    with pytest.raises(WorkerFailed, match="^nobody failed: no-such-python: No such file"):
        Worker("nobody", "no-such-python", "this", [], 1)
    worker = Worker("zen", sys.executable, "no_such_module", [], 1)
    with pytest.raises(WorkerFailed, match="^zen failed: .*No module named no_such_module$"):
        worker.answer()
    with pytest.raises(WorkerFailed):
        worker.ask("memory", 1)
    worker.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: --model"),
        (["--model", MODEL, "--audio", "no-such.wav"], "name a recording with --audio"),
        (["--model", MODEL, "--audio", MODEL, "--threads", "0"], "are at least 1"),
        (["--model", MODEL, "--audio", MODEL, "--batch-sizes", "0"], "are at least 1"),
        (["--model", MODEL, "--audio", MODEL, "--manifest", MODEL], "two ways"),
        (["--model", MODEL, "--peer", "onnx-asr=python"], "need --peer nemo="),
    ],
)
def test_bad_usage(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err
