"""Manifests to padded batches.

`read_manifest` and `check_for_training` turn JSON lines into `Utterance`s and list every line that
is left out, with its reason. `training/batching.py` says which clips make a batch. `AudioStore`
reads their sound, and `batches_ahead` reads it in threads while the model computes.

Letters of shapes: B clips, L samples, U target tokens.
"""

import collections
import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastconformer.audio.files import audio_duration, load_audio
from fastconformer.formats.manifest import DURATION_MISMATCH, Clip, LeftOut, manifest_lines
from training.augment.waveform import WaveAugment, change_speed
from training.data.batching import Draw
from training.data.tarred import TarReader, shard_number

TAR_SLACK_S = 0.2


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One manifest line that can be used; `tokens` is empty until `check_for_training`."""

    audio_path: str  # of the tar, where the clip lies in one
    text: str
    duration_s: float
    offset_s: float | None  # None: the whole file
    manifest: str
    line: int  # from 1
    tokens: tuple[int, ...] = ()
    tar_member: str | None = None
    lang: str | None = None

    @property
    def audio_name(self) -> str:
        member = f":{self.tar_member}" if self.tar_member else ""
        return self.audio_path + member

    @property
    def name(self) -> str:
        return f"{self.audio_name} ({self.manifest}, line {self.line})"


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A manifest line that is left out: `reason` is a short code, `detail` says what was found."""

    manifest: str
    line: int
    reason: str
    detail: str
    audio_filepath: str = ""


@dataclasses.dataclass(frozen=True)
class Batch:
    utterances: tuple[Utterance, ...]
    audio: Tensor  # (B, L) float32, zero-padded
    audio_lengths: Tensor  # (B,) samples
    targets: Tensor  # (B, U), zero-padded
    target_lengths: Tensor  # (B,)

    def to(self, device: torch.device) -> "Batch":
        tensors = (self.audio, self.audio_lengths, self.targets, self.target_lengths)
        return Batch(self.utterances, *(t.to(device, non_blocking=True) for t in tensors))


class UnusableLine(ValueError):
    """One manifest line cannot be used: (reason, detail)."""


def read_manifest(
    path: str | Path, lang: str | None = None, tars: dict[int, str] | None = None
) -> tuple[list[Utterance], list[Dropped]]:
    """Read a NeMo manifest: JSON lines with `audio_filepath`, `duration`, `text`, maybe `offset`.

    With `lang`, lines of another `lang` are left out. `audio_filepath` is absolute or relative to
    the manifest's folder; with `tars` ({shard id: tar file}) it is a member of the tar that the
    line's `shard_id`, or else the manifest's number, names. Every bad line is in the second list,
    with its reason; blank lines are ignored.

    Raises:
        FileNotFoundError: there is no such manifest.
    """
    utterances, dropped = [], []
    for found in manifest_lines(path, lang):
        try:
            if isinstance(found, LeftOut):
                raise UnusableLine(found.reason, found.detail)
            utterances.append(_utterance(found, tars))
        except UnusableLine as error:
            name = str(found.audio)
            dropped.append(Dropped(found.manifest, found.line, *error.args, audio_filepath=name))
    return utterances, dropped


def _utterance(clip: Clip, tars: dict[int, str] | None) -> Utterance:
    if clip.text is None:
        raise UnusableLine("no_text", "text is None")
    if clip.duration_s is None:
        raise UnusableLine("bad_duration", "duration is None seconds")
    return Utterance(
        audio_path=_tar_of(clip, tars) if tars else str(_audio_file(clip.path)),
        text=clip.text,
        duration_s=clip.duration_s,
        offset_s=clip.offset_s,
        manifest=clip.manifest,
        line=clip.line,
        tar_member=clip.audio if tars else None,
        lang=clip.lang,
    )


def _audio_file(path: Path) -> Path:
    try:
        found = path.is_file()
    except OSError:  # a name that is too long
        found = False
    if not found:
        raise UnusableLine("missing_audio", f"no such file: {path}")
    return path


def _tar_of(clip: Clip, tars: dict[int, str]) -> str:
    shard = clip.others.get("shard_id", shard_number(Path(clip.manifest).name))
    if len(tars) == 1 and "shard_id" not in clip.others:
        shard = next(iter(tars))
    if shard not in tars:
        raise UnusableLine("missing_audio", f"shard_id is {shard!r}, and no tar has that number")
    return tars[shard]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a training clip must keep; None: no limit. Rates are per second of sound."""

    min_duration_s: float = 0.0
    max_duration_s: float = math.inf
    min_tokens_per_s: float | None = None
    max_tokens_per_s: float | None = None
    min_chars_per_s: float | None = None
    max_chars_per_s: float | None = None
    max_tokens_per_frame: float | None = None  # of the encoder's frames, for transducers
    ctc: bool = False  # CTC needs a frame for each token, and one more between two equal ones


def check_for_training(
    utterances: Iterable[Utterance],
    tokenizer,
    limits: Limits,
    encoder_frames: Callable[[float], int] | None = None,
) -> tuple[list[Utterance], list[Dropped]]:
    """Tokenize and keep what a model can be trained on.

    Args:
        tokenizer: `of_language(lang)`, and of what it gives `encode(text) -> ids`, `unk_id`.
        encoder_frames: seconds -> T' of the encoder; None: tokens are not held against frames.
    Returns:
        Usable utterances with their tokens, and what is left out.
    """
    kept, dropped = [], []
    for utterance in utterances:
        try:
            tokens = _tokens_of(utterance, tokenizer, limits)
            if encoder_frames is not None:
                _check_frames(tokens, encoder_frames(utterance.duration_s), limits)
        except UnusableLine as error:
            dropped.append(_dropped(utterance, *error.args))
        else:
            kept.append(dataclasses.replace(utterance, tokens=tokens))
    return kept, dropped


def _dropped(utterance: Utterance, reason: str, detail: str) -> Dropped:
    return Dropped(
        utterance.manifest, utterance.line, reason, detail, audio_filepath=utterance.audio_name
    )


def _tokens_of(utterance: Utterance, tokenizer, limits: Limits) -> tuple[int, ...]:
    seconds = utterance.duration_s
    if seconds < limits.min_duration_s:
        raise UnusableLine("too_short", f"{seconds} s is below data.min_duration_s")
    if seconds > limits.max_duration_s:
        raise UnusableLine("too_long", f"{seconds} s is above data.max_duration_s")
    if not utterance.text.strip():
        raise UnusableLine("empty_text", "text is empty")
    _check_rate("chars", len(utterance.text.strip()), seconds, limits)
    try:
        tokenizer = tokenizer.of_language(utterance.lang)
    except ValueError as error:
        raise UnusableLine("unknown_lang", str(error)) from None
    tokens = tuple(tokenizer.encode(utterance.text))
    if not tokens:
        raise UnusableLine("empty_text", f"the tokenizer makes no token of {utterance.text!r}")
    unknown = _unknown_characters(tokenizer, utterance.text, tokens)
    if unknown:
        raise UnusableLine("unknown_characters", f"the tokenizer cannot write {unknown!r}")
    _check_rate("tokens", len(tokens), seconds, limits)
    return tokens


def _check_rate(kind: str, count: int, seconds: float, limits: Limits) -> None:
    rate = count / seconds
    for bound, word, wrong in (("min", "below", rate.__lt__), ("max", "above", rate.__gt__)):
        limit = getattr(limits, f"{bound}_{kind}_per_s")
        if limit is not None and wrong(limit):
            few = "few" if bound == "min" else "many"
            raise UnusableLine(
                f"too_{few}_{kind}_per_s",
                f"{count} {kind} in {seconds} s, {rate:.2f} a second, "
                f"is {word} data.{bound}_{kind}_per_s",
            )


def _check_frames(tokens: tuple[int, ...], n_frames: int, limits: Limits) -> None:
    needed = len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
    if limits.ctc and needed > n_frames:
        raise UnusableLine(
            "too_many_tokens", f"CTC needs {needed} encoder frames, the clip gives {n_frames}"
        )
    most = limits.max_tokens_per_frame
    if most is not None and len(tokens) > most * n_frames:
        raise UnusableLine(
            "too_many_tokens",
            f"{len(tokens)} tokens in {n_frames} encoder frames, above data.max_tokens_per_frame",
        )


def _unknown_characters(tokenizer, text: str, tokens: tuple[int, ...]) -> str:
    """What of the text would be lost; empty if nothing."""
    characters = dict.fromkeys(c for c in text if not c.isspace())
    if tokenizer.unk_id is None:  # characters: those without a token are dropped in silence
        return " ".join(c for c in characters if not tokenizer.encode(c))
    if tokenizer.unk_id not in tokens:
        return ""
    unknown = [c for c in characters if tokenizer.unk_id in tokenizer.encode(c)]
    return " ".join(unknown) or text


class AudioStore:
    """Reads clips, keeps them in memory as 16-bit samples when all fit, and lists what is unusable.

    Whether they are kept is decided once from the durations, so that a clip's samples never depend
    on what was read before it.

    Args:
        sample_rate_hz: the model's rate; everything is resampled to it.
        max_duration_s: a clip that turns out longer than this is unusable; None: no limit.
        pad_to_s: shorter clips get silence on both sides, as `transcribe` gives them.
        on_dropped: called once for each unusable clip.
    `augment`, where it is set, changes the sound of each Draw.
    """

    def __init__(
        self,
        utterances: list[Utterance],
        sample_rate_hz: int,
        cache_gb: float,
        max_duration_s: float | None = None,
        pad_to_s: float = 0.0,
        on_dropped: Callable[[Dropped], None] = lambda dropped: None,
    ):
        self.utterances = utterances
        self.sample_rate_hz = sample_rate_hz
        self.max_duration_s = max_duration_s
        self.pad_to_samples = round(pad_to_s * sample_rate_hz)
        self.on_dropped = on_dropped
        total_s = sum(utterance.duration_s for utterance in utterances)
        self.keeps_audio = total_s * sample_rate_hz * 2 <= cache_gb * 1e9
        self._kept: dict[int, np.ndarray] = {}
        self._unusable: set[int] = set()
        self._lock = threading.Lock()
        self._tars = TarReader()
        self.augment: WaveAugment | None = None

    @property
    def n_unusable(self) -> int:
        return len(self._unusable)

    def read(self, draw: int | Draw) -> np.ndarray | None:
        """Samples of one clip, padded, (L,) float32, or None when it cannot be used; of a Draw, as
        fast as it says and augmented."""
        if not isinstance(draw, Draw):
            return self._padded(self.samples(draw))
        samples = self.samples(draw.clip)
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

    def samples(self, index: int) -> np.ndarray | None:
        """A clip as it is, (L,) float32 at the model's rate, or None when it cannot be used."""
        if index in self._kept:
            return self._kept[index].astype(np.float32) / 32768.0
        if index in self._unusable:
            return None
        utterance = self.utterances[index]
        try:
            samples = self._decode(utterance)
        except (OSError, ValueError) as error:
            with self._lock:
                is_new = index not in self._unusable
                self._unusable.add(index)
            if is_new:
                detail = str(error.args[-1]) if isinstance(error, UnusableLine) else str(error)
                self.on_dropped(_dropped(utterance, "unreadable_audio", detail))
            return None
        if self.keeps_audio:
            pcm = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)
            self._kept[index] = pcm
            samples = pcm.astype(np.float32) / 32768.0
        return samples

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
        samples = load_audio(audio, self.sample_rate_hz, **section)
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

    def batch(self, draws: list[int] | list[Draw]) -> Batch | None:
        """These clips, padded; without the unusable ones; None when none is left."""
        indices = [draw.clip if isinstance(draw, Draw) else draw for draw in draws]
        clips = [(self.utterances[i], self.read(draw)) for i, draw in zip(indices, draws)]
        clips = [(utterance, samples) for utterance, samples in clips if samples is not None]
        return collate(*zip(*clips, strict=True)) if clips else None


def collate(utterances: Iterable[Utterance], clips: Iterable[np.ndarray]) -> Batch:
    """Pad samples and tokens with zeros to the longest of the batch."""
    utterances, clips = tuple(utterances), list(clips)
    audio_lengths = torch.tensor([len(samples) for samples in clips])
    target_lengths = torch.tensor([len(utterance.tokens) for utterance in utterances])
    audio = torch.zeros(len(clips), int(audio_lengths.max()))
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
