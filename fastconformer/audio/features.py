"""Samples -> log-mel features. Source: NeMo's AudioToMelSpectrogramPreprocessor.

Input (B, L) float32 and lengths (B,); output (B, M, T) float32 and lengths (B,). Always float32,
whatever the precision of the model.
"""

import numpy as np
import torch
from torch import nn

from ..config import PreprocessorConfig

TILE_FRAMES = 1 << 14  # of all clips, for which spectra are in memory at once
STD_GUARD = 1e-5  # NeMo's constant: added to every standard deviation


def mel_filterbank(
    sample_rate: int, n_fft: int, n_mels: int, low_hz: float, high_hz: float, norm: str | None
) -> np.ndarray:
    """Triangular filters on Slaney's mel scale, (n_mels, n_fft // 2 + 1) float32.

    Linear below 1 kHz, logarithmic above; `norm="slaney"` gives each filter unit area. The same
    numbers as librosa.filters.mel, which NeMo calls.
    """
    hz_per_mel, log_start_hz, log_step = 200.0 / 3, 1000.0, np.log(6.4) / 27.0
    log_start_mel = log_start_hz / hz_per_mel

    def to_mel(hz):
        return (
            hz / hz_per_mel
            if hz < log_start_hz
            else log_start_mel + np.log(hz / log_start_hz) / log_step
        )

    mels = np.linspace(to_mel(low_hz), to_mel(high_hz), n_mels + 2)
    edges = np.where(
        mels < log_start_mel,
        mels * hz_per_mel,
        log_start_hz * np.exp(log_step * (mels - log_start_mel)),
    )
    bins = np.fft.rfftfreq(n_fft, 1.0 / sample_rate)
    rising = (bins[None] - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins[None]) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    if norm == "slaney":  # rounded before it, as librosa does: bit-equal to what archives hold
        filters *= (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return filters


def _window(name: str | None, size: int) -> torch.Tensor | None:
    make = {
        "hann": torch.hann_window,
        "hamming": torch.hamming_window,
        "blackman": torch.blackman_window,
        "bartlett": torch.bartlett_window,
    }.get(name)
    return make(size, periodic=False, device="cpu") if make else None


class FrontEnd(nn.Module):
    """What turns samples to features: it goes to other devices, and stays in float32 when a model
    is cast (`half()`, `to(torch.bfloat16)`)."""

    def _apply(self, function, recurse=True):
        def moved(x):
            y = function(x)
            # another type than float32 is that of a checkpoint, as yet
            is_cast = x.dtype == torch.float32 and y.dtype != x.dtype
            return x.to(y.device) if is_cast else y

        return super()._apply(moved, recurse)


class FilterbankFeatures(FrontEnd):
    """Holds the window and the mel filters as buffers, as NeMo's checkpoints do."""

    def __init__(self, config: PreprocessorConfig, stft_pad: str = "zeros"):
        super().__init__()
        if stft_pad not in ("zeros", "reflect"):
            raise ValueError(f"stft_pad is {stft_pad!r}, expected zeros or reflect")
        self.config, self.stft_pad = config, stft_pad
        self.register_buffer("window", _window(config.window, config.window_samples))
        high_hz = config.highfreq or config.sample_rate / 2
        filters = mel_filterbank(
            config.sample_rate,
            config.fft_size,
            config.features,
            config.lowfreq,
            high_hz,
            config.mel_norm,
        )
        self.register_buffer("fb", torch.from_numpy(filters)[None])

    def feature_lengths(self, audio_lengths: torch.Tensor) -> torch.Tensor:
        """Valid frames for a number of samples."""
        c = self.config
        pad = (c.fft_size - c.hop_samples) // 2 if c.exact_pad else c.fft_size // 2
        frames = (audio_lengths + 2 * pad - c.fft_size) // c.hop_samples
        frames = torch.where(audio_lengths > 0, frames, torch.zeros_like(frames)).clamp(min=0)
        # before NeMo 2.5 the last, half-empty frame counted
        return frames + 1 if self.stft_pad == "reflect" else frames

    def forward(self, audio: torch.Tensor, audio_lengths: torch.Tensor, pad: bool = True):
        c = self.config
        x = audio.float()
        frames = self.feature_lengths(audio_lengths)
        if self.training and c.dither > 0:
            x = x + c.dither * torch.randn_like(x)
        if c.exact_pad:
            x = self._pad(x, audio_lengths, (c.fft_size - c.hop_samples) // 2)
        if c.preemph is not None:
            x = torch.cat((x[:, :1], x[:, 1:] - c.preemph * x[:, :-1]), dim=1)
            # a GPU would be waited for
            padded = x.is_cuda or bool((audio_lengths < x.shape[1]).any())
            if self.stft_pad == "zeros" and padded:
                # NeMo quirk kept: with exact_pad the mask is not shifted by the padding
                x = x * (torch.arange(x.shape[1], device=x.device) < audio_lengths[:, None])
        if not c.exact_pad:
            x = self._pad(x, audio_lengths, c.fft_size // 2)
        window = self.window if self.window is None else self.window.float()
        n_frames = (x.shape[1] - c.fft_size) // c.hop_samples + 1
        tile = max(1, TILE_FRAMES // max(1, x.shape[0]))
        if n_frames <= tile or x.requires_grad:
            x = self._mels(x, window)
        else:
            mels = x.new_empty(x.shape[0], self.fb.shape[1], n_frames)
            for start in range(0, n_frames, tile):
                stop = min(start + tile, n_frames)
                samples = slice(start * c.hop_samples, (stop - 1) * c.hop_samples + c.fft_size)
                mels[:, :, start:stop] = self._mels(x[:, samples], window)
            x = mels
        if c.frame_splicing > 1:
            # NeMo quirk kept: its splice_frames repeats the same frame instead of its neighbours
            x = torch.cat([x] * c.frame_splicing, dim=1)
        valid = (torch.arange(x.shape[2], device=x.device) < frames[:, None])[:, None]  # (B, 1, T)
        x = _normalize(x, frames, valid, c.normalize)
        x = x.masked_fill(~valid, c.pad_value)
        if pad and c.pad_to > 0 and x.shape[2] % c.pad_to:
            x = nn.functional.pad(x, (0, c.pad_to - x.shape[2] % c.pad_to), value=c.pad_value)
        return x, frames

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Frames of a piece of a clip: samples (B, L), padded and pre-emphasised already, -> (B, M,
        T), for normalisations that do not look at the whole clip."""
        window = self.window if self.window is None else self.window.float()
        return _normalize(self._mels(x, window), None, None, self.config.normalize)

    def _mels(self, x: torch.Tensor, window: torch.Tensor | None) -> torch.Tensor:
        """Padded samples (B, L) -> (log-)mel energies (B, M, T)."""
        c = self.config
        x = torch.stft(
            x,
            n_fft=c.fft_size,
            hop_length=c.hop_samples,
            win_length=c.window_samples,
            window=window,
            center=False,
            return_complex=True,
        )
        real, imaginary = torch.view_as_real(x).unbind(-1)
        # power, (B, F, T); square().sum(-1) has the same bits and takes twice as long
        x = real * real + imaginary * imaginary
        if c.mag_power != 2.0:
            x = x.sqrt() if c.mag_power == 1.0 else x.sqrt().pow(c.mag_power)
        with torch.autocast(x.device.type, enabled=False):
            x = self.fb.float() @ x  # (B, M, T)
        if c.log:
            guard = c.log_zero_guard_value
            guard = getattr(torch.finfo(x.dtype), guard) if isinstance(guard, str) else guard
            x = torch.log(x + guard if c.log_zero_guard_type == "add" else x.clamp(min=guard))
        return x

    def _pad(self, x: torch.Tensor, audio_lengths: torch.Tensor, pad: int) -> torch.Tensor:
        """`pad` samples on both sides of each clip: zeros, or its mirror image."""
        if self.stft_pad == "zeros":
            return nn.functional.pad(x, (pad, pad))
        if bool((audio_lengths <= pad).any()):
            raise ValueError(
                f"stft_pad='reflect' needs more than {pad} samples, got "
                f"{int(audio_lengths.min())}; pad the clip with silence"
            )
        # Each clip is mirrored at its own end, so that a clip alone equals the clip in a batch.
        # NeMo before 2.5 mirrored the padded batch: equal for the longest clip only.
        last = (audio_lengths - 1)[:, None]
        index = torch.arange(-pad, x.shape[1] + pad, device=x.device)[None].abs()
        index = torch.where(index > last, 2 * last - index, index)
        beyond = index < 0
        return x.gather(1, index.clamp(min=0).expand(x.shape[0], -1)).masked_fill(beyond, 0.0)


def _normalize(x, frames, valid, kind):
    """Mean and unbiased deviation over the valid frames; unknown names mean none, as in NeMo."""
    if kind == "per_feature":
        count, dims = frames.to(x.dtype)[:, None, None], (2,)
    elif kind == "all_features":
        count, dims = (frames * x.shape[1]).to(x.dtype)[:, None, None], (1, 2)
    elif isinstance(kind, dict) and "fixed_mean" in kind and "fixed_std" in kind:
        mean = torch.tensor(kind["fixed_mean"], device=x.device, dtype=x.dtype)[:, None]
        std = torch.tensor(kind["fixed_std"], device=x.device, dtype=x.dtype)[:, None]
        return (x - mean) / std
    else:
        return x

    def total(function):  # over time in pieces, so that a long input has no copy of its size
        pieces = zip(x.split(TILE_FRAMES, 2), valid.split(TILE_FRAMES, 2))
        return sum(function(y, is_valid).sum(dims, keepdim=True) for y, is_valid in pieces)

    mean = total(lambda y, is_valid: y * is_valid) / count
    # Of digital silence the mean is its one value, in any batch: NeMo's differs from it by a
    # rounding, which a deviation of 0 blows up to 0.4.
    first = x[:, : 1 if kind == "all_features" else None, :1]
    constant = total(lambda y, is_valid: (y != first) & is_valid) == 0
    mean = torch.where(constant, first, mean)
    variance = total(lambda y, is_valid: ((y - mean) * is_valid).square()) / (count - 1)
    std = variance.sqrt().nan_to_num(nan=0.0)  # a single frame has no deviation
    if x.shape[2] > TILE_FRAMES and not x.requires_grad:
        return x.sub_(mean).div_(std + STD_GUARD)
    return (x - mean) / (std + STD_GUARD)


class Preprocessor(nn.Module):
    """NeMo's `preprocessor`; its featurizer holds the buffers."""

    def __init__(self, config: PreprocessorConfig, stft_pad: str = "zeros"):
        super().__init__()
        self.featurizer = FilterbankFeatures(config, stft_pad)

    @property
    def description(self) -> str:
        """What it hears, in a line."""
        c = self.featurizer.config
        return f"{c.sample_rate} Hz, {c.features} mel bins"

    def augmented(self, features, lengths, mask, rows: bool = False) -> torch.Tensor:
        """`mask(features, lengths)`; other front ends have rows that hold several frames."""
        return mask(features, lengths)

    def forward(self, audio: torch.Tensor, audio_lengths: torch.Tensor, pad: bool = True):
        """(B, L) samples in [-1, 1], (B,) -> (B, M, T) features, (B,) valid frames. With `pad`, T
        is a multiple of the config's `pad_to`."""
        return self.featurizer(audio, audio_lengths, pad)
