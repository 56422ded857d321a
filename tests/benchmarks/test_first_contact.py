"""The first command on a GPU, run dry; what raises, hangs or dies costs its step alone."""

import json
import os
import time
import xml.etree.ElementTree as ET

import pytest

from benchmarks import first_contact
from benchmarks.first_contact_steps import STEPS, check, distance


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
    raise RuntimeError("no kernel image\nmore")


def hangs(dry, kept):
    time.sleep(60)


def dies(dry, kept):
    os._exit(9)


def wrong(dry, kept):
    return {"checks": [check("gradient", float("nan"), 1e-3)]}


def test_each_step_stands_alone(tmp_path):
    steps = {"good": good, "raises": raises, "again": good, "hangs": hangs, "dies": dies}
    steps |= {"wrong": wrong, "after": good}
    out = tmp_path / "out.json"
    result = first_contact.run(steps, {"hangs": 1.0}, True, 100.0, out)
    assert json.dumps(json.loads(out.read_text())) == json.dumps(result)
    runs = {k: v["result"]["facts"]["runs"] for k, v in result["steps"].items() if steps[k] is good}
    assert runs == {"good": 1, "again": 2, "after": 1}  # a new process after one that was lost
    assert result["failed"] == [
        "raises: RuntimeError: no kernel image",
        "hangs: not done in 1 s",
        "dies: its process ended with 9",
        "wrong: gradient is nan, limit 0.001",
    ]
    assert "FAIL gradient" in first_contact.table(result)


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
