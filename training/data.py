"""Manifests to padded batches.

`read_manifest` and `check_for_training` turn JSON lines into `Utterance`s and list every line that
is left out, with its reason. `epoch_batches` orders them: a function of (seed, epoch) only.
`AudioStore` reads the sound, and `batches_ahead` reads it in threads while the model computes.

Letters of shapes: B clips, L samples, U target tokens.
"""

import collections
import dataclasses
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastconformer.audio import load_audio

ABSURD_DURATION_S = 7 * 24 * 3600.0
# A clip whose sound is this many times longer or shorter than its manifest says has a wrong line.
DURATION_MISMATCH = 2.0


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One manifest line that can be used; `tokens` is empty until `check_for_training`."""

    audio_path: str
    text: str
    duration_s: float
    offset_s: float | None  # None: the whole file
    manifest: str
    line: int  # from 1
    tokens: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.audio_path} ({self.manifest}, line {self.line})"


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
    path: str | Path, lang: str | None = None
) -> tuple[list[Utterance], list[Dropped]]:
    """Read a NeMo manifest: JSON lines with `audio_filepath`, `duration`, `text`, maybe `offset`.

    With `lang`, lines of another `lang` are left out. `audio_filepath` is absolute or relative to
    the manifest's folder. Every bad line is in the second list, with its reason; blank lines are
    ignored.

    Raises:
        FileNotFoundError: there is no such manifest.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"manifest {path} is not a file; check the recipe's section `data`")
    utterances, dropped = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            name = ""
            try:
                entry = _parse_line(line)
                name = str(entry.get("audio_filepath", ""))
                if lang and entry.get("lang", lang) != lang:
                    raise UnusableLine("other_language", f"lang is {entry['lang']!r}")
                utterances.append(_utterance(entry, path, number))
            except UnusableLine as error:
                dropped.append(Dropped(str(path), number, *error.args, audio_filepath=name))
    return utterances, dropped


def _parse_line(line: bytes) -> dict:
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UnusableLine("not_json", f"not a JSON object: {error}") from None
    if not isinstance(entry, dict):
        raise UnusableLine("not_json", f"not a JSON object: {line.decode()[:80].strip()}")
    return entry


def _utterance(entry: dict, manifest: Path, line: int) -> Utterance:
    audio = entry.get("audio_filepath")
    if not isinstance(audio, str) or not audio:
        raise UnusableLine("no_audio_filepath", f"audio_filepath is {audio!r}")
    text = entry.get("text")
    if not isinstance(text, str):
        raise UnusableLine("no_text", f"text is {text!r}")
    duration_s = entry.get("duration")
    if not _is_number(duration_s) or not 0 < duration_s <= ABSURD_DURATION_S:
        raise UnusableLine("bad_duration", f"duration is {duration_s!r} seconds")
    offset_s = entry.get("offset")
    if offset_s is not None and (
        not _is_number(offset_s) or not 0 <= offset_s <= ABSURD_DURATION_S
    ):
        raise UnusableLine("bad_offset", f"offset is {offset_s!r} seconds")
    audio_path = manifest.parent / Path(audio).expanduser()
    try:
        found = audio_path.is_file()
    except (OSError, ValueError):  # a name that is too long or holds a zero byte
        found = False
    if not found:
        raise UnusableLine("missing_audio", f"no such file: {audio_path}")
    return Utterance(
        audio_path=str(audio_path),
        text=text,
        duration_s=float(duration_s),
        offset_s=None if offset_s is None else float(offset_s),
        manifest=str(manifest),
        line=line,
    )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_for_training(
    utterances: Iterable[Utterance],
    tokenizer,
    min_duration_s: float,
    max_duration_s: float,
    encoder_frames: Callable[[float], int] | None = None,
) -> tuple[list[Utterance], list[Dropped]]:
    """Tokenize and keep what a model can be trained on.

    Args:
        tokenizer: `encode(text) -> ids`, `unk_id`.
        encoder_frames: seconds -> T' of the encoder; given when CTC is trained, which needs one
            frame for each token and one more between two equal ones. None: no such limit.
    Returns:
        Usable utterances with their tokens, and what is left out.
    """
    kept, dropped = [], []
    for utterance in utterances:
        try:
            tokens = _tokens_of(
                utterance, tokenizer, min_duration_s, max_duration_s, encoder_frames
            )
        except UnusableLine as error:
            dropped.append(_dropped(utterance, *error.args))
        else:
            kept.append(dataclasses.replace(utterance, tokens=tokens))
    return kept, dropped


def _dropped(utterance: Utterance, reason: str, detail: str) -> Dropped:
    return Dropped(
        utterance.manifest, utterance.line, reason, detail, audio_filepath=utterance.audio_path
    )


def _tokens_of(utterance, tokenizer, min_duration_s, max_duration_s, encoder_frames):
    seconds = utterance.duration_s
    if seconds < min_duration_s:
        raise UnusableLine("too_short", f"{seconds} s is below data.min_duration_s")
    if seconds > max_duration_s:
        raise UnusableLine("too_long", f"{seconds} s is above data.max_duration_s")
    if not utterance.text.strip():
        raise UnusableLine("empty_text", "text is empty")
    tokens = tuple(tokenizer.encode(utterance.text))
    if not tokens:
        raise UnusableLine("empty_text", f"the tokenizer makes no token of {utterance.text!r}")
    unknown = _unknown_characters(tokenizer, utterance.text, tokens)
    if unknown:
        raise UnusableLine("unknown_characters", f"the tokenizer cannot write {unknown!r}")
    if encoder_frames is not None:
        repeats = sum(a == b for a, b in itertools.pairwise(tokens))
        n_frames = encoder_frames(seconds)
        if len(tokens) + repeats > n_frames:
            raise UnusableLine(
                "too_many_tokens",
                f"CTC needs {len(tokens) + repeats} encoder frames, {seconds} s gives {n_frames}",
            )
    return tokens


def _unknown_characters(tokenizer, text: str, tokens: tuple[int, ...]) -> str:
    """What of the text would be lost; empty if nothing."""
    characters = dict.fromkeys(c for c in text if not c.isspace())
    if tokenizer.unk_id is None:  # characters: those without a token are dropped in silence
        return " ".join(c for c in characters if not tokenizer.encode(c))
    if tokenizer.unk_id not in tokens:
        return ""
    unknown = [c for c in characters if tokenizer.unk_id in tokenizer.encode(c)]
    return " ".join(unknown) or text


def epoch_batches(
    durations_s: list[float],
    batch_size: int | None,
    batch_duration_s: float | None,
    seed: int,
    epoch: int,
) -> list[list[int]]:
    """Indices of every clip once, in batches of similar length, in random order.

    A function of its arguments only, so that a resumed run, or one with other workers, sees the
    same batches. Lengths are blurred by 15 % before sorting, so that batches differ from epoch to
    epoch; the longest is put first in epoch 0, so that a lack of memory shows at once.

    Args:
        batch_size: most clips in a batch; None: no limit.
        batch_duration_s: most seconds in a batch, padding included; None: no limit. A clip that is
            longer makes a batch of its own.
    """
    rng = np.random.default_rng([seed, epoch])
    durations = np.asarray(durations_s, dtype=np.float64)
    order = np.argsort(durations * rng.uniform(0.85, 1.15, len(durations)), kind="stable")
    batches, current, longest = [], [], 0.0
    for index in order.tolist():
        longest_with = max(longest, durations[index])
        is_full = batch_size is not None and len(current) == batch_size
        if batch_duration_s is not None:
            is_full = is_full or longest_with * (len(current) + 1) > batch_duration_s
        if current and is_full:
            batches.append(current)
            current, longest_with = [], durations[index]
        current.append(index)
        longest = longest_with
    if current:
        batches.append(current)
    shuffled = [batches[i] for i in rng.permutation(len(batches)).tolist()]
    if epoch == 0 and shuffled:
        padded_s = [durations[batch].max() * len(batch) for batch in shuffled]
        shuffled.insert(0, shuffled.pop(int(np.argmax(padded_s))))
    return shuffled


class AudioStore:
    """Reads clips, keeps them in memory as 16-bit samples when all fit, and lists what is unusable.

    Whether they are kept is decided once from the durations, so that a clip's samples never depend
    on what was read before it.

    Args:
        sample_rate_hz: the model's rate; everything is resampled to it.
        max_duration_s: a clip that turns out longer than this is unusable; None: no limit.
        pad_to_s: shorter clips get silence on both sides, as `transcribe` gives them.
        on_dropped: called once for each unusable clip.
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

    @property
    def n_unusable(self) -> int:
        return len(self._unusable)

    def read(self, index: int) -> np.ndarray | None:
        """Samples of one clip, (L,) float32, or None when it cannot be used."""
        samples = self._read(index)
        missing = self.pad_to_samples - (self.pad_to_samples if samples is None else len(samples))
        if missing > 0:
            samples = np.pad(samples, (missing // 2, missing - missing // 2))
        return samples

    def _read(self, index: int) -> np.ndarray | None:
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
        if utterance.offset_s is None:
            samples = load_audio(utterance.audio_path, self.sample_rate_hz)
        else:
            samples = load_audio(
                utterance.audio_path,
                self.sample_rate_hz,
                offset_s=utterance.offset_s,
                duration_s=utterance.duration_s,
            )
        seconds = len(samples) / self.sample_rate_hz
        if not seconds or not np.isfinite(samples).all():
            raise UnusableLine(f"{utterance.audio_path}: no samples, or not finite ones")
        ratio = seconds / utterance.duration_s
        if not 1 / DURATION_MISMATCH <= ratio <= DURATION_MISMATCH:
            raise UnusableLine(
                f"{utterance.audio_path} holds {seconds:.2f} s, "
                f"the manifest says {utterance.duration_s} s"
            )
        if self.max_duration_s is not None and seconds > self.max_duration_s * 1.05:
            raise UnusableLine(f"{utterance.audio_path} holds {seconds:.2f} s, above the limit")
        return samples

    def batch(self, indices: list[int]) -> Batch | None:
        """Clips of these indices, padded; without the unusable ones; None when none is left."""
        clips = [(self.utterances[index], self.read(index)) for index in indices]
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
    store: AudioStore, batches: Iterable[list[int]], num_workers: int
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
