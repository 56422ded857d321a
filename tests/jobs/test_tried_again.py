"""Clips whose batch did not fit into memory, tried again when what filled it is gone."""

import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from fastconformer.formats.manifest import Clip
from fastconformer.jobs.rounds import Read, _transcribe_round
from fastconformer.serving.batcher import Batcher, _Job


class Small:
    """A model that takes one clip at a time; `alive`: at each call, how much of what the calls
    before it made is still there."""

    sample_rate = 16000

    def __init__(self):
        self.made, self.alive = [], []

    def head(self, name):
        return SimpleNamespace(slots_of=lambda others: {})

    def transcribe(self, samples, **options):
        return [text for _, text in self.transcribe_each(samples, **options)]

    def transcribe_each(self, samples, **options):
        self.alive.append(sum(reference() is not None for reference in self.made))
        large = np.zeros(9)
        self.made.append(weakref.ref(large))
        if len(samples) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        yield 0, SimpleNamespace(text="text", duration=1.0)


def test_in_a_job():
    model, found = Small(), {}
    reads = [Read(Clip(Path("a.wav"), "a.wav"), np.zeros(9), "") for _ in range(4)]
    for part in _transcribe_round(model, reads, 2, {}):
        found |= part
    assert [found[i].transcript.text for i in range(4)] == ["text"] * 4
    assert model.alive == [0] * 7  # all together, two batches, four clips


def test_in_the_server():
    model = Small()
    batcher = Batcher(model)
    jobs = [_Job(np.zeros(9), {}) for _ in range(2)]
    batcher._transcribe(jobs)
    assert [job.done.result().text for job in jobs] == ["text"] * 2
    assert model.alive == [0] * 3
    batcher.close()
