"""One thread that owns the model: requests that wait are transcribed together.

Samples come in, `Transcript`s go out. A request waits in a line of bounded length; the thread takes
the oldest and, with it, all others in the line that ask for the same options, up to a batch. A
request that is given up before its turn leaves the line at once.
"""

import collections
import concurrent.futures
import threading
import time
from dataclasses import dataclass, field

import numpy as np

from ..recordings.transcript import Transcript


class Full(Exception):
    """The line is full; `retry_after_s` says when it may have room."""

    def __init__(self, retry_after_s: int):
        super().__init__("the server is busy")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class _Job:
    samples: np.ndarray
    options: dict
    done: concurrent.futures.Future = field(default_factory=concurrent.futures.Future)


class Batcher:
    """Transcribes what is submitted, in batches, on one thread.

    Args:
        model: an `ASRModel` or another model with `transcribe` and `sample_rate`.
        batch_size: most requests a pass.
        max_queue: most requests that wait; those being transcribed are not counted.
    """

    def __init__(self, model, batch_size: int = 16, max_queue: int = 64):
        self.model, self.batch_size, self.max_queue = model, batch_size, max_queue
        self.batches = 0  # passes so far
        self.audio_s = self.busy_s = 0.0  # transcribed so far, and the time it took
        self._waiting: collections.deque[_Job] = collections.deque()
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        with self._change:
            return len(self._waiting)

    def submit(self, samples: np.ndarray, options: dict) -> concurrent.futures.Future:
        """Puts samples (L,) into the line. The future gives their Transcript, or raises what the
        model raised for them; `cancel()` takes them out again. Full: the line is full."""
        job = _Job(samples, options)
        with self._change:
            if self._closed:
                raise Full(1)
            if len(self._waiting) >= self.max_queue:
                raise Full(self._seconds_to_wait())
            self._waiting.append(job)
            self._change.notify()
        job.done.add_done_callback(lambda done: done.cancelled() and self._remove(job))
        return job.done

    def close(self) -> None:
        """Finishes what was accepted, and ends the thread."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()

    def _seconds_to_wait(self) -> int:
        if not self.audio_s:
            return 1
        waiting_s = sum(len(job.samples) for job in self._waiting) / self.model.sample_rate
        return max(1, round(waiting_s * self.busy_s / self.audio_s))

    def _remove(self, job: _Job) -> None:
        with self._change:
            if job in self._waiting:
                self._waiting.remove(job)

    def _take(self) -> list[_Job]:
        """The oldest request and those that can go with it; empty when all is done."""
        with self._change:
            while not self._waiting and not self._closed:
                self._change.wait()
            batch: list[_Job] = []
            for job in list(self._waiting):
                if len(batch) == self.batch_size:
                    break
                if not batch or job.options == batch[0].options:
                    self._waiting.remove(job)
                    if job.done.set_running_or_notify_cancel():
                        batch.append(job)
            return batch

    def _work(self) -> None:
        while True:
            batch = self._take()
            if batch:
                began = time.monotonic()
                self._transcribe(batch)
                self.busy_s += time.monotonic() - began
                self.batches += 1
            elif self._closed and not self.waiting:
                return

    def _transcribe(self, batch: list[_Job]) -> None:
        try:
            samples = [job.samples for job in batch]
            found: list[Transcript] = self.model.transcribe(
                samples, batch_size=len(batch), **batch[0].options
            )
        except Exception as error:  # handed to whoever waits; alone, where it may be one's fault
            if len(batch) == 1:
                batch[0].done.set_exception(error)
            else:
                for job in batch:
                    self._transcribe([job])
            return
        self.audio_s += sum(transcript.duration for transcript in found)
        for job, transcript in zip(batch, found, strict=True):
            job.done.set_result(transcript)
