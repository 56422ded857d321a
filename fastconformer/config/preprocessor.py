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


FBANK_WINDOWS = ("hamming", "hanning", "povey", "rectangular")


@dataclass(frozen=True)
class FbankConfig:
    """The front end's numbers. `high_hz`: upper edge of the highest filter; None: half of the
    rate. Above half of the rate, the filters are those of a front end of twice `high_hz`, of which
    the ones beyond the spectrum stay empty; their level is that front end's, too."""

    sample_rate: int = 16000
    n_mels: int = 80
    window: str = "hamming"
    window_s: float = 0.025
    hop_s: float = 0.010
    low_hz: float = 20.0
    high_hz: float | None = None
    stack: int = 7  # frames in a row
    stride: int = 6  # frames from row to row
    dither: float = 1.0  # in 16-bit steps, in training alone

    def __post_init__(self):
        if self.window not in FBANK_WINDOWS:
            raise ValueError(
                f"window is {self.window!r}, expected one of {', '.join(FBANK_WINDOWS)}"
            )
        if self.sample_rate < 1000 or self.n_mels < 1 or self.stack < 1 or self.stride < 1:
            raise ValueError(
                f"sample rate {self.sample_rate}, {self.n_mels} mel bins, {self.stack} frames "
                f"stacked every {self.stride}: expected 1000 Hz or more, and 1 or more"
            )
        if self.hop_samples < 1 or self.window_samples < self.hop_samples:
            raise ValueError(
                f"frames of {self.window_s} s every {self.hop_s} s: expected more than nothing, "
                "and the hop no longer than the frame"
            )
        if not 0 <= self.low_hz < self.top_hz:
            raise ValueError(f"mel filters from {self.low_hz} to {self.top_hz} Hz are empty")
        if self.stretch_factor != int(self.stretch_factor):
            raise ValueError(
                f"high_hz is {self.high_hz} at {self.sample_rate} Hz, expected a multiple of half "
                "of the rate"
            )

    @property
    def window_samples(self) -> int:
        return int(self.sample_rate * self.window_s)

    @property
    def hop_samples(self) -> int:
        return int(self.sample_rate * self.hop_s)

    @property
    def fft_size(self) -> int:
        return 1 << (self.window_samples - 1).bit_length()

    @property
    def top_hz(self) -> float:
        return self.sample_rate / 2 if self.high_hz is None else self.high_hz

    @property
    def stretch_factor(self) -> float:
        """How many times higher the rate is for which the filters were made."""
        return max(1.0, 2 * self.top_hz / self.sample_rate)

    @property
    def row_size(self) -> int:
        return self.stack * self.n_mels
