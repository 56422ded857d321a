"""An archive job: read ahead in order, killed and started again, shared by processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from fastconformer import transcribe
from fastconformer.formats.inputs import find_clips
from fastconformer.jobs.results import all_results, merge_results, read_results
from fastconformer.jobs.rounds import read_ahead

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "models" / "base_tiny.nemo"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    rng = np.random.default_rng(0)
    for i in range(40):
        samples = 0.1 * rng.standard_normal(8000 + 400 * i)
        soundfile.write(folder / f"{i:02d}.wav", samples, 16000)
    (folder / "torn.wav").write_bytes(b"RIFF")
    return folder


def command(archive, out, *more):
    arguments = [str(archive), "--model", str(BASE), "--format", "jsonl", "-o", str(out)]
    return [
        sys.executable,
        "-m",
        "fastconformer.transcribe",
        *arguments,
        "--batch-size",
        "1",
        *more,
    ]


def names(out: Path) -> list[str]:
    return [Path(json.loads(line)["path"]).name for line in out.read_text().splitlines()]


def said(out: Path) -> list[tuple]:
    """Scores left out: their last digits depend on the number of threads."""
    results = map(json.loads, out.read_text().splitlines())
    return [(r["path"], r["text"], r["tokens"], r["token_frames"]) for r in results]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 12), st.integers(1, 4))
def test_reading_ahead_keeps_order_and_rounds(items, limit, workers):
    rounds = list(read_ahead(items, lambda i: i * 2, lambda r: sum(r) >= limit, workers))
    assert [i for r in rounds for i in r] == [i * 2 for i in items]
    assert all(sum(r) >= limit for r in rounds[:-1]) and all(sum(r[:-1]) < limit for r in rounds)


def test_reading_ahead_passes_errors_on_and_stops_early():
    def read(i):
        if i == 5:
            raise OSError("disk gone")
        return i

    with pytest.raises(OSError, match="disk gone"):
        list(read_ahead(range(9), read, lambda r: True))
    taken = []
    rounds = read_ahead(iter(lambda: taken.append(0) or 1, None), lambda i: i, lambda r: True)
    assert next(rounds) == [1]
    rounds.close()  # an endless source: its reader ends with the consumer
    count = len(taken)
    time.sleep(0.3)
    assert len(taken) == count < 40


def test_a_killed_job_goes_on_where_it_was(archive, tmp_path):
    """Killed at random moments until it ends: every file exactly once, the text of one run."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert transcribe.main(command(archive, whole)[3:]) == 1  # torn.wav
    rng = random.Random(0)
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(command(archive, out), cwd=ROOT, stderr=subprocess.DEVNULL)
        n_lines = out.read_bytes().count(b"\n") if out.exists() else 0
        wanted = n_lines + rng.randint(1, 12)
        while process.poll() is None:
            if out.exists() and out.read_bytes().count(b"\n") >= wanted:
                process.send_signal(signal.SIGKILL)
                kills += 1
            time.sleep(0.002)
        with open(out, "ab") as file:  # as if killed in the middle of a line
            file.write(b'{"audio": "00.w')
    assert kills >= 2
    assert transcribe.main(command(archive, out)[3:]) == 1
    assert names(out) == [f"{i:02d}.wav" for i in range(40)]
    assert said(out) == said(whole)


def test_processes_share_the_clips(archive, tmp_path, capsys):
    alone, out = tmp_path / "alone.jsonl", tmp_path / "out.jsonl"
    transcribe.main(command(archive, alone)[3:])
    part = tmp_path / "out.jsonl.part-1-of-3"  # left by an earlier, killed run of three
    lines = alone.read_text().splitlines(keepends=True)
    part.write_text(lines[7] + lines[30])
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run += command(archive, out)[1:]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert out.exists(), done.stderr
    assert said(out) == said(alone)
    assert not list(tmp_path.glob("*.part-*"))


def test_several_processes_need_a_file(archive, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert transcribe.main([str(archive), "--model", str(BASE)]) == 2
    assert "several processes need --format jsonl and -o FILE" in capsys.readouterr().err


def test_a_file_that_is_no_result_is_left_alone(archive, tmp_path, capsys):
    out = tmp_path / "notes.jsonl"
    out.write_text('{"audio_filepath": "a.wav"}\n')
    assert transcribe.main(command(archive, out)[3:]) == 1
    assert "notes.jsonl, line 1, is not a result" in capsys.readouterr().err
    assert out.read_text() == '{"audio_filepath": "a.wav"}\n'


def test_results_of_parts_are_merged_in_order(tmp_path):
    out = tmp_path / "out.jsonl"

    def line(path):
        return json.dumps({"path": path, "text": path}) + "\n"

    out.write_text(line("c"))
    (tmp_path / "out.jsonl.part-0-of-2").write_text(line("a") + line("old"))
    (tmp_path / "out.jsonl.part-1-of-2").write_text(line("b") + '{"path"')
    assert len(all_results(out)) == 4
    keys = [(name, None, None) for name in "abcd"]
    assert merge_results(out, keys) == 4
    assert [key[0] for key in read_results(out)] == ["a", "b", "c", "old"]


def test_globs_and_stdin(archive, monkeypatch, capsys):
    found = find_clips([str(archive / "0[0-3].wav"), str(archive / "x*.wav")])
    assert [clip.path.name for clip in found.clips] == ["00.wav", "01.wav", "02.wav", "03.wav"]
    assert found.problems == [(str(archive / "x*.wav"), "no file is named like this")]
    monkeypatch.setattr("sys.stdin", [str(archive / "05.wav") + "\n", "\n"])
    found = find_clips(["-"])
    assert [clip.path.name for clip in found.clips] == ["05.wav"] and not found.problems
