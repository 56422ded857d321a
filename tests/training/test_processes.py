"""Two processes over gloo do what one does: the same losses, the same resuming, no waiting."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ledger, logged, make_corpus

from fastconformer import load_model
from training.finetune import main

ROOT = Path(__file__).parents[2]
WAIT_S = 400  # on a busy machine; nothing here may wait for ever
HARD = [  # everything random is on, and steps cross the ends of epochs
    "trainer.max_steps=8",
    "trainer.accumulate=2",
    "trainer.val_every_steps=3",
    "trainer.save_every_steps=2",
    "trainer.keep_last=9",
    "trainer.ema_decay=0.9",
    "optim.name=adamw8bit",
    "data.batch_size=null",
    "data.batch_duration_s=3.5",
    "data.num_workers=2",
    "model.dropout=0.1",
    "loss.omega=0.3",
    "spec_augment.freq_masks=1",
    "spec_augment.time_masks=2",
    "spec_augment.time_width=0.2",
]
JOBS = {
    "hard": HARD,
    "synced": ["trainer.sync_batchnorm=true", "data.batch_size=3", "model.dropout=0"],
    "fsdp": ["trainer.accumulate=2", "trainer.parallel=fsdp", "trainer.ema_decay=0.9"],
    "nan": ["loss.heads=ctc", "trainer.accumulate=2", "data.validation={}"],
    "memory": ["data.batch_size=4", "trainer.accumulate=2", "data.validation={}"],
}


def torchrun(folder: Path, jobs: list[dict]) -> subprocess.Popen:
    path = folder / f"jobs{time.monotonic_ns()}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "tests" / "processes.py"), str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """Waits for its end."""
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All jobs once with two processes ("two_NAME") and once with one ("one_NAME"), and a "broken"
    one that was killed in the middle of an epoch and gone on with."""
    folder = tmp_path_factory.mktemp("processes")
    recipe, _ = make_corpus(folder)

    def job(name: str, options: list[str], trouble=None) -> dict:
        arguments = [str(recipe), f"output={folder / name}", *options]
        return {"arguments": arguments, "trouble": trouble}

    jobs = [
        job(f"two_{name}", options, name if name in ("nan", "memory") else None)
        for name, options in JOBS.items()
    ]
    process = torchrun(folder, [job("broken", HARD)])
    until = time.monotonic() + WAIT_S
    log = folder / "broken" / "log.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None and time.monotonic() < until, "it ended, or waits"
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, workers)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert len(logged(folder / "broken")) < 8
    shutil.copytree(folder / "broken", folder / "broken_one")
    finish(torchrun(folder, [job("broken", HARD), *jobs]))
    for name in ("hard", "synced", "fsdp"):
        assert main(job(f"one_{name}", JOBS[name])["arguments"]) == 0
    assert main(job("broken_one", HARD)["arguments"]) == 0
    return folder


@pytest.mark.parametrize("name", ["hard", "synced", "fsdp"])
def test_two_processes_do_what_one_does(runs, name):
    one, two = logged(runs / f"one_{name}"), logged(runs / f"two_{name}")
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert b["epoch"] == a["epoch"] and b["lr"] == a["lr"]
    assert [entry["step"] for entry in ledger(runs / f"one_{name}")] == [
        entry["step"] for entry in ledger(runs / f"two_{name}")
    ]
    first, second = (load_model(runs / f"{n}_{name}" / "last").state_dict() for n in ("one", "two"))
    for key, value in first.items():  # BatchNorm's statistics are those of one process, too
        if "running_var" in key:
            torch.testing.assert_close(second[key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_two_processes_that_were_killed_go_on_bit_for_bit(runs):
    whole, broken = runs / "two_hard", runs / "broken"
    assert (broken / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    assert ledger(broken) == ledger(whole)
    for name in ("last/model.safetensors", "best/model.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_of_two_processes_goes_on_with_one(runs):
    whole, one = logged(runs / "two_hard"), logged(runs / "broken_one")
    losses = [[record["loss"] for record in records] for records in (whole, one)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_nan_in_one_process_is_a_step_that_both_skip(runs):
    run = runs / "two_nan"
    assert [record["loss"] is None for record in logged(run)] == [False, True, False, False]
    bad = json.loads((run / "nonfinite.jsonl").read_text())
    # rank 1 has the second batch of the step; its clips are named, and only they
    saved = {path.name for path in (run / "nonfinite").iterdir()}
    assert saved == {"step_00000002_batch_0.pt", "step_00000002_batch_1.pt"}
    second = torch.load(run / "nonfinite" / "step_00000002_batch_1.pt", weights_only=True)
    assert [u["line"] for u in second["utterances"]] == [
        int(name.rstrip(")").split(" ")[-1]) for name in bad["utterances"]
    ]
    state = load_model(run / "last").state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())


def test_one_process_without_memory_does_its_share_in_pieces(runs):
    records = logged(runs / "two_memory")
    assert [record["splits"] for record in records] == [2] * 4  # 4 clips, then 2, then 1
    assert records[-1]["loss"] < records[0]["loss"]
