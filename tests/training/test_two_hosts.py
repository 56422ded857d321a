"""Two hosts train together as one does, and what is left goes on when one of them is lost."""

import time

import pytest
from conftest import ledger, logged
from hosts import WAIT_S

from training.finetune import main

OPTIONS = [
    "trainer.max_steps=16",
    "trainer.accumulate=2",
    "trainer.val_every_steps=4",
    "trainer.save_every_steps=2",
    "trainer.ema_decay=0.9",
    "data.num_workers=1",
    "model.dropout=0.1",
    "spec_augment.freq_masks=1",
]


def started(hosts, recipe, output) -> list:
    arguments = ["-m", "training.finetune", str(recipe), f"output={output}", *OPTIONS]
    return [host.torchrun(*arguments, n_hosts=len(hosts)) for host in hosts]


def assert_same_losses(run, other):
    pairs = list(zip(logged(run), logged(other), strict=True))
    assert [a["step"] for a, _ in pairs] == list(range(1, 17))
    for a, b in pairs:
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), a["step"]
    assert [line["step"] for line in ledger(run)] == [line["step"] for line in ledger(other)]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_on_two_hosts_survives_the_loss_of_one(hosts, corpus, tmp_path, victim):
    recipe, _ = corpus
    one, two, broken = (tmp_path / name for name in ("one", "two", "broken"))
    assert main([str(recipe), f"output={one}", *OPTIONS]) == 0
    for host, job in zip(hosts, started(hosts, recipe, two), strict=True):
        status, text = host.finish(job)
        assert status == 0, text[-3000:]
    assert_same_losses(two, one)

    jobs = started(hosts, recipe, broken)
    log = broken / "log.jsonl"
    until = time.monotonic() + WAIT_S
    while not log.exists() or log.read_bytes().count(b"\n") < 7:
        assert time.monotonic() < until and all(job.poll() is None for job in jobs)
        time.sleep(0.002)
    hosts[victim].kill()
    left = hosts[1 - victim]
    status, text = left.finish(jobs[1 - victim], wait_s=120)
    assert status == 1 and "the last checkpoint stands" in text and "gloo" not in text, text[-3000:]
    assert len(logged(broken)) < 16
    survivor = type(left)(left.name, left.address, 0, left.address)  # alone, it is the first
    (job,) = started([survivor], recipe, broken)
    status, text = survivor.finish(job)
    assert status == 0 and "resuming after step" in text, text[-3000:]
    assert_same_losses(broken, one)
