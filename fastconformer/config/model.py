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
    def looks_at_all(self) -> bool:
        """Whether the features of a moment depend on the whole clip."""
        return self.preprocessor.normalize in ("per_feature", "all_features")

    @property
    def frame_seconds(self) -> float:
        """Seconds between two encoder frames."""
        pre = self.preprocessor
        # NeMo quirk kept: its times count `window_stride`, also where a hop of whole samples is
        # shorter (220 samples for 10 ms at 22,050 Hz). Not kept: they do not count a reduction.
        hop_s = pre.n_window_stride / pre.sample_rate if pre.n_window_stride else pre.window_stride
        return hop_s * self.encoder.frame_factor

    @property
    def most_weights(self) -> int:
        """Numbers in the model's tensors, at most: of each part those of its largest form, so that
        an archive can be told from a trap before it is unpacked."""
        pre, enc = self.preprocessor, self.encoder
        d, expansion = enc.d_model, enc.ff_expansion_factor
        # attention of 5 d^2 with its positions, BiRWKV7 of 4 d^2 with ranks of about 12 sqrt(d);
        # the convolution 3 d^2; then biases, norms and what grows with the kernel
        layer = (4 * expansion + 11) * d**2 + (4 * expansion + enc.conv_kernel_size + 320) * d
        layer += sum(2 * d * adapter.dim + adapter.dim + 4 * d for adapter in enc.adapters)
        total = enc.n_layers * layer + d * abs(enc.feat_out)
        channels = enc.subsampling_conv_channels if enc.subsampling_conv_channels > 0 else d
        for width, features, n_channels in (
            (enc.subsampling_factor, enc.feat_in, channels),
            (enc.reduction_factor if enc.reduces else 1, d, d),
        ):
            n_convolutions = width.bit_length() - 1
            total += n_convolutions * (9 * n_channels**2 + 11 * n_channels)
            total += d * n_channels * (features // width + 2) if n_convolutions else 0
        total += pre.n_features * (pre.fft_size + 2) + pre.window_samples
        if self.decoder:
            width = self.decoder.pred_hidden
            total += (self.decoder.vocab_size + 1) * width
            total += self.decoder.pred_rnn_layers * 8 * (width**2 + width)
        if self.joint:
            joint, n_outputs = self.joint, self.joint.vocab_size + 1 + self.joint.n_durations
            total += (joint.encoder_hidden + joint.pred_hidden + n_outputs + 3) * joint.joint_hidden
            total += n_outputs
        if self.ctc:
            total += (self.ctc.vocab_size + 1) * (self.ctc.d_in + 1)
        if self.prompts:
            total += enc.d_out * (4 * enc.d_out + 2 * self.prompts.count + 3)
        if self.aed:
            rows = 2 * self.aed.vocab_size + self.aed.max_sequence_length + 8
            total += rows * (self.aed.decoder.hidden_size + 1) + d * self.aed.decoder.hidden_size
            for stack in (self.aed.decoder, self.aed.encoder):
                if stack:
                    width = stack.hidden_size
                    each = 8 * width**2 + (2 * width + 1) * stack.inner_size + 16 * width
                    total += stack.num_layers * each + 2 * width
        return total

    @staticmethod
    def from_nemo(cfg: dict) -> "ModelConfig":
        """Reads NeMo's resolved model config.

        Raises:
            ValueError: a class or an option that is not supported, or a section that is missing;
                the message names the key.
        """
        return ModelConfig(**nemo.sections(cfg))
