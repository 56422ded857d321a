"""What users give as audio -> mono samples, and batches of them."""

import numbers
import os

import numpy as np
import torch

from ..audio.files import check_samples, load_audio, resample
from ..transfers import host_zeros


def is_one(inputs) -> bool:
    """Whether this is one recording, as `read_samples` takes it, and not several."""
    if isinstance(inputs, tuple):
        return len(inputs) == 2 and isinstance(inputs[1], numbers.Real)  # samples and their rate
    kinds = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray, torch.Tensor)
    # a dict holds no recordings: `read_samples` says what to give instead
    return isinstance(inputs, (*kinds, dict)) or hasattr(inputs, "read")


def read_samples(item, sample_rate_hz: int) -> np.ndarray:
    """A path, a recording's bytes, a binary file, mono samples (numpy or torch, float in [-1, 1] or
    int16; (L,), (1, L) or (L, 1)), or a pair (samples, their rate in Hz) -> (L,) float32 or int16.

    Raises:
        ValueError, FileNotFoundError: unreadable, empty, not one-dimensional, NaN, or no sound.
    """
    if isinstance(item, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(item, "read"):
        return load_audio(item, sample_rate_hz)
    if isinstance(item, tuple):
        samples, rate_hz = item
        if not isinstance(rate_hz, numbers.Real):
            raise ValueError(f"the rate beside samples is {rate_hz!r}, expected a number of Hz")
        samples = read_samples(samples, sample_rate_hz)
        if rate_hz == sample_rate_hz:
            return samples
        if samples.dtype == np.int16:
            samples = samples / np.float32(32768)
        return resample(samples, rate_hz, sample_rate_hz)
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu()
        item = (item.float() if item.dtype == torch.bfloat16 else item).numpy()
    try:
        samples = np.asarray(item)
    except ValueError:  # a list of unequal parts
        samples = None
    if samples is None or (samples.ndim == 0 and not isinstance(item, np.ndarray)):
        raise ValueError(_what_it_is_not(item))
    if samples.ndim == 2 and 1 in samples.shape:  # as torchaudio and soundfile give one channel
        samples = samples.reshape(-1)
    if samples.ndim != 1 or samples.size == 0:
        raise ValueError(
            f"an audio array has shape {samples.shape}, expected (samples,), not empty"
        )
    if np.issubdtype(samples.dtype, np.int16):  # of either byte order
        return samples.astype(np.int16, copy=False)  # to the device as they are: half the bytes
    if not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(f"an audio array has type {samples.dtype}, expected float or int16")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused
        samples = samples.astype(np.float32, copy=False)
    check_samples(samples, "an audio array")
    return samples


def _what_it_is_not(item) -> str:
    if isinstance(item, dict) and {"array", "sampling_rate"} <= item.keys():
        return "an item is a dict of datasets; give (item['array'], item['sampling_rate'])"
    return (
        f"an item is a {type(item).__name__}, expected a path, bytes, a binary file, samples, "
        "or a tuple (samples, rate)"
    )


def read_piece(samples, sample_rate_hz: int) -> np.ndarray:
    """What a stream is fed, samples (L,) as `read_samples` takes them, of which there may be none.
    ValueError: something else, or a pair with a rate: what is resampled piece by piece has seams.
    """
    if isinstance(samples, tuple):
        raise ValueError(
            f"a stream takes samples at {sample_rate_hz} Hz and no pair; resample what comes as a "
            "whole, for example by soxr.ResampleStream"
        )
    if not isinstance(samples, torch.Tensor):
        samples = np.asarray(samples)
    if 0 in samples.shape:
        return np.zeros(0, np.float32)
    if samples.ndim == 2:  # of a short piece nobody can tell which axis is the channels'
        raise ValueError(f"a piece has shape {tuple(samples.shape)}, expected (samples,)")
    return read_samples(samples, sample_rate_hz)


def collate(
    clips: list[np.ndarray], min_duration_s: float, sample_rate_hz: int, pinned: bool = False
):
    """Clips as `read_samples` gives them -> (audio (B, L) float32 or int16, lengths (B,), seconds
    of silence put in front of each): shorter ones than `min_duration_s` get silence on both sides.
    `pinned`: in memory that a GPU reads by itself.
    """
    shortest = int(min_duration_s * sample_rate_hz)
    lengths = [max(len(clip), shortest) for clip in clips]
    all_int16 = all(clip.dtype == np.int16 for clip in clips)
    dtype = torch.int16 if all_int16 else torch.float32
    audio = host_zeros((len(clips), max(lengths)), dtype, pinned)
    shifts = []
    # Through numpy: torch takes no array that is read-only or runs backwards.
    for row, clip, length in zip(audio.numpy(), clips, lengths):
        left = (length - len(clip)) // 2
        as_float = clip.dtype == np.int16 and not all_int16
        row[left : left + len(clip)] = clip / np.float32(32768) if as_float else clip
        shifts.append(left / sample_rate_hz)
    return audio, torch.tensor(lengths, device="cpu"), shifts


def as_float(samples: torch.Tensor) -> torch.Tensor:
    """int16 as float32 in [-1, 1]; floats as they are."""
    return samples.float() / 32768.0 if samples.dtype == torch.int16 else samples


def checked_batch(audio: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Samples (B, L), float32 or int16, and lengths (B,) -> float32 in [-1, 1]. ValueError: other
    shapes."""
    if audio.dim() != 2 or lengths.shape != audio.shape[:1]:
        raise ValueError(
            f"audio is {tuple(audio.shape)} and its lengths {tuple(lengths.shape)}, "
            "expected (B, L) and (B,)"
        )
    return as_float(audio)
