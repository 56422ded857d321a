"""The features' numbers: what NeMo's preprocessor section says."""

from dataclasses import dataclass

from .checks import require


@dataclass(frozen=True)
class PreprocessorConfig:
    """NeMo's AudioToMelSpectrogramPreprocessor; times in seconds, frequencies in Hz."""

    sample_rate: int = 16000
    window_size: float | None = 0.02
    window_stride: float | None = 0.01
    n_window_size: int | None = None
    n_window_stride: int | None = None
    window: str | None = "hann"
    normalize: str | dict | None = "per_feature"
    n_fft: int | None = None
    preemph: float | None = 0.97
    features: int = 64
    lowfreq: float = 0
    highfreq: float | None = None
    log: bool = True
    log_zero_guard_type: str = "add"
    log_zero_guard_value: float | str = 2**-24
    dither: float = 1e-5
    pad_to: int = 16
    pad_value: float = 0.0
    frame_splicing: int = 1
    exact_pad: bool = False
    mag_power: float = 2.0
    mel_norm: str | float | None = "slaney"

    def __post_init__(self):
        require(
            self.log_zero_guard_type in ("add", "clamp"),
            f"preprocessor.log_zero_guard_type is {self.log_zero_guard_type!r}, "
            "expected add or clamp",
        )
        guard = self.log_zero_guard_value
        require(
            not isinstance(guard, str) or guard in ("tiny", "eps"),
            f"preprocessor.log_zero_guard_value is {guard!r}, expected a number, tiny or eps",
        )
        require(
            isinstance(self.pad_to, int),
            f"preprocessor.pad_to is {self.pad_to!r}, expected an integer",
        )
        require(
            self.mel_norm in ("slaney", None), f"preprocessor.mel_norm {self.mel_norm!r} unknown"
        )
        require(
            self.window in ("hann", "hamming", "blackman", "bartlett", "none", None),
            f"preprocessor.window is {self.window!r}, expected hann, hamming, blackman or bartlett",
        )
        require(
            self.window_samples > 0 and self.hop_samples > 0, "preprocessor: empty window or hop"
        )
        require(
            self.window_samples <= self.fft_size,
            f"preprocessor: window of {self.window_samples} samples exceeds n_fft {self.fft_size}",
        )
        require(  # the filterbank is made from these before it meets the checkpoint's
            0 < self.features <= 1 << 12 and self.fft_size <= 1 << 16,
            f"preprocessor: {self.features} features of an n_fft of {self.fft_size}, expected at "
            "most 4096 of 65536",
        )
        require(
            not (self.exact_pad and self.hop_samples % 2),
            "preprocessor.exact_pad needs an even hop",
        )

    @property
    def window_samples(self) -> int:
        return self.n_window_size or int(self.window_size * self.sample_rate)

    @property
    def hop_samples(self) -> int:
        return self.n_window_stride or int(self.window_stride * self.sample_rate)

    @property
    def fft_size(self) -> int:
        return self.n_fft or 1 << (self.window_samples - 1).bit_length()

    @property
    def n_features(self) -> int:
        return self.features * self.frame_splicing
