"""Two hosts share one archive through torchrun, and one of them is killed."""

import json
import time
from pathlib import Path

import pytest
from conftest import SAMPLES
from hosts import WAIT_S

from fastconformer import transcribe

BASE = Path(__file__).resolve().parents[2] / "models" / "base_tiny.nemo"


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")]


def said(out: Path) -> list[tuple]:
    results = [line for line in lines_of(out) if "error" not in line]
    return [(line["path"], line["text"], line["tokens"], line["token_frames"]) for line in results]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_two_hosts_share_an_archive_and_one_is_killed(hosts, tmp_path, victim):
    """What both had done stays; the host that is left says why it ends; the same command, on both
    or on one, does what is left: each file once, and what failed is tried once more."""
    archive = tmp_path / "archive"
    for number in range(6):
        folder = archive / str(number)
        folder.mkdir(parents=True)
        for clip in sorted((SAMPLES / "english").iterdir()):
            (folder / clip.name).write_bytes(clip.read_bytes())
    (archive / "torn.wav").write_bytes(b"RIFF")
    alone, out = tmp_path / "alone.jsonl", tmp_path / "out.jsonl"
    arguments = [str(archive), "--model", str(BASE), "--batch-size", "1", "-o"]
    assert transcribe.main([*arguments, str(alone)]) == 1  # torn.wav

    jobs = [h.torchrun("-m", "fastconformer.transcribe", *arguments, str(out)) for h in hosts]
    parts = [out.with_name(f"out.jsonl.part-{rank}-of-2") for rank in (0, 1)]
    until = time.monotonic() + WAIT_S
    while not all(part.exists() and part.read_bytes().count(b"\n") > 5 for part in parts):
        assert time.monotonic() < until and all(job.poll() is None for job in jobs)
        time.sleep(0.01)
    hosts[victim].kill()
    kept = said(parts[victim])
    other = hosts[1 - victim]
    status, text = other.finish(jobs[1 - victim])
    assert status == 1 and "another process of this job ended early" in text
    assert "gloo/transport" not in text
    whole = (len(said(alone)) + 1) // 2
    assert 5 < len(kept) < whole - 1 <= len(said(parts[1 - victim]))

    again = [h.torchrun("-m", "fastconformer.transcribe", *arguments, str(out)) for h in hosts]
    for host, job in zip(hosts, again, strict=True):
        status, text = host.finish(job)
        assert status == 1 and "ended early" not in text
    assert said(out) == said(alone) and len(lines_of(out)) == len(lines_of(alone))
    assert "damaged" in lines_of(out)[-1]["error"]
    assert not list(tmp_path.glob("*.part-*"))
