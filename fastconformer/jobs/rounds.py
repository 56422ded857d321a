"""Many recordings through a model: read ahead by threads, sorted into batches, given in order."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from ..audio.files import load_audio
from ..formats.manifest import Clip

if TYPE_CHECKING:
    from ..model import ASRModel
    from ..recordings.transcript import Transcript

ROUND_SECONDS = 3600.0  # of audio that is read into memory and sorted at a time


def transcribe_clips(
    model: "ASRModel",
    clips: Iterable[Clip],
    head: str | None = None,
    batch_size: int = 16,
    timestamps: bool = False,
    workers: int = 2,
    **options,
) -> Iterator[tuple[Clip, "Transcript | None", str]]:
    """(clip, transcript, "") of each clip in order, or (clip, None, reason) where it has no text.

    `workers` threads read about an hour of audio ahead; it is sorted by length into batches of at
    most `batch_size` clips. `options`: see `ASRModel.transcribe`.
    """
    options = {"head": head, "timestamps": timestamps} | options

    def read(clip: Clip) -> tuple[Clip, np.ndarray | None, str]:
        duration_s = None if clip.offset_s is None else clip.duration_s
        try:
            samples = load_audio(clip.path, model.sample_rate, clip.offset_s or 0.0, duration_s)
            return clip, samples, ""
        except (OSError, ValueError) as error:
            return clip, None, str(error)

    def full(round_) -> bool:
        n_samples = sum(len(samples) for _, samples, _ in round_ if samples is not None)
        return n_samples >= ROUND_SECONDS * model.sample_rate or len(round_) >= 16 * batch_size

    for round_ in read_ahead(clips, read, full, workers):
        yield from _transcribe_round(model, round_, batch_size, options)


def _transcribe_round(model, round_, batch_size, options):
    results = {k: (None, reason) for k, (_, _, reason) in enumerate(round_) if reason}
    order = sorted(
        (k for k in range(len(round_)) if k not in results), key=lambda k: -len(round_[k][1])
    )
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        results |= _transcribe_batch(model, batch, round_, options)
    for k, (clip, _, _) in enumerate(round_):
        yield clip, *results[k]


def _transcribe_batch(model, batch, round_, options):
    try:
        samples = [round_[k][1] for k in batch]
        own = own_prompts(model, [round_[k][0] for k in batch], options)
        transcripts = model.transcribe(samples, batch_size=len(batch), **options, **own)
    except (RuntimeError, ValueError) as error:  # out of memory, mostly: then one by one
        if len(batch) == 1:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return {batch[0]: (None, f"transcription failed: {reason}")}
        results = {}
        for k in batch:
            results |= _transcribe_batch(model, [k], round_, options)
        return results
    return {k: (transcript, "") for k, transcript in zip(batch, transcripts, strict=True)}


def own_prompts(model: "ASRModel", clips: list[Clip], options: dict) -> dict:
    """{"prompt": slots for each clip} where manifest lines bring slots of the head's prompt."""
    head = model.head(options.get("head"))
    slots = [head.slots_of(clip.others) for clip in clips]
    return {"prompt": slots} if any(slots) else {}


def read_ahead(
    items: Iterable, read: Callable, full: Callable[[list], bool], workers: int = 2
) -> Iterator[list]:
    """Rounds of `read(item)`, in order: a round ends where `full(round)` says so.

    While one round is worked on, `workers` threads read the next (the decoders of audio files leave
    Python's lock), and no more than that is in memory. What `read` raises comes out here.
    """
    rounds: queue.Queue = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def put(value) -> None:
        while not stopped.is_set():
            try:
                return rounds.put(value, timeout=0.1)
            except queue.Full:
                continue

    def produce():
        iterator, round_, waiting = iter(items), [], []
        try:
            with ThreadPoolExecutor(max(1, workers)) as pool:
                while not stopped.is_set():
                    while len(waiting) < 2 * workers + 1:
                        item = next(iterator, stopped)
                        if item is stopped:
                            break
                        waiting.append(pool.submit(read, item))
                    if not waiting:
                        break
                    round_.append(waiting.pop(0).result())
                    if full(round_):
                        put(round_)
                        round_ = []
                for future in waiting:
                    future.cancel()
            put(round_)
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while (found := rounds.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            if found:
                yield found
    finally:
        stopped.set()
        thread.join()
