"""One thread that owns the model: requests that wait are transcribed together.

Samples come in, `Transcript`s go out. A request waits in a line of bounded length; the thread takes
the oldest and, with it, all others in the line that ask for the same options, up to a batch. A
request that is given up before its turn leaves the line at once. Live streams go first, all that
have something new together.
"""

import collections
import concurrent.futures
import threading
import time
from dataclasses import dataclass, field

import numpy as np

from ..recordings.stream import Stream, WindowStream
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


@dataclass(eq=False)
class _Feed:
    stream: Stream | WindowStream
    samples: np.ndarray | None  # None: the stream's end
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
        self._feeds: list[_Feed] = []
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

    def feed(self, stream, samples: np.ndarray | None) -> concurrent.futures.Future:
        """Samples for a live stream: the future gives its `Partial`; None: its end, and the future
        gives its Transcript. Feeds of one stream are taken in their order."""
        feed = _Feed(stream, samples)
        with self._change:
            if self._closed:
                raise Full(1)
            self._feeds.append(feed)
            self._change.notify()
        return feed.done

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

    def _take(self) -> tuple[list[_Feed], list[_Job]]:
        """All feeds, or the oldest request and those that can go with it; nothing at the end."""
        with self._change:
            while not (self._waiting or self._feeds or self._closed):
                self._change.wait()
            if self._feeds:
                feeds, self._feeds = self._feeds, []
                return feeds, []
            batch: list[_Job] = []
            for job in list(self._waiting):
                if len(batch) == self.batch_size:
                    break
                if not batch or job.options == batch[0].options:
                    self._waiting.remove(job)
                    if job.done.set_running_or_notify_cancel():
                        batch.append(job)
            return [], batch

    def _work(self) -> None:
        while True:
            feeds, batch = self._take()
            if not (feeds or batch or self.waiting) and self._closed:
                return
            began = time.monotonic()
            if feeds:
                self._hear(feeds)
            if batch:
                self._transcribe(batch)
                self.batches += 1
            self.busy_s += time.monotonic() - began

    def _hear(self, feeds: list[_Feed]) -> None:
        """Advances the streams together; one that fails is the fault of its own samples."""
        streams = []
        for feed in feeds:
            try:
                if feed.samples is not None:
                    feed.stream.take(feed.samples)
                    self.audio_s += len(feed.samples) / self.model.sample_rate
            except ValueError as error:
                feed.done.set_exception(error)
                continue
            if feed.stream not in streams:
                streams.append(feed.stream)
        try:
            if streams:
                streams[0].together(streams)
            for feed in feeds:
                if not feed.done.done():
                    ends = feed.samples is None
                    feed.done.set_result(feed.stream.finish() if ends else feed.stream.partial())
        except Exception as error:  # whoever waits is told, and the thread goes on
            for feed in feeds:
                if not feed.done.done():
                    feed.done.set_exception(error)

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
