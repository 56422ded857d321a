"""The encoder's numbers: what NeMo's encoder section says."""

from dataclasses import dataclass

from .checks import require

# of NeMo's adapters -> the module of torch.nn
ADAPTER_ACTIVATIONS = {
    "identity": "Identity",
    "hardtanh": "Hardtanh",
    "relu": "ReLU",
    "selu": "SELU",
    "swish": "SiLU",
    "silu": "SiLU",
    "gelu": "GELU",
}


def output_length(length, factor: int, causal: bool):
    """Frames, or bins, after subsampling by a power of two: of an int or an integer tensor."""
    return (length + factor - 2) // factor + 1 if causal else (length - 1) // factor + 1


@dataclass(frozen=True)
class AdapterConfig:
    """NeMo's LinearAdapter behind each layer: x + adapter(x)."""

    name: str
    in_features: int
    dim: int
    activation: str = "swish"
    norm_position: str = "pre"
    dropout: float = 0.0

    def __post_init__(self):
        known = {"activation": ADAPTER_ACTIVATIONS, "norm_position": ("pre", "post")}
        for key, values in known.items():
            value = getattr(self, key)
            require(
                value in values,
                f"adapters.{self.name}.{key} is {value!r}, supported are {', '.join(values)}",
            )


@dataclass(frozen=True)
class EncoderConfig:
    """NeMo's ConformerEncoder."""

    feat_in: int
    n_layers: int
    d_model: int
    feat_out: int = -1
    causal_downsampling: bool = False
    subsampling: str = "striding"
    subsampling_factor: int = 4
    subsampling_conv_channels: int = -1
    reduction: str | None = None  # a second subsampling after layer `reduction_position`, -1: at
    reduction_position: int | None = None  # the end
    reduction_factor: int = 1
    ff_expansion_factor: int = 4
    self_attention_model: str = "rel_pos"
    n_heads: int = 4
    att_context_size: list | None = None
    att_context_probs: list | None = None
    att_context_style: str = "regular"
    xscaling: bool = True
    untie_biases: bool = True
    conv_kernel_size: int = 31
    conv_norm_type: str = "batch_norm"
    conv_context_size: list | str | None = None
    use_bias: bool = True
    dropout: float = 0.1
    dropout_pre_encoder: float = 0.1
    dropout_emb: float = 0.1
    dropout_att: float = 0.0
    stochastic_depth_drop_prob: float = 0.0
    stochastic_depth_mode: str = "linear"
    stochastic_depth_start_layer: int = 1
    global_tokens: int = 0
    global_tokens_spacing: int = 1
    global_attn_separate: bool = False
    wkv_head_size: int | None = None  # of BiRWKV7's recurrence, and ours; None: as the fork
    adapters: tuple[AdapterConfig, ...] = ()  # those that are enabled, in order

    def __post_init__(self):
        require(
            self.subsampling in ("dw_striding", "striding"),
            f"encoder.subsampling is {self.subsampling!r}, supported are dw_striding and striding",
        )
        require(
            self.subsampling_factor in (2, 4, 8, 16),
            f"encoder.subsampling_factor is {self.subsampling_factor}, expected 2, 4, 8 or 16",
        )
        if self.reduces:
            require(
                self.reduction in ("striding", "pooling"),
                f"encoder.reduction is {self.reduction!r}, supported are striding and pooling",
            )
            # NeMo's lengths after pooling by more than 2 are wrong
            require(
                self.reduction_factor in ((2,) if self.reduction == "pooling" else (2, 4, 8)),
                f"encoder.reduction_factor is {self.reduction_factor}, expected 2, or for striding "
                "2, 4 or 8",
            )
            require(
                self.reduction_position in range(-1, self.n_layers),
                f"encoder.reduction_position is {self.reduction_position}, expected a layer or -1",
            )
            require(
                self.self_attention_model != "rwkv7_attn",
                "encoder.reduction does not go with rwkv7_attn",
            )
        require(
            self.self_attention_model in ("rel_pos", "rel_pos_local_attn", "rwkv7_attn"),
            f"encoder.self_attention_model is {self.self_attention_model!r}, "
            "supported are rel_pos, rel_pos_local_attn and rwkv7_attn",
        )
        require(
            self.att_context_style in ("regular", "chunked_limited", "chunked_limited_with_rc"),
            f"encoder.att_context_style is {self.att_context_style!r}, "
            "supported are regular, chunked_limited and chunked_limited_with_rc",
        )
        norm = self.conv_norm_type
        group_norm = norm.startswith("group_norm") and norm[len("group_norm") :].isdigit()
        require(
            norm in ("batch_norm", "layer_norm", "instance_norm") or group_norm,
            f"encoder.conv_norm_type is {norm!r}, "
            "supported are batch_norm, layer_norm, instance_norm and group_normN",
        )
        for adapter in self.adapters:
            require(
                adapter.in_features == self.d_model,
                f"adapters.{adapter.name}.in_features is {adapter.in_features}, expected d_model "
                f"{self.d_model}",
            )
        require(self.d_model % self.n_heads == 0, "encoder.d_model must be a multiple of n_heads")
        require(self.conv_kernel_size % 2 == 1, "encoder.conv_kernel_size must be odd")
        require(
            self.stochastic_depth_mode in ("linear", "uniform"),
            f"encoder.stochastic_depth_mode is {self.stochastic_depth_mode!r}",
        )
        require(
            0 <= self.stochastic_depth_drop_prob < 1,
            f"encoder.stochastic_depth_drop_prob is {self.stochastic_depth_drop_prob}, expected "
            "0 <= p < 1",
        )
        require(
            1 <= self.stochastic_depth_start_layer <= self.n_layers,
            f"encoder.stochastic_depth_start_layer is {self.stochastic_depth_start_layer}, "
            f"expected 1 to n_layers, {self.n_layers}",
        )
        left, right = self.conv_context
        require(
            left + right + 1 == self.conv_kernel_size,
            f"encoder.conv_context_size {self.conv_context_size} does not fit the kernel",
        )
        for left, right in self.att_contexts:
            if self.att_context_style == "chunked_limited" and left > 0 and right >= 0:
                require(
                    left % (right + 1) == 0,
                    f"encoder.att_context_size [{left}, {right}]: "
                    "left must be a multiple of right + 1",
                )
        width = self.wkv_head_size
        require(
            width is None or (width > 0 and self.d_model % width == 0),
            f"encoder.wkv_head_size is {width}, expected a divisor of d_model {self.d_model}",
        )
        if self.self_attention_model == "rel_pos_local_attn":
            require(
                min(self.att_contexts[0]) >= 0 and max(self.att_contexts[0]) > 0,
                "encoder.att_context_size must be positive for rel_pos_local_attn",
            )

    @property
    def attends_to_all(self) -> bool:
        """Whether attention is of all pairs of frames, and its cost quadratic."""
        return self.self_attention_model == "rel_pos"

    @property
    def takes_local_attention(self) -> bool:
        """Whether the same weights can attend to the frames near by instead of to all."""
        return self.attends_to_all and self.att_contexts[0] == (-1, -1)

    @property
    def mixes_clips(self) -> bool:
        """Whether a clip's numbers depend on how long the others of its batch are."""
        return self.conv_norm_type not in ("batch_norm", "layer_norm")

    @property
    def reduces(self) -> bool:
        return bool(self.reduction) and self.reduction_factor > 1

    @property
    def frame_factor(self) -> int:
        """Feature frames to one frame of the encoder's output."""
        return self.subsampling_factor * (self.reduction_factor if self.reduces else 1)

    @property
    def att_contexts(self) -> list[tuple[int, int]]:
        """All (left, right) contexts in frames, -1 unlimited; the first is used in evaluation."""
        if self.att_context_style == "chunked_limited_with_rc":
            # Parakeet unified: contexts of (left, chunk, right) are for streaming alone; NeMo 3.0
            # attends to everything otherwise, whatever is configured
            return [(-1, -1)]
        sizes = self.att_context_size or [-1, -1]
        return [tuple(s) for s in (sizes if isinstance(sizes[0], (list, tuple)) else [sizes])]

    @property
    def conv_context(self) -> tuple[int, int]:
        """Frames to the left and right that the depthwise convolution sees."""
        if self.conv_context_size == "causal":
            return self.conv_kernel_size - 1, 0
        if self.conv_context_size:
            return tuple(self.conv_context_size)
        half = (self.conv_kernel_size - 1) // 2
        return half, half

    @property
    def d_out(self) -> int:
        return self.feat_out if self.feat_out > 0 else self.d_model
