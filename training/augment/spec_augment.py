"""SpecAugment: random bands of mel bins and of frames, and rectangles, are set to zero; training
only.

Input: features (B, M, T) and lengths (B,) from `model.featurize`; output: features of that shape.
Source: Park et al. 2019 (arXiv:1904.08779) and, for rectangles, DeVries and Taylor 2017
(arXiv:1708.04552), with the distributions of NeMo 3.0's SpectrogramAugmentation: its vectorised
SpecAugment, draw for draw where torch's generator is the same, and its SpecCutout.
"""

import torch
from torch import Tensor

from fastconformer.transfers import sent


def spec_augment(
    features: Tensor,
    lengths: Tensor,
    freq_masks: int,
    time_masks: int,
    freq_width: int,
    time_width: int | float,
    rect_masks: int = 0,
    rect_time: int = 5,
    rect_freq: int = 20,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mask random bands and rectangles of each clip with zeros; the input is left as it is.

    Args:
        features: log-mel frames, (B, M, T).
        lengths: valid frames of each clip, (B,); time masks start and end inside them.
        freq_masks: bands of mel bins for each clip.
        time_masks: bands of frames for each clip.
        freq_width: bands are of 0 to freq_width - 1 mel bins, uniform.
        time_width: w, in frames (int), or as a share of the clip's frames (float); bands are of
            floor(u * w) frames, u uniform in 0..1, and lie anywhere in the clip.
        rect_masks: rectangles for each clip.
        rect_time: longest rectangle in frames; each is uniform in 0..rect_time.
        rect_freq: highest rectangle in mel bins; each is uniform in 0..rect_freq.
        generator: CPU generator; the masks depend on it, on the shape and on the lengths only,
            so that they are the same on every device.
    Returns:
        (B, M, T), a new tensor.
    Raises:
        ValueError: freq_width or rect_freq is above M, or a float time_width is not in 0..1.
    """
    n_clips, n_mels, n_frames = features.shape
    for name, width in (("freq_width", freq_width), ("rect_freq", rect_freq if rect_masks else 0)):
        if width > n_mels:
            raise ValueError(f"{name} is {width}, but the features have {n_mels} mel bins")
    if isinstance(time_width, float) and not 0.0 <= time_width <= 1.0:
        raise ValueError(f"time_width is {time_width}, expected a share 0..1, or an int of frames")
    lengths = lengths.cpu().long()

    def uniform(n_masks: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.rand(n_clips, n_masks, generator=generator, dtype=dtype)

    def bands(n_masks: int, widest, room: int | Tensor, size: int) -> Tensor:
        """NeMo's draws, in its order and type: floor(u * widest), then a place that has room."""
        widths = (uniform(n_masks, torch.float32) * widest).long()
        starts = (uniform(n_masks, torch.float32) * (room - widths)).long()
        return _bands(starts, widths, size)

    widest = time_width
    if isinstance(time_width, float):
        widest = (time_width * lengths).clamp(max=n_frames)[:, None]  # (B, 1), no whole number
    frames = bands(time_masks, widest, lengths[:, None], n_frames)
    mask = frames[:, None, :] | bands(freq_masks, freq_width, n_mels, n_mels)[:, :, None]
    if rect_masks:
        starts = (uniform(rect_masks) * (n_mels - rect_freq + 1)).long()
        widths = (uniform(rect_masks) * (rect_freq + 1)).long()
        bins = _each_band(starts, widths, n_mels)  # (B, n, M)
        # Inside the clip, so that its neighbours' lengths do not matter; NeMo: anywhere up to T.
        longest = lengths.clamp(max=rect_time)[:, None]
        starts = (uniform(rect_masks) * (lengths[:, None] - longest + 1)).long()
        widths = (uniform(rect_masks) * (longest + 1)).long()
        frames = _each_band(starts, widths, n_frames)  # (B, n, T)
        for rect in range(rect_masks):
            mask = mask | (bins[:, rect, :, None] & frames[:, rect, None, :])
    return features.masked_fill(sent(mask, features.device), 0.0)


def _bands(starts: Tensor, widths: Tensor, size: int) -> Tensor:
    """starts, widths (B, n) -> (B, size), True inside any band."""
    return _each_band(starts, widths, size).any(dim=1)


def _each_band(starts: Tensor, widths: Tensor, size: int) -> Tensor:
    """starts, widths (B, n) -> (B, n, size), True inside the band."""
    position = torch.arange(size)
    begin, end = starts[:, :, None], (starts + widths)[:, :, None]
    return (position >= begin) & (position < end)
