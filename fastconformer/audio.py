"""Audio files: any format that libsndfile reads -> float32 mono samples at the model's rate.

Integer samples are scaled to [-1, 1); float samples are taken as they are, never clipped.
Channels are averaged, then resampled by soxr (HQ), as NeMo and Lhotse order it.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import soxr


def load_audio(
    path: str | os.PathLike,
    sample_rate_hz: int,
    offset_s: float = 0.0,
    duration_s: float | None = None,
) -> np.ndarray:
    """Reads a file, or the section [offset_s, offset_s + duration_s) of it, seeking to it.

    Args:
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
        if start >= file.frames:
            raise ValueError(
                f"{path}: offset {offset_s} s is past the end, the file has "
                f"{file.frames / rate:.3f} s"
            )
        count = file.frames - start
        if duration_s is not None:
            count = min(count, max(1, round(duration_s * rate)))
        if start:
            file.seek(start)
        samples = file.read(count, dtype="float32", always_2d=True)  # (L, channels)
    if len(samples) == 0:
        raise ValueError(f"{path} is damaged: no samples could be decoded")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise ValueError(f"{path} holds NaN or infinite samples")
    if rate != sample_rate_hz:
        mono = soxr.resample(mono, rate, sample_rate_hz, quality="HQ")
        if len(mono) == 0:
            raise ValueError(f"{path} is shorter than one sample at {sample_rate_hz} Hz")
    return np.ascontiguousarray(mono, dtype=np.float32)


def audio_duration(path: str | os.PathLike) -> float:
    """Length in seconds, from the header. Raises as load_audio does."""
    with _opened(path) as file:
        return file.frames / file.samplerate


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[soundfile.SoundFile]:
    """An open file with at least one sample; libsndfile's errors become ValueError."""
    file_path = Path(path)
    if not file_path.exists():
        raise FileNotFoundError(f"{path}: no such audio file")
    if not file_path.is_file():  # a folder, or a pipe, which would block
        raise ValueError(f"{path} is not a file")
    if file_path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        with soundfile.SoundFile(file_path) as file:
            if file.frames <= 0:
                raise ValueError(f"{path} holds no samples")
            yield file
    except soundfile.SoundFileError as error:
        reason = str(error).rpartition(": ")[2] or str(error)
        raise ValueError(f"{path} is damaged or not audio: {reason}") from error
