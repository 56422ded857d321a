"""The threads that own the model: requests that wait are transcribed together, streams are heard.

Samples come in, `Transcript`s go out. A request waits in a line of bounded length; the thread for
files takes the oldest and, with it, all others in the line that ask for the same options, up to a
batch; a long recording whose text is told as it comes goes alone, window by window. A request that
is given up before its turn leaves the line at once. Live streams have a
thread of their own, so that none waits for a long file; all that have something new go together.
"""

import collections
import concurrent.futures
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..recordings.in_windows import transcribe_in_windows
from ..recordings.stream import Stream, WindowStream
from ..recordings.transcript import Transcript

NICE = 5  # of the thread for files, beside the process's own


class Full(Exception):
    """The line is full; `retry_after_s` says when it may have room."""

    def __init__(self, retry_after_s: int):
        super().__init__("the server is busy")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class _Job:
    samples: np.ndarray
    options: dict
    tell: Callable[[str], None] | None = None  # the text so far, window by window
    done: concurrent.futures.Future = field(default_factory=concurrent.futures.Future)


@dataclass(eq=False)
class _Feed:
    stream: Stream | WindowStream
    samples: np.ndarray | None  # None: the stream's end
    done: concurrent.futures.Future = field(default_factory=concurrent.futures.Future)


class Batcher:
    """Transcribes what is submitted, in batches on one thread, and feeds streams on another.

    Args:
        model: an `ASRModel` or another model with `transcribe` and `sample_rate`.
        batch_size: most requests a pass.
        max_queue: most requests that wait; those being transcribed are not counted.
        max_audio_s: most audio that waits, unless it is one request's.
    """

    def __init__(
        self, model, batch_size: int = 16, max_queue: int = 64, max_audio_s: float = math.inf
    ):
        self.model, self.batch_size = model, batch_size
        self.max_queue, self.max_audio_s = max_queue, max_audio_s
        self.batches = 0  # passes so far
        self.audio_s = {"files": 0.0, "streams": 0.0}  # heard so far, and the time it took
        self.busy_s = {"files": 0.0, "streams": 0.0}
        self._waiting: collections.deque[_Job] = collections.deque()
        self._feeds: list[_Feed] = []
        self._change = threading.Condition()  # its lock may be taken again
        self._closed = False
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("files", self._work_on_files), ("streams", self._work_on_streams))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        with self._change:
            return len(self._waiting)

    def submit(
        self, samples: np.ndarray, options: dict, tell: Callable[[str], None] | None = None
    ) -> concurrent.futures.Future:
        """Puts samples (L,) into the line. The future gives their Transcript, or raises what the
        model raised for them; `cancel()` takes them out again. Full: the line is full. `tell`: as
        in `transcribe_in_windows`, on the files' thread; the options are its own then.
        """
        job = _Job(samples, options, tell)
        with self._change:
            if self._closed:
                raise Full(1)
            audio_s = self._waiting_s() + len(samples) / self.model.sample_rate
            too_much = self._waiting and audio_s > self.max_audio_s
            if len(self._waiting) >= self.max_queue or too_much:
                raise Full(self.seconds_to_wait())
            self._waiting.append(job)
            self._change.notify_all()
        # by the future and not the job: it would hold itself, and its samples with it
        job.done.add_done_callback(self._leave)
        return job.done

    def feed(self, stream, samples: np.ndarray | None) -> concurrent.futures.Future:
        """Samples for a live stream: the future gives its `Partial`; None: its end, and the future
        gives its Transcript. Feeds of one stream are taken in their order."""
        feed = _Feed(stream, samples)
        with self._change:
            if self._closed:
                raise Full(1)
            self._feeds.append(feed)
            self._change.notify_all()
        return feed.done

    def close(self) -> None:
        """Finishes what was accepted, and ends the threads."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def seconds_to_wait(self) -> int:
        """How long the line may take, at least 1: for Retry-After."""
        with self._change:
            waiting_s, heard_s = self._waiting_s(), self.audio_s["files"]
        return max(1, round(waiting_s * self.busy_s["files"] / heard_s)) if heard_s else 1

    def _waiting_s(self) -> float:
        return sum(len(job.samples) for job in self._waiting) / self.model.sample_rate

    def _leave(self, done: concurrent.futures.Future) -> None:
        """Takes a request that was given up out of the line."""
        if done.cancelled():
            with self._change:
                given_up = [job for job in self._waiting if job.done is done]
                for job in given_up:
                    self._waiting.remove(job)

    def _take(self) -> list[_Job]:
        """The oldest request and those that can go with it; none once closed and all is done."""
        with self._change:
            while not (self._waiting or self._closed):
                self._change.wait()
            batch: list[_Job] = []
            for job in list(self._waiting):
                if len(batch) == self.batch_size:
                    break
                alone = batch and (batch[0].tell or job.tell)
                if not batch or (not alone and job.options == batch[0].options):
                    self._waiting.remove(job)
                    if job.done.set_running_or_notify_cancel():
                        batch.append(job)
            return batch

    def _work_on_files(self) -> None:
        if sys.platform == "linux":  # where threads have a priority each: streams go first
            own = threading.get_native_id()
            nice = min(19, os.getpriority(os.PRIO_PROCESS, own) + NICE)
            os.setpriority(os.PRIO_PROCESS, own, nice)
        while self._work_on_batch():
            pass

    def _work_on_batch(self) -> bool:
        """One pass over the oldest requests, whose samples are free when it returns; False: closed,
        and all is done."""
        batch = self._take()
        if not batch:
            return self.waiting > 0 or not self._closed
        began = time.monotonic()
        self._transcribe(batch)
        self.batches += 1
        self.busy_s["files"] += time.monotonic() - began
        return True

    def _work_on_streams(self) -> None:
        while True:
            with self._change:
                while not (self._feeds or self._closed):
                    self._change.wait()
                feeds, self._feeds = self._feeds, []
            if not feeds:
                return
            began = time.monotonic()
            self._hear(feeds)
            self.busy_s["streams"] += time.monotonic() - began

    def _hear(self, feeds: list[_Feed]) -> None:
        """Advances the streams together; one that fails is the fault of its own samples."""
        streams = []
        for feed in feeds:
            try:
                if feed.samples is not None:
                    feed.stream.take(feed.samples)
                    self.audio_s["streams"] += len(feed.samples) / self.model.sample_rate
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
            samples, options, tell = [job.samples for job in batch], batch[0].options, batch[0].tell
            found: list[Transcript] | None = (
                self.model.transcribe(samples, batch_size=len(batch), **options)
                if tell is None
                else [transcribe_in_windows(self.model, samples[0], tell, **_untimed(options))]
            )
        except Exception as error:  # handed to whoever waits; alone, where it may be one's fault
            if len(batch) == 1:
                if isinstance(error, ValueError):  # the client's: nobody reads where it was raised,
                    error.__traceback__ = None  # and the frames there would hold the samples
                batch[0].done.set_exception(error)
                return
            found = None  # and not again here, where the error holds what memory is full of
        if found is None:
            for job in batch:
                self._transcribe([job])
            return
        self.audio_s["files"] += sum(transcript.duration for transcript in found)
        for job, transcript in zip(batch, found, strict=True):
            job.done.set_result(transcript)


def _untimed(options: dict) -> dict:
    """Without `timestamps`, which a text that is told by windows has anyway."""
    return {name: value for name, value in options.items() if name != "timestamps"}
