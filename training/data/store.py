"""Clips to padded batches: `AudioStore` reads their sound, and `batches_ahead` reads it in threads
while the model computes.

Letters of shapes: B clips, L samples, U target tokens.
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastconformer.audio.files import audio_duration, load_audio
from fastconformer.formats.manifest import DURATION_MISMATCH
from fastconformer.transfers import host_zeros, sent
from training.augment.waveform import WaveAugment, change_speed
from training.data.batching import Draw, leaves_unsaid
from training.data.tarred import TarReader
from training.data.utterances import Dropped, UnusableLine, Utterance, dropped_line

log = logging.getLogger("finetune")

TAR_SLACK_S = 0.2
FIRST_WAIT_S = 0.5  # before a file that cannot be reached is tried again; then twice as long
GONE_CLIPS = 16  # so many in a row that cannot be reached: the storage is gone
PROBED_BYTES = 1 << 26  # of a file that could not be decoded, to tell damage from storage


@dataclasses.dataclass(frozen=True)
class Batch:
    utterances: tuple[Utterance, ...]
    audio: Tensor  # (B, L) float32, zero-padded
    audio_lengths: Tensor  # (B,) samples
    targets: Tensor  # (B, U), zero-padded
    target_lengths: Tensor  # (B,)

    @property
    def prompt_lengths(self) -> Tensor | None:
        """(B,) tokens of each clip's targets that are a prompt's; None: of an unnamed batch."""
        if not self.utterances:
            return None
        lengths = [utterance.prompt_length for utterance in self.utterances]
        return torch.tensor(lengths)

    def to(self, device: torch.device) -> "Batch":
        """With the sound on a device; lengths and targets stay on the host, which asks for them."""
        return dataclasses.replace(self, audio=sent(self.audio, device))


class Unreachable(OSError):
    """A clip's file that is known to be there cannot be read now."""


class StorageGone(OSError):
    """Many clips in a row were unreachable."""


def can_be_read(path: str) -> bool:
    """Whether the bytes of a file come, whatever they are."""
    try:
        with open(path, "rb") as file:
            file.read(PROBED_BYTES)
    except OSError:
        return False
    return True


class AudioStore:
    """Reads clips, keeps them in memory as 16-bit samples when all fit, and lists what is unusable.

    Whether they are kept is decided once from the durations, so that a clip's samples never depend
    on what was read before it.

    Args:
        sample_rate_hz: the model's rate; everything is resampled to it.
        max_duration_s: a clip that turns out longer than this is unusable; None: no limit.
        pad_to_s: shorter clips get silence on both sides, as `transcribe` gives them.
        on_dropped: called once for each unusable clip.
        retry: how often a file that cannot be reached is tried again, after 0.5, 1, 2 ... s.
    `augment`, where it is set, changes the sound of each Draw; `seed` decides which of them leave
    their language unsaid; `pinned`: batches are made in memory that a GPU reads by itself.
    """

    def __init__(
        self,
        utterances: list[Utterance],
        sample_rate_hz: int,
        cache_gb: float,
        max_duration_s: float | None = None,
        pad_to_s: float = 0.0,
        on_dropped: Callable[[Dropped], None] = lambda dropped: None,
        retry: int = 0,
    ):
        self.utterances = utterances
        self.sample_rate_hz = sample_rate_hz
        self.max_duration_s = max_duration_s
        self.pad_to_samples = round(pad_to_s * sample_rate_hz)
        self.on_dropped = on_dropped
        self.retry = retry
        total_s = sum(utterance.duration_s for utterance in utterances)
        self.keeps_audio = total_s * sample_rate_hz * 2 <= cache_gb * 1e9
        self._kept: dict[int, np.ndarray] = {}
        self._unusable: set[int] = set()
        self._unreached: dict[int, int | None] = {}  # clip -> epoch in which it was not reached
        self._failed_in_a_row = 0
        self._lock = threading.Lock()
        self._tars = TarReader()
        self.augment: WaveAugment | None = None
        self.seed = 0
        self.pinned = False

    @property
    def n_unusable(self) -> int:
        return len(self._unusable)

    def read(self, draw: int | Draw) -> np.ndarray | None:
        """Samples of one clip, padded, (L,) float32, or None when it cannot be used; of a Draw, as
        fast as it says and augmented."""
        if not isinstance(draw, Draw):
            return self._padded(self.samples(draw))
        samples = self.samples(draw.clip, draw.epoch)
        if samples is not None:
            samples = change_speed(samples, draw.speed)
            if self.augment is not None:
                samples = self.augment(samples, draw.epoch, draw.number)
        return self._padded(samples)

    def _padded(self, samples: np.ndarray | None) -> np.ndarray | None:
        missing = self.pad_to_samples - (self.pad_to_samples if samples is None else len(samples))
        if missing > 0:
            samples = np.pad(samples, (missing // 2, missing - missing // 2))
        return samples

    def samples(self, index: int, epoch: int | None = None) -> np.ndarray | None:
        """A clip as it is, (L,) float32 at the model's rate, or None when it cannot be used: for
        good where it is damaged, for this epoch where its file cannot be reached.

        Raises:
            StorageGone: many files in a row could not be reached.
        """
        if index in self._kept:
            return self._kept[index].astype(np.float32) / 32768.0
        if index in self._unusable or (epoch is not None and self._unreached.get(index) == epoch):
            return None
        utterance = self.utterances[index]
        try:
            samples = self._read_patiently(utterance)
        except Unreachable as error:
            self._note_unreached(index, epoch, error)
            return None
        except (OSError, ValueError) as error:
            with self._lock:
                is_new = index not in self._unusable
                self._unusable.add(index)
            if is_new:
                detail = str(error.args[-1]) if isinstance(error, UnusableLine) else str(error)
                self.on_dropped(dropped_line(utterance, "unreadable_audio", detail))
            return None
        self._failed_in_a_row = 0
        if self.keeps_audio:
            pcm = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)
            self._kept[index] = pcm
            samples = pcm.astype(np.float32) / 32768.0
        return samples

    def _read_patiently(self, utterance: Utterance) -> np.ndarray:
        """A clip's samples; Unreachable where its file is not there after all tries."""
        wait_s = FIRST_WAIT_S
        for left in range(self.retry, -1, -1):
            try:
                return self._decode(utterance)
            except UnusableLine:
                raise
            except (OSError, ValueError) as error:
                if can_be_read(utterance.audio_path):
                    return self._decode(utterance)  # it is back, or what is in it is damaged
                if not left:
                    raise Unreachable(f"{utterance.audio_name}: {error}") from error
            time.sleep(wait_s)
            wait_s *= 2
        raise AssertionError

    def _note_unreached(self, index: int, epoch: int | None, error: Unreachable) -> None:
        with self._lock:
            self._unreached[index] = epoch
            self._failed_in_a_row += 1
            gone = self._failed_in_a_row >= min(GONE_CLIPS, len(self.utterances))
        if gone:
            raise StorageGone(f"the data cannot be reached any more: {error}")
        log.warning("not reached, tried again in the next epoch: %s", error)

    def _decode(self, utterance: Utterance) -> np.ndarray:
        audio, is_section = utterance.audio_path, utterance.offset_s is not None
        if utterance.tar_member is not None:
            audio = self._tars.read(audio, utterance.tar_member)
            if is_section and abs(audio_duration(audio) - utterance.duration_s) < TAR_SLACK_S:
                is_section = False  # it was cut when it was put into the tar; NeMo's rule
            audio.seek(0)
        section = {}
        if is_section:
            section = {"offset_s": utterance.offset_s, "duration_s": utterance.duration_s}
        samples = load_audio(audio, self.sample_rate_hz, **section, channel=utterance.channel)
        seconds = len(samples) / self.sample_rate_hz
        if not seconds or not np.isfinite(samples).all():
            raise UnusableLine(f"{utterance.audio_name}: no samples, or not finite ones")
        ratio = seconds / utterance.duration_s
        if not 1 / DURATION_MISMATCH <= ratio <= DURATION_MISMATCH:
            raise UnusableLine(
                f"{utterance.audio_name} holds {seconds:.2f} s, "
                f"the manifest says {utterance.duration_s} s"
            )
        if self.max_duration_s is not None and seconds > self.max_duration_s * 1.05:
            raise UnusableLine(f"{utterance.audio_name} holds {seconds:.2f} s, above the limit")
        return samples

    def _drawn(self, draw: int | Draw) -> Utterance:
        """The line of a draw, as this draw says it."""
        if not isinstance(draw, Draw):
            return self.utterances[draw]
        utterance = self.utterances[draw.clip]
        if leaves_unsaid(utterance.auto_share, draw, self.seed):
            return dataclasses.replace(utterance, encoder_slots={})
        return utterance

    def batch(self, draws: list[int] | list[Draw]) -> Batch | None:
        """These clips, padded; without the unusable ones; None when none is left."""
        clips = [(self._drawn(draw), self.read(draw)) for draw in draws]
        clips = [(utterance, samples) for utterance, samples in clips if samples is not None]
        return collate(*zip(*clips, strict=True), self.pinned) if clips else None


def collate(
    utterances: Iterable[Utterance], clips: Iterable[np.ndarray], pinned: bool = False
) -> Batch:
    """Pad samples and tokens with zeros to the longest of the batch; `pinned`: the samples, in
    memory that a GPU reads by itself."""
    utterances, clips = tuple(utterances), list(clips)
    audio_lengths = torch.tensor([len(samples) for samples in clips])
    target_lengths = torch.tensor([len(utterance.tokens) for utterance in utterances])
    audio = host_zeros((len(clips), int(audio_lengths.max())), torch.float32, pinned)
    targets = torch.zeros(len(clips), int(target_lengths.max()), dtype=torch.int64)
    for row, (utterance, samples) in enumerate(zip(utterances, clips, strict=True)):
        audio[row, : len(samples)] = torch.from_numpy(samples)
        targets[row, : len(utterance.tokens)] = torch.tensor(utterance.tokens)
    return Batch(utterances, audio, audio_lengths, targets, target_lengths)


def batches_ahead(
    store: AudioStore, batches: Iterable[list], num_workers: int
) -> Iterator[Batch | None]:
    """`store.batch` of each, in order; `num_workers` threads read ahead, 0 reads in the caller.

    Threads are enough: decoding and resampling leave Python's lock. No workers and many give the
    same batches.
    """
    if num_workers == 0:
        yield from map(store.batch, batches)
        return
    ahead: collections.deque = collections.deque()
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for indices in batches:
                ahead.append(pool.submit(store.batch, indices))
                if len(ahead) > 2 * num_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
