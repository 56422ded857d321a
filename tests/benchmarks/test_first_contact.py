"""The first command on a GPU, run dry; what raises, hangs or dies costs its step alone."""

import json
import os
import time
import xml.etree.ElementTree as ET
from functools import partial

import pytest

from benchmarks import first_contact
from benchmarks.first_contact_steps import STEPS, check, distance, timing


def test_dry_run(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as where a user types it
    out, chart = tmp_path / "out.json", tmp_path / "out.svg"
    status = first_contact.main(["--dry", "--out", str(out), "--plot", str(chart)])
    result = json.loads(out.read_text())
    assert status == 0 and result["failed"] == []
    assert list(result["steps"]) == list(STEPS)
    for name, step in result["steps"].items():
        rows = [step["result"].get(kind) for kind in ("checks", "timings", "facts")]
        assert any(rows), name
    assert len([r for s in result["steps"].values() for r in s["result"].get("checks", ())]) > 30
    ET.fromstring(chart.read_text())
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1])["failed"] == 0 and any("goal 4000" in x for x in printed)


def good(dry, kept):
    kept["runs"] = kept.get("runs", 0) + 1
    return {"facts": {"runs": kept["runs"]}}


def raises(dry, kept):
    check("loss", 0.5, 1.0)
    timing("loss", 2.0, "ms")
    raise RuntimeError("no kernel image\nmore")


def hangs(dry, kept):
    check("loss", 2.0, 1.0)
    time.sleep(60)


def dies(dry, kept):
    timing("loss", 3.0, "ms")
    os._exit(9)


def wrong(dry, kept):
    return {"checks": [check("gradient", float("nan"), 1e-3)]}


def meets(folder, others, dry, kept):
    """Done when the others have come, too."""
    own = folder / str(len(others))
    own.touch()
    until = time.monotonic() + 60
    while not all((folder / str(n)).exists() for n in others):
        assert time.monotonic() < until
        time.sleep(0.01)
    return {"facts": {"came": len(others)}}


def test_each_step_stands_alone(tmp_path):
    steps = {"good": good, "once more": good, "raises": raises, "again": good, "hangs": hangs}
    steps |= {"dies": dies, "wrong": wrong, "after": good}
    out = tmp_path / "out.json"
    result = first_contact.run(steps, {"hangs": 1.0}, True, 100.0, out)
    assert json.dumps(json.loads(out.read_text())) == json.dumps(result)
    runs = {k: v["result"]["facts"]["runs"] for k, v in result["steps"].items() if steps[k] is good}
    assert runs == {"good": 1, "once more": 2, "again": 1, "after": 1}  # a new process after errors
    rows = [result["steps"][name]["result"] for name in ("raises", "hangs", "dies")]
    assert [len(r["checks"]) for r in rows] == [1, 1, 0]  # what was known before them
    assert [len(r["timings"]) for r in rows] == [1, 0, 1]
    assert result["failed"] == [
        "raises: RuntimeError: no kernel image",
        "hangs: not done in 1 s",
        "hangs: loss is 2.0, limit 1.0",
        "dies: its process ended with 9",
        "wrong: gradient is nan, limit 0.001",
    ]
    assert "FAIL gradient" in first_contact.table(result)


def test_checks_run_at_once_and_timings_alone(tmp_path):
    steps = {"check_a": partial(meets, tmp_path, [2]), "check_b": partial(meets, tmp_path, [1, 2])}
    steps |= {"time_a": partial(meets, tmp_path, [])}
    result = first_contact.run(steps, {}, True, 100.0, tmp_path / "out.json", together=2)
    assert not result["failed"] and list(result["steps"]) == list(steps)


def test_time_that_is_over_begins_nothing(tmp_path):
    result = first_contact.run({"good": good}, {}, True, 0.0, tmp_path / "out.json")
    assert result["failed"] == ["good: not begun: 0 s were over"]


def test_usage(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        first_contact.main(["--out", str(tmp_path / "x"), "--only", "machine,nothing"])
    assert stopped.value.code == 2 and "nothing" in capsys.readouterr().err


def test_distance_is_relative_and_sees_nan():
    import torch

    assert distance(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0])) == pytest.approx(0.1)
    assert not check("x", distance(torch.tensor([float("nan")]), torch.ones(1)), 1.0)["ok"]
