"""Recordings through a model: read ahead by threads, sorted into batches, told as they are done."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..audio.files import as_int16, read_audio
from ..formats.manifest import Clip

if TYPE_CHECKING:
    from ..model import ASRModel
    from ..recordings.transcript import Transcript

ROUND_SECONDS = 3600.0  # of audio that is read into memory and sorted at a time
ROUND_BATCHES = 16  # of clips, at most, in a round; the first rounds are shorter

Channels = str | tuple[int, ...]  # "mix", "each", or the numbers of those that are taken, from 0


class Result(NamedTuple):
    """A clip with its transcript, or with the reason why it has none. Of a recording whose channels
    are taken apart there is one for each, with a clip that names it."""

    clip: Clip
    transcript: "Transcript | None"
    reason: str


class Read(NamedTuple):
    """A clip as the threads read it: samples, or the reason why there are none."""

    clip: Clip
    samples: np.ndarray | None
    reason: str


def transcribe_clips(
    model: "ASRModel",
    clips: Iterable[Clip],
    head: str | None = None,
    batch_size: int = 16,
    timestamps: bool = False,
    workers: int = 2,
    channels: Channels = "mix",
    track: int = 0,
    in_order: bool = True,
    **options,
) -> Iterator[Result]:
    """The result of each clip, in order, or else (`in_order`) as its batch is done.

    `workers` threads read ahead, at first a batch and then up to an hour of audio; it is sorted by
    length into batches of at most `batch_size` clips. `channels` holds where a clip names none; a
    clip that names several gets their average. `track` is the sound of a video that is taken. What
    is odd about a recording stands in its clip's `notes`. `options`: see `ASRModel.transcribe`.
    """
    options = {"head": head, "timestamps": timestamps} | options
    n_rounds = 0

    def full(round_: list[list[Read]]) -> bool:
        reads = [read for several in round_ for read in several]
        n_samples = sum(len(read.samples) for read in reads if read.samples is not None)
        most = min(2**n_rounds, ROUND_BATCHES) * batch_size
        return n_samples >= ROUND_SECONDS * model.sample_rate or len(reads) >= most

    def read(clip: Clip) -> list[Read]:
        return _read(clip, model.sample_rate, channels, track)

    for round_ in read_ahead(clips, read, full, workers):
        n_rounds += 1
        reads = [read for several in round_ for read in several]
        done: dict[int, Result] = {}
        told = 0
        for found in _transcribe_round(model, reads, batch_size, options):
            if not in_order:
                yield from found.values()
                continue
            done |= found
            while told in done:
                yield done.pop(told)
                told += 1


def _read(clip: Clip, sample_rate_hz: int, channels: Channels, track: int) -> list[Read]:
    duration_s = None if clip.offset_s is None else clip.duration_s
    apart = clip.channel is None and channels != "mix"
    wanted = clip.channel if channels in ("mix", "each") or clip.channel else channels
    try:
        audio = read_audio(
            clip.path if clip.content is None else clip.content,
            *(sample_rate_hz, clip.offset_s or 0.0, duration_s, wanted, apart, track),
        )
    except (OSError, ValueError) as error:
        return [Read(clip, None, str(error))]
    clip = dataclasses.replace(clip, notes=tuple(audio.notes))
    if not apart:
        return [Read(clip, as_int16(audio.samples), "")]  # half the memory
    numbers = wanted or range(len(audio.samples))
    reads = [
        Read(
            dataclasses.replace(clip, channel=(number,), n_channels=len(numbers)),
            *(as_int16(samples), ""),
        )
        for number, samples in zip(numbers, audio.samples)
    ]
    later = [dataclasses.replace(read.clip, notes=()) for read in reads[1:]]  # said once
    return reads[:1] + [read._replace(clip=clip) for read, clip in zip(reads[1:], later)]


def _transcribe_round(model, reads: list[Read], batch_size: int, options) -> Iterator[dict]:
    """{place in the round: result} of those that could not be read, then of each batch."""
    yield {
        k: Result(read.clip, None, read.reason)
        for k, read in enumerate(reads)
        if read.samples is None
    }
    order = [k for k, read in enumerate(reads) if read.samples is not None]
    order.sort(key=lambda k: -len(reads[k].samples))
    left = dict.fromkeys(order)
    try:
        for k, transcript in _each(model, [reads[k] for k in order], batch_size, options):
            place = order[k]
            del left[place]
            yield {place: Result(reads[place].clip, transcript, "")}
    except (RuntimeError, ValueError):  # out of memory, mostly: batch by batch, then one by one
        pass  # and not here, where the error holds what memory is full of
    order = list(left)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        found = _transcribe_batch(model, [reads[k] for k in batch], options)
        yield dict(zip(batch, found, strict=True))


def _each(model, reads: list[Read], batch_size: int, options):
    own = own_prompts(model, [read.clip for read in reads], options)
    samples = [read.samples for read in reads]
    return model.transcribe_each(samples, batch_size=batch_size, **options, **own)


def _transcribe_batch(model, reads: list[Read], options) -> list[Result]:
    try:
        transcripts = dict(_each(model, reads, len(reads), options))
        return [Result(read.clip, transcripts[k], "") for k, read in enumerate(reads)]
    except (RuntimeError, ValueError) as error:
        if len(reads) == 1:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return [Result(reads[0].clip, None, f"transcription failed: {reason}")]
    return [result for read in reads for result in _transcribe_batch(model, [read], options)]


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
