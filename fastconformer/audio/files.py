"""Audio files: any format that libsndfile reads -> float32 mono samples at the model's rate.

Integer samples are scaled to [-1, 1); float samples are taken as they are, never clipped.
Channels are averaged, then resampled by soxr (HQ), as NeMo and Lhotse order it.
"""

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import soundfile
import soxr

BLOCK_FRAMES = 1 << 22
UNKNOWN_FRAMES = 2**63 - 1  # of a FLAC that was written to a pipe


def load_audio(
    path: str | os.PathLike | io.BytesIO,
    sample_rate_hz: int,
    offset_s: float = 0.0,
    duration_s: float | None = None,
) -> np.ndarray:
    """Reads a file, or the section [offset_s, offset_s + duration_s) of it, seeking to it.

    Args:
        path: a file, or the content of one.
        sample_rate_hz: rate of the result.
        duration_s: None reads to the end; a section that passes the end stops there.
    Returns:
        Samples, float32, (L,), L >= 1.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not audio, damaged, without samples, NaN or infinite, or an offset or duration
            that is negative or past the end; the message names the file.
    """
    if not math.isfinite(offset_s) or offset_s < 0:
        raise ValueError(f"{path}: offset is {offset_s} s, expected 0 or more")
    if duration_s is not None and not (math.isfinite(duration_s) and duration_s > 0):
        raise ValueError(f"{path}: duration is {duration_s} s, expected more than 0")
    with _opened(path) as file:
        rate = file.samplerate
        start = round(offset_s * rate)
        count = file.frames - start
        if count <= 0:
            raise ValueError(
                f"{path}: offset {offset_s} s is past the end, the file has "
                f"{file.frames / rate:.3f} s"
            )
        if duration_s is not None:
            count = min(count, max(1, round(duration_s * rate)))
        if start:
            file.seek(start)
        blocks = list(_blocks(file, count))
    if not blocks:
        raise ValueError(f"{path} is damaged: no samples could be decoded")
    mono = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    if not np.isfinite(mono).all():
        raise ValueError(f"{path} holds NaN or infinite samples")
    if rate != sample_rate_hz:
        mono = soxr.resample(mono, rate, sample_rate_hz, quality="HQ")
        if len(mono) == 0:
            raise ValueError(f"{path} is shorter than one sample at {sample_rate_hz} Hz")
    return np.ascontiguousarray(mono, dtype=np.float32)


def audio_duration(path: str | os.PathLike | io.BytesIO) -> float:
    """Length in seconds, from the header. Raises as load_audio does."""
    with _opened(path) as file:
        return file.frames / file.samplerate


def _blocks(file: soundfile.SoundFile, count: int) -> Iterator[np.ndarray]:
    """The next count samples, averaged over channels, in pieces: a header may promise any number
    of samples, memory is taken only for those that come."""
    while count > 0:
        block = file.read(min(count, BLOCK_FRAMES), dtype="float32", always_2d=True)
        if len(block) == 0:
            return
        count -= len(block)
        yield block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)


@contextmanager
def _opened(path: str | os.PathLike | io.BytesIO) -> Iterator[soundfile.SoundFile]:
    """An open file with at least one sample; libsndfile's errors become ValueError."""
    if not isinstance(path, io.BytesIO):
        _check_file(path)
    try:
        with soundfile.SoundFile(_name_for_soundfile(path)) as file:
            if not 1000 <= file.samplerate <= 1_000_000:
                raise ValueError(f"{path} is damaged: its sample rate is {file.samplerate} Hz")
            if file.frames <= 0:
                raise ValueError(f"{path} holds no samples")
            if file.frames == UNKNOWN_FRAMES:  # libsndfile fails at the end of such a file
                raise ValueError(f"{path} does not tell its length; write it again, to a file")
            yield file
    except soundfile.SoundFileError as error:
        reason = str(error).rpartition(": ")[2] or str(error)
        raise ValueError(f"{path} is damaged or not audio: {reason}") from error


def _name_for_soundfile(path):
    # a name may hold bytes that are no text, which it cannot encode
    is_file = not isinstance(path, io.BytesIO) and os.name == "posix"
    return os.fsencode(path) if is_file else path


def _check_file(path: str | os.PathLike) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such audio file")
    if not os.path.isfile(path):  # a folder, or a pipe, which would block
        raise ValueError(f"{path} is not a file")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path} is empty")
