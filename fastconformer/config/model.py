"""A model as numbers: the dataclass that holds all sections.

NeMo's own (resolved) config is the only record of a model; it is kept verbatim in
`ModelConfig.nemo` and everything else here is read from it.
"""

from dataclasses import dataclass

from . import nemo
from .encoder import EncoderConfig
from .heads import AEDConfig, CTCConfig, JointConfig, LossConfig, PredictionConfig, PromptsConfig
from .preprocessor import PreprocessorConfig


@dataclass(frozen=True)
class ModelConfig:
    """All that defines a model. Build it with `ModelConfig.from_nemo`. The sections of heads that
    the model does not have are None."""

    nemo: dict
    class_name: str
    heads: tuple[str, ...]  # names of the output heads, the default first
    vocab_size: int  # tokens without blank
    preprocessor: PreprocessorConfig
    encoder: EncoderConfig
    loss: LossConfig
    max_symbols: int | None
    segment_separators: tuple[str, ...]
    segment_gap_frames: int | None
    decoder: PredictionConfig | None = None
    joint: JointConfig | None = None
    ctc: CTCConfig | None = None
    aed: AEDConfig | None = None
    prompts: PromptsConfig | None = None

    @property
    def record(self) -> dict:
        """The config as a checkpoint holds it."""
        return self.nemo

    @property
    def sample_rate(self) -> int:
        return self.preprocessor.sample_rate

    @property
    def frame_seconds(self) -> float:
        """Seconds between two encoder frames."""
        pre = self.preprocessor
        # NeMo quirk kept: its times count `window_stride`, also where a hop of whole samples is
        # shorter (220 samples for 10 ms at 22,050 Hz). Not kept: they do not count a reduction.
        hop_s = pre.n_window_stride / pre.sample_rate if pre.n_window_stride else pre.window_stride
        return hop_s * self.encoder.frame_factor

    @staticmethod
    def from_nemo(cfg: dict) -> "ModelConfig":
        """Reads NeMo's resolved model config.

        Raises:
            ValueError: a class or an option that is not supported, or a section that is missing;
                the message names the key.
        """
        return ModelConfig(**nemo.sections(cfg))
