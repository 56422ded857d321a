"""An archive job: read ahead in order, killed and started again, shared by processes."""

import io
import json
import os
import random
import re
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

from fastconformer import load_model, transcribe
from fastconformer.formats.inputs import find_clips
from fastconformer.jobs.results import all_results, merge_results, read_results
from fastconformer.jobs.rounds import read_ahead, transcribe_clips

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


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def names(out: Path) -> list[str]:
    return [Path(result["path"]).name for result in lines_of(out)]


def said(out: Path) -> list[tuple]:
    """Scores left out: their last digits depend on the number of threads."""
    results = [result for result in lines_of(out) if "error" not in result]
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
    assert names(out) == [f"{i:02d}.wav" for i in range(40)] + ["torn.wav"]
    assert "damaged" in lines_of(out)[-1]["error"]
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


def test_a_line_says_what_made_it_and_another_start_must_agree(archive, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    inputs = [str(archive / "00.wav"), str(archive / "01.wav")]
    base = ["--model", str(BASE), "--format", "jsonl", "-o", str(out)]
    assert transcribe.main([inputs[0], *base]) == 0
    (line,) = lines_of(out)
    assert line["model"] == str(BASE) and line["head"] == "tdt" and len(line["model_id"]) == 12
    assert line["options"]["beam"] == 1
    before = out.read_text()
    for other in (["--head", "ctc"], ["--beam", "2"], ["--timestamps"]):
        assert transcribe.main([*inputs, *base, *other]) == 1
        assert "name another file with -o" in capsys.readouterr().err
        assert out.read_text() == before
    assert transcribe.main([*inputs, *base, "--batch-size", "3"]) == 0
    assert names(out) == ["00.wav", "01.wav"]


def test_what_failed_is_tried_again(archive, tmp_path, capsys):
    clip, out = tmp_path / "clip.wav", tmp_path / "out.jsonl"
    clip.write_bytes(b"RIFF")
    arguments = [str(tmp_path), "--model", str(BASE), "-o", str(out)]
    assert transcribe.main(arguments) == 1
    assert "damaged" in lines_of(out)[0]["error"] and "text" not in lines_of(out)[0]
    clip.write_bytes((archive / "00.wav").read_bytes())
    assert transcribe.main(arguments) == 0
    assert len(lines_of(out)) == 1 and "text" in lines_of(out)[0]
    capsys.readouterr()
    assert transcribe.main(arguments) == 0
    assert "1 of 1 clips are in" in capsys.readouterr().err and len(lines_of(out)) == 1


def test_a_second_process_on_the_same_output_is_refused(archive, tmp_path):
    out = tmp_path / "out.jsonl"
    first = subprocess.Popen(command(archive, out), cwd=ROOT, stderr=subprocess.DEVNULL)
    while first.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    second = subprocess.run(command(archive, out), cwd=ROOT, capture_output=True, text=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.returncode == 1 and second.stderr.count("\n") == 1
    assert "another process is writing it" in second.stderr
    assert transcribe.main(command(archive, out)[3:]) == 1  # torn.wav; the lock went with the first
    assert len(names(out)) == 41


def test_lines_come_as_clips_are_done(archive, tmp_path):
    """The first is there long before the last: rounds begin with a batch."""
    model = load_model(BASE)
    clips = find_clips([str(archive)]).clips
    seen = []
    results = transcribe_clips(model, (seen.append(c) or c for c in clips), batch_size=1, workers=1)
    next(results)
    assert len(seen) < 12
    results.close()


def test_channels_of_a_job(tmp_path, capsys):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "call.wav", 0.1 * rng.standard_normal((16000, 2)), 16000)
    out = tmp_path / "out.jsonl"
    arguments = [str(tmp_path / "call.wav"), "--model", str(BASE), "--channels", "each"]
    assert transcribe.main([*arguments, "-o", str(out)]) == 0
    assert [(r["channel"], r["n_channels"]) for r in lines_of(out)] == [(0, 2), (1, 2)]
    whole = out.read_text()
    out.write_text(whole.splitlines(keepends=True)[1])  # killed between the two
    assert transcribe.main([*arguments, "-o", str(out)]) == 0
    assert [r["channel"] for r in lines_of(out)] == [0, 1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("to_file", [True, False])
def test_progress_within_a_long_recording(tmp_path, monkeypatch, to_file):
    """On a terminal alone, and never on the line of a message or of a text."""
    clip, torn = ROOT / "samples" / "jfk.flac", tmp_path / "torn.wav"
    torn.write_bytes(b"RIFF")
    arguments = [str(clip), str(torn), "--model", str(BASE), "--batch-size", "1"]
    arguments += ["--long", "chunks", "--window-s", "2"]
    arguments += ["-o", str(tmp_path / "out.jsonl")] if to_file else []
    shared = Terminal()  # of both, as where neither is redirected
    monkeypatch.setattr("sys.stderr", shared)
    monkeypatch.setattr("sys.stdout", shared)
    monkeypatch.setattr("fastconformer.jobs.results.EVERY_S", -1.0)
    assert transcribe.main(arguments) == 1
    monkeypatch.undo()
    lines = [line.split("\r\033[K")[-1] for line in shared.getvalue().split("\n")]
    ended = ["transcribe: ", "transcribe: 1/2 clips, 0.00 h"] if to_file else [str(clip)]
    ended = [f"transcribe: {torn}", *ended, "transcribe: 1 of 2 inputs failed", ""]
    for line in lines:
        assert not line or any(line.startswith(start) for start in ended if start), line
    told = re.findall(r"0/2 clips,[^\r]* (\d+)% of the next 0.2 min", shared.getvalue())
    assert len(told) >= 4 and sorted(told, key=int) == told and int(told[-1]) < 100
