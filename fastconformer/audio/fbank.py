"""Samples -> Kaldi's log-mel filterbank, neighbouring frames stacked: FunASR's features.

Letters as everywhere, and N frames of 10 ms before stacking; T rows after it.

    frame   25 ms every 10 ms, whole ones only; times 32768; minus its mean; pre-emphasis 0.97
            with the first sample repeated; Hamming window; zeros up to a power of two
    bin     log max(1.19e-7, sum of a triangle over the power spectrum)
    row t   frames 6t - 3 ... 6t + 3; outside the clip its first or last frame

Source: Kaldi's feature-fbank and mel-computations, with the options of FunASR's WavFrontend.
"""

import math

import torch
from torch import Tensor, nn

from ..config.preprocessor import FbankConfig
from .features import FrontEnd

PCM_SCALE = 32768.0  # the models were trained on 16-bit samples, not on [-1, 1]
PREEMPHASIS = 0.97
FLOOR = 1.1920928955078125e-07  # float32's epsilon, Kaldi's least energy
TILE_FRAMES = 1 << 14  # of all clips, for which spectra are in memory at once


def _hamming(size: int) -> Tensor:
    return torch.hamming_window(size, periodic=False, dtype=torch.float64, device="cpu")


WINDOWS = {
    "hamming": _hamming,
    "hanning": lambda size: torch.hann_window(size, False, dtype=torch.float64, device="cpu"),
    "povey": lambda size: torch.hann_window(size, False, dtype=torch.float64, device="cpu") ** 0.85,
    "rectangular": lambda size: torch.ones(size, dtype=torch.float64, device="cpu"),
}


def kaldi_filters(rate: float, fft_size: int, n_mels: int, low_hz: float, high_hz: float) -> Tensor:
    """Triangles, straight on the scale mel = 1127 ln(1 + f / 700), (n_mels, fft_size // 2 + 1)
    float64. The bin at half of the rate counts nothing, as in Kaldi."""

    def mel(hz):
        return 1127.0 * math.log(1.0 + hz / 700.0)

    edges = torch.linspace(mel(low_hz), mel(high_hz), n_mels + 2, dtype=torch.float64, device="cpu")
    hz = torch.arange(fft_size // 2 + 1, dtype=torch.float64, device="cpu") * rate / fft_size
    mels = 1127.0 * torch.log(1.0 + hz / 700.0)[None]
    left, center, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (mels - left) / (center - left)
    falling = (right - mels) / (right - center)
    filters = torch.minimum(rising, falling).clamp(min=0.0)
    filters[:, -1] = 0.0
    return filters


def _filters(config: FbankConfig) -> Tensor:
    factor = int(config.stretch_factor)
    if factor == 1:
        shape = config.sample_rate, config.fft_size, config.n_mels, config.low_hz, config.top_hz
        return kaldi_filters(*shape)
    rate, size = factor * config.sample_rate, factor * config.fft_size
    filters = kaldi_filters(rate, size, config.n_mels, config.low_hz, config.top_hz)
    bins = config.fft_size // 2 + 1
    # The same tone has the same level: the longer window sums more samples, and pre-emphasis of
    # neighbours that are closer in time has another slope.
    hz = torch.arange(bins, dtype=torch.float64) * config.sample_rate / config.fft_size
    gain = factor**2 * _emphasis(hz, rate) / _emphasis(hz, config.sample_rate)
    return filters[:, :bins] * gain


def _emphasis(hz: Tensor, rate: float) -> Tensor:
    return 1 + PREEMPHASIS**2 - 2 * PREEMPHASIS * torch.cos(2 * math.pi * hz / rate)


class Fbank(FrontEnd):
    """The front end. It has no weights, and nothing of it is in a checkpoint."""

    def __init__(self, config: FbankConfig):
        super().__init__()
        self.config = config
        window = WINDOWS[config.window](config.window_samples)
        self.register_buffer("window", window.float(), persistent=False)
        self.register_buffer("filters", _filters(config).float(), persistent=False)

    @property
    def description(self) -> str:
        """What it hears, in a line."""
        c, empty = self.config, int((self.filters.sum(1) == 0).sum())
        text = f"{c.sample_rate} Hz, {c.n_mels} mel bins of {c.low_hz:g} to {c.top_hz:g} Hz"
        return text + (f", {empty} of them empty" if empty else "")

    def frame_lengths(self, audio_lengths: Tensor) -> Tensor:
        """Frames of 10 ms for a number of samples. What is shorter than one window counts as one
        frame, with zeros behind it (the reference implementations do not agree there)."""
        c = self.config
        frames = (audio_lengths - c.window_samples).div(c.hop_samples, rounding_mode="floor") + 1
        return torch.where(audio_lengths > 0, frames.clamp(min=1), torch.zeros_like(frames))

    def feature_lengths(self, audio_lengths: Tensor) -> Tensor:
        """Rows for a number of samples."""
        return self.row_lengths(self.frame_lengths(audio_lengths))

    def row_lengths(self, frame_lengths: Tensor) -> Tensor:
        """Rows for a number of frames."""
        stride = self.config.stride
        return (frame_lengths + stride - 1).div(stride, rounding_mode="floor")

    def forward(self, audio: Tensor, audio_lengths: Tensor, pad: bool = True):
        """(B, L) samples in [-1, 1], (B,) -> (B, 7 M, T) float32, zeros beyond each clip's end,
        and (B,) rows. `pad` is there for the other front end's sake, and changes nothing."""
        frames, lengths = self.frames(audio, audio_lengths)
        return self.stack(frames, lengths)

    def augmented(self, features: Tensor, lengths: Tensor, mask, rows: bool = False) -> Tensor:
        """Rows (B, 7 M, T) with zeros where `mask` puts them into log-mel frames of ones.

        Args:
            mask: (ones (B, M, N), lengths (B,)) -> the same with zeros; N is of frames of 10 ms, so
                that a masked frame is masked in each row that holds it.
            rows: N is of rows instead (60 ms), and bins are masked in each of their frames, as in
                FunASR's SpecAugLFR.
        """
        c, n_rows = self.config, features.shape[2]
        if rows:
            kept = mask(features.new_ones(len(features), c.n_mels, n_rows), lengths)
            kept = kept.repeat(1, c.stack, 1)
        else:
            n_frames = lengths * c.stride
            kept = mask(features.new_ones(len(features), c.n_mels, n_rows * c.stride), n_frames)
            kept, _ = self.stack(kept, n_frames)
            beyond = torch.arange(n_rows, device=features.device) >= lengths[:, None]
            kept = kept.masked_fill(beyond[:, None], 1.0)
        return features * kept

    def frames(self, audio: Tensor, audio_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L), (B,) -> log-mel frames (B, M, N) and (B,) their number, before stacking."""
        c, lengths = self.config, self.frame_lengths(audio_lengths)
        beyond = torch.arange(audio.shape[1], device=audio.device) >= audio_lengths[:, None]
        audio = audio.float().masked_fill(beyond, 0.0)
        n_frames = int(lengths.max()) if len(lengths) else 0
        needed = (n_frames - 1) * c.hop_samples + c.window_samples
        if audio.shape[1] < needed:
            audio = nn.functional.pad(audio, (0, needed - audio.shape[1]))
        if n_frames == 0:
            return audio.new_zeros(len(audio), c.n_mels, 0), lengths
        tile = max(1, TILE_FRAMES // max(1, len(audio)))
        bins = []
        for first in range(0, n_frames, tile):
            last = min(first + tile, n_frames) - 1
            samples = audio[:, first * c.hop_samples : last * c.hop_samples + c.window_samples]
            bins.append(self._bins(samples))
        return torch.cat(bins, dim=2), lengths

    def _bins(self, audio: Tensor) -> Tensor:
        c = self.config
        x = audio.unfold(1, c.window_samples, c.hop_samples) * PCM_SCALE  # (B, N, window)
        if self.training and c.dither > 0:
            x = x + c.dither * torch.randn_like(x)
        x = x - x.mean(-1, keepdim=True)
        x = x - PREEMPHASIS * torch.cat((x[..., :1], x[..., :-1]), dim=-1)
        spectrum = torch.fft.rfft(x * self.window, n=c.fft_size)
        power = torch.view_as_real(spectrum).square().sum(-1)  # (B, N, F)
        with torch.autocast(power.device.type, enabled=False):  # float16 ends at 65504
            return (self.filters @ power.transpose(1, 2)).clamp(min=FLOOR).log()

    def stack(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (B, M, N) and their number (B,) -> rows (B, 7 M, T) and theirs (B,)."""
        c, rows = self.config, self.row_lengths(lengths)
        n_rows = int(rows.max()) if len(rows) else 0
        if n_rows == 0:
            return frames.new_zeros(len(frames), c.row_size, 0), rows
        offsets = torch.arange(c.stack, device=frames.device) - (c.stack - 1) // 2
        index = torch.arange(n_rows, device=frames.device)[:, None] * c.stride + offsets  # (T, 7)
        index = index.clamp(min=0)[None].expand(len(frames), -1, -1)
        index = torch.minimum(index, (lengths - 1).clamp(min=0)[:, None, None])
        picked = frames.transpose(1, 2).gather(
            1, index.reshape(len(frames), -1, 1).expand(-1, -1, c.n_mels)
        )  # (B, T * 7, M)
        stacked = picked.reshape(len(frames), n_rows, c.row_size).transpose(1, 2)
        beyond = torch.arange(n_rows, device=frames.device) >= rows[:, None]
        return stacked.masked_fill(beyond[:, None], 0.0), rows
