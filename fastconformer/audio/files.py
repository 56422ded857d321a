"""Recordings of any container and codec -> float32 samples at the model's rate.

Integer samples are scaled to [-1, 1); float samples are taken as they are, never clipped.
Channels are averaged, or kept apart, then resampled by soxr (HQ), as NeMo and Lhotse order it.
libsndfile reads what it can; `streams` tells it what it gets wrong, `containers` reads the rest.
"""

import contextlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from . import containers
from .streams import find_frames, is_cut, ogg_links, promised_share, sized_header, with_length

log = logging.getLogger(__name__)

BLOCK_FRAMES = 1 << 22
LARGEST_PAGE = 1 << 16  # bytes: more than a page of Ogg, and than the usual header
UNKNOWN_FRAMES = 2**63 - 1  # of a FLAC that was written to a pipe
LENGTH_SLACK_S = 0.1  # by which a header may be wrong before it is said
LOUDEST = 1e10  # of samples that are 1 at most; the power of far louder ones float32 cannot hold
CANCELLED = 1e-3  # of the channels' power: with less in their average they cancel

Source = str | os.PathLike | bytes | BinaryIO


@dataclass
class Audio:
    """What was read: (L,) samples, or (C, L) where the channels are apart; `notes` say what is odd
    about the recording, `damage` why a part of it is missing."""

    samples: np.ndarray
    notes: list[str] = field(default_factory=list)
    damage: str = ""


@dataclass
class Sound:
    """An opened recording. blocks(start, count) gives (n, C) float32 from sample `start` on, about
    `count` of them (None: to the end). frames: samples in all, promised_s: what its header says,
    each None where that is not known; is_cut: the file ends and its stream does not. problems fills
    while blocks are taken."""

    rate_hz: int
    blocks: Callable[[int, int | None], Iterator[np.ndarray]]
    frames: int | None = None
    promised_s: float | None = None
    is_cut: bool = False
    problems: list[str] = field(default_factory=list)


def load_audio(
    source: Source,
    sample_rate_hz: int,
    offset_s: float = 0.0,
    duration_s: float | None = None,
    channel: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Reads a recording, or the section [offset_s, offset_s + duration_s) of it.

    Args:
        source: a file's path, its content, or a binary file.
        sample_rate_hz: rate of the result.
        duration_s: None reads to the end; a section that passes the end stops there.
        channel: numbers from 0 of the channels that are averaged; None: all.
    Returns:
        Samples, float32, (L,), L >= 1.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not audio, damaged, without samples, NaN or infinite, no such channel, or an
            offset or duration that is negative or past the end; the message names the file.
    """
    audio = read_audio(source, sample_rate_hz, offset_s, duration_s, channel)
    if audio.damage:
        raise ValueError(f"{_name(source)} is damaged or not audio: {audio.damage}")
    for note in audio.notes:
        log.warning("%s: %s", _name(source), note)
    return audio.samples


def read_audio(
    source: Source,
    sample_rate_hz: int,
    offset_s: float = 0.0,
    duration_s: float | None = None,
    channel: tuple[int, ...] | None = None,
    apart: bool = False,
    track: int = 0,
) -> Audio:
    """As `load_audio`, and says what is odd; of a damaged recording it gives what can be read.
    `apart`: the channels are not averaged; `track`: which sound of a video, from 0."""
    name = _name(source)
    if not math.isfinite(offset_s) or offset_s < 0:
        raise ValueError(f"{name}: offset is {offset_s} s, expected 0 or more")
    if duration_s is not None and not (math.isfinite(duration_s) and duration_s > 0):
        raise ValueError(f"{name}: duration is {duration_s} s, expected more than 0")
    source = _checked(source)
    with contextlib.ExitStack() as stack:
        sound = _open(source, name, stack, track)
        mixer, damage = _Mixer(name, channel, apart), ""
        try:
            _take(sound, mixer, name, offset_s, duration_s)
        except soundfile.SoundFileError as error:
            damage = _reason(error)
        if damage and containers.is_installed():  # FFmpeg goes on behind what it cannot decode
            mixer = _Mixer(name, channel, apart)
            sound = _open_container(source, name, stack, track, offset_s)
            _take(sound, mixer, name, offset_s, duration_s)
    if mixer.frames == 0:
        if damage:
            raise ValueError(f"{name} is damaged or not audio: {damage}")
        if offset_s:
            raise ValueError(f"{name}: offset {offset_s} s is past the end")
        raise ValueError(f"{name} is damaged: no samples could be decoded")
    read_s = offset_s + mixer.frames / sound.rate_hz
    damage = "; ".join([damage, *sound.problems] if damage else sound.problems)
    notes = mixer.notes()
    if duration_s is None:
        damage, about_length = _compare_lengths(sound, read_s, damage)
        notes += about_length
    samples = resample(mixer.result(), sound.rate_hz, sample_rate_hz, name)
    return Audio(samples, notes, damage)


def audio_duration(source: Source) -> float:
    """Length in seconds: from the header where that is to be trusted, else by decoding. Raises as
    load_audio does."""
    name, source = _name(source), _checked(source)
    with contextlib.ExitStack() as stack:
        sound = _open(source, name, stack)
        if sound.frames is not None:
            return sound.frames / sound.rate_hz
        return sum(len(block) for block in sound.blocks(0, None)) / sound.rate_hz


def _take(sound: Sound, mixer: "_Mixer", name: str, offset_s: float, duration_s: float | None):
    """The section's samples from the sound into the mixer."""
    start = round(offset_s * sound.rate_hz)
    count = None if duration_s is None else max(1, round(duration_s * sound.rate_hz))
    if sound.frames is not None and start >= sound.frames:
        raise ValueError(
            f"{name}: offset {offset_s} s is past the end, the file has "
            f"{sound.frames / sound.rate_hz:.3f} s"
        )
    for block in sound.blocks(start, count):
        if count is not None:
            block = block[: count - mixer.frames]
        mixer.add(block)
        if count == mixer.frames:
            break


class _Mixer:
    """Averages channels, or keeps them apart, block by block."""

    def __init__(self, name: str, channel: tuple[int, ...] | None, apart: bool):
        self.name, self.channel, self.apart = name, channel, apart
        self.frames, self.power, self.mixed_power = 0, 0.0, 0.0
        self.blocks: list[np.ndarray] = []

    def add(self, block: np.ndarray) -> None:
        """block: (n, C) float32."""
        if self.channel is not None:
            n_channels = block.shape[1]
            if max(self.channel) >= n_channels:
                held = f"channels 0 to {n_channels - 1}" if n_channels > 1 else "one channel, 0"
                raise ValueError(f"{self.name} has {held}, not {max(self.channel)}")
            block = block[:, list(self.channel)]
        self.frames += len(block)
        if self.apart:
            self.blocks.append(block)
            return
        mixed = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
        if block.shape[1] > 1:
            self.power += float(np.square(block, dtype=np.float64).mean(axis=1).sum())
            self.mixed_power += float(np.square(mixed, dtype=np.float64).sum())
        self.blocks.append(mixed)

    def notes(self) -> list[str]:
        if self.power and self.mixed_power < CANCELLED * self.power:
            return ["its channels cancel in their average; give --channels 0"]
        return []

    def result(self) -> np.ndarray:
        """(L,), or (C, L) where the channels are apart."""
        samples = self.blocks[0] if len(self.blocks) == 1 else np.concatenate(self.blocks)
        check_samples(samples, self.name)
        return samples.T


def _compare_lengths(sound: Sound, read_s: float, damage: str) -> tuple[str, list[str]]:
    """(what is missing, notes) of a recording that was read to its end."""
    known_s = sound.promised_s if sound.frames is None else sound.frames / sound.rate_hz
    if known_s is not None and read_s >= known_s - LENGTH_SLACK_S:
        damage = ""  # nothing of it is lost
    because = f" ({damage})" if damage else ""
    if sound.promised_s and abs(read_s - sound.promised_s) > LENGTH_SLACK_S:
        return damage, [
            f"its header says {sound.promised_s:.2f} s, {read_s:.2f} s were read{because}"
        ]
    if sound.is_cut and not damage:
        return "", [f"the file ends before its stream does, {read_s:.2f} s were read"]
    return damage, [f"damaged{because}, {read_s:.2f} s were read"] if damage else []


def check_samples(samples: np.ndarray, name: str) -> None:
    """ValueError: NaN, infinite, or so large that they are no sound."""
    peak = max(samples.max(), -samples.min())
    if not np.isfinite(peak):
        raise ValueError(f"{name} holds NaN or infinite samples")
    if peak > LOUDEST:
        raise ValueError(f"{name} holds samples of up to {peak:.0e}, expected -1 to 1")


def resample(
    samples: np.ndarray, rate_hz: int, wanted_hz: int, name: str = "the audio"
) -> np.ndarray:
    """(L,) or (C, L) float32 at another rate. ValueError: a rate that no recording has, or less
    than one sample is left."""
    _check_rate(rate_hz, name)
    if rate_hz != wanted_hz:
        samples = soxr.resample(samples.T, rate_hz, wanted_hz, quality="HQ").T
    if samples.shape[-1] == 0:
        raise ValueError(f"{name} is shorter than one sample at {wanted_hz} Hz")
    return np.ascontiguousarray(samples, dtype=np.float32)


def as_int16(samples: np.ndarray) -> np.ndarray:
    """float32 samples as int16 where 16 bits hold each of them, as in most files; else as they are.
    Divided by 32768 they are the same numbers again."""
    found = np.empty(len(samples), np.int16)
    for first in range(0, len(samples), 1 << 16):  # the first of another kind ends it
        scaled = samples[first : first + (1 << 16)] * np.float32(32768)
        whole = np.clip(np.rint(scaled), -32768, 32767)
        if not np.array_equal(whole, scaled):
            return samples
        found[first : first + len(whole)] = whole
    return found


def _open(source: str | bytes, name: str, stack: contextlib.ExitStack, track: int = 0) -> Sound:
    """Opens a path or a content with what reads it. ValueError: nothing does."""
    with _file(source) as file:
        head, size = file.read(LARGEST_PAGE), file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LARGEST_PAGE))
        cut = is_cut(head, file.read() if head[:4] == b"OggS" else b"", size)
        sized = sized_header(head, size)
        if sized is not None:
            file.seek(len(sized))
            source = sized + file.read()
    sound = _opened(source, head, name, stack, track)
    sound.is_cut = cut
    return sound


def _opened(
    source: str | bytes, head: bytes, name: str, stack: contextlib.ExitStack, track: int
) -> Sound:
    """By what its first bytes are, or its name says."""
    suffix = Path(source).suffix.lower() if isinstance(source, str) else ""
    if _is_container(head[:64]) or track:
        return _open_container(source, name, stack, track)
    if head[:3] == b"ID3" or head[:1] == b"\xff" or suffix in (".mp3", ".mp2", ".mpga"):
        return _open_mpeg(source, name, stack)
    try:
        if head[:4] == b"OggS":
            with _file(source) as file:
                links = ogg_links(file.read())
            parts = links if len(links) > 1 else [source]
            return _chain([_open_soundfile(part, name, stack) for part in parts])
        return _open_soundfile(source, name, stack)
    except (soundfile.SoundFileError, ValueError) as error:
        reason = str(error)
        if isinstance(error, soundfile.SoundFileError):
            reason = f"{name} is damaged or not audio: {_reason(error)}"
        if not containers.is_installed():
            raise ValueError(f"{reason}; {containers.INSTALL} reads more kinds") from None
        with contextlib.suppress(ValueError):
            return _open_container(source, name, stack, track)
        raise ValueError(reason) from None


def _open_soundfile(
    source: str | bytes | io.BytesIO, name: str, stack: contextlib.ExitStack
) -> Sound:
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif isinstance(source, str) and os.name == "posix":
        source = os.fsencode(source)  # a name may hold bytes that are no text
    file = stack.enter_context(soundfile.SoundFile(source))
    _check_rate(file.samplerate, name)
    if file.frames <= 0:
        raise ValueError(f"{name} holds no samples")
    if file.frames == UNKNOWN_FRAMES:  # libsndfile fails at the end of such a file
        raise ValueError(f"{name} does not tell its length")

    def blocks(start: int, count: int | None) -> Iterator[np.ndarray]:
        # A header may promise any number of samples: memory is taken only for those that come.
        left = file.frames - start if count is None else min(count, file.frames - start)
        if start:
            file.seek(start)
        while left > 0:
            block = file.read(min(left, BLOCK_FRAMES), dtype="float32", always_2d=True)
            if len(block) == 0:
                return
            left -= len(block)
            yield block

    promised_s = file.frames * promised_share(file.extra_info) / file.samplerate
    return Sound(file.samplerate, blocks, file.frames, promised_s)


def _open_mpeg(source: str | bytes, name: str, stack: contextlib.ExitStack) -> Sound:
    with _file(source) as file:
        data = file.read()
    frames = find_frames(data)
    if frames is None:  # not what its name says, or rubbish
        return _open_container(source, name, stack)
    header = frames.header
    try:
        if containers.is_installed():  # libsndfile's decoder writes lines of its own to stderr
            sound = _open_container(source, name, stack)
        elif header.layer < 3 or frames.is_regular:
            sound = _open_soundfile(source, name, stack)
        else:
            sound = _open_soundfile(with_length(data, frames), name, stack)
    except soundfile.SoundFileError as error:
        raise ValueError(f"{name} is damaged or not audio: {_reason(error)}") from None
    promised = (frames.promised or len(frames.places)) * header.samples
    sound.promised_s = (frames.samples if frames.is_regular else promised) / header.rate_hz
    if sound.rate_hz == header.rate_hz:
        sound.frames = frames.samples
    return sound


def _open_container(
    source: str | bytes,
    name: str,
    stack: contextlib.ExitStack,
    track: int = 0,
    offset_s: float = 0.0,
) -> Sound:
    if not containers.is_installed():
        raise ValueError(
            f"{name} is of a kind that libsndfile does not read; {containers.INSTALL}, or convert "
            "it: ffmpeg -i FILE FILE.wav"
        )
    opened = containers.open_track(_file(source), name, track, offset_s)
    stack.callback(opened.close)
    _check_rate(opened.rate_hz, name)

    def blocks(start: int, count: int | None) -> Iterator[np.ndarray]:
        if start == round(offset_s * opened.rate_hz):
            yield from opened.blocks
            return
        again = containers.open_track(_file(source), name, track, start / opened.rate_hz)
        stack.callback(again.close)
        yield from again.blocks
        opened.problems[:] = again.problems

    return Sound(opened.rate_hz, blocks, None, opened.promised_s, problems=opened.problems)


def _check_rate(rate_hz: int, name: str) -> None:
    if not 1000 <= rate_hz <= 1_000_000:
        raise ValueError(f"{name} is damaged: its sample rate is {rate_hz} Hz")


def _chain(links: list[Sound]) -> Sound:
    """One sound of several, at the first one's rate."""
    if len(links) == 1:
        return links[0]
    rate_hz = links[0].rate_hz
    lengths = [round(link.frames * rate_hz / link.rate_hz) for link in links]

    def blocks(start: int, count: int | None) -> Iterator[np.ndarray]:
        for link, length in zip(links, lengths):
            skip, start = start, max(0, start - length)
            if skip >= length:
                continue
            for block in link.blocks(round(skip * link.rate_hz / rate_hz), None):
                yield resample(block.T, link.rate_hz, rate_hz).T

    return Sound(rate_hz, blocks, sum(lengths), sum(lengths) / rate_hz)


def _is_container(head: bytes) -> bool:
    """Whether the first bytes are of a kind that libsndfile does not read; what it does with some
    of them ends in lines of its own on stderr."""
    adts = head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xF6 == 0xF0
    return (
        adts
        or head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
        or head[:4] in (b"\x1aE\xdf\xa3", b"0&\xb2u", b"wvpk", b"TTA1", b"MAC ", b".RMF", b"FLV\1")
        or head[:4] in (b"\0\0\1\xba", b"\0\0\1\xb3", b"MPCK", b"tBaK", b"\x7f\xfe\x80\1")
        or head[:5] == b"#!AMR"
        or head[:2] == b"\x0bw"
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
        or (head[:1] == b"G" and len(head) > 11 and head[5:8] in (b"\x11\0\0",))
    )


def _checked(source: Source) -> str | bytes:
    """A path of a file that is there, or a content."""
    if isinstance(source, (bytes, bytearray, memoryview)) or hasattr(source, "read"):
        data = source.read() if hasattr(source, "read") else bytes(source)
        if isinstance(data, str):
            raise ValueError(f"{_name(source)} was opened as text; open it with mode 'rb'")
        if not isinstance(data, bytes):
            raise ValueError(f"{_name(source)}: read() gives a {type(data).__name__}, not bytes")
        if not data and hasattr(source, "seekable") and source.seekable() and source.tell():
            raise ValueError(f"{_name(source)} was read to its end before; call its seek(0)")
        if not data:
            raise ValueError(f"{_name(source)} is empty")
        return data
    if not os.path.exists(source):
        raise FileNotFoundError(f"{source}: no such audio file")
    if not os.path.isfile(source):  # a folder, or a pipe, which would block
        raise ValueError(f"{source} is not a file")
    if os.path.getsize(source) == 0:
        raise ValueError(f"{source} is empty")
    return os.fspath(source)


def _file(source: str | bytes) -> BinaryIO:
    return open(source, "rb") if isinstance(source, str) else io.BytesIO(source)


def _name(source: Source) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return getattr(source, "name", None) or "the audio"


def _reason(error: soundfile.SoundFileError) -> str:
    return str(error).rpartition(": ")[2] or str(error)
