"""The model's configuration: NeMo's `model_config.yaml`, read into frozen, checked dataclasses.

NeMo's own (resolved) config is the only record of a model; it is kept verbatim in
`ModelConfig.nemo` and everything else here is parsed from it. Options that change the numbers and
that this library does not implement raise a `ValueError` naming the key; they are never guessed.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields

CTC_CLASSES = ("EncDecCTCModel", "EncDecCTCModelBPE")
TRANSDUCER_CLASSES = ("EncDecRNNTModel", "EncDecRNNTBPEModel")
HYBRID_CLASSES = ("EncDecHybridRNNTCTCModel", "EncDecHybridRNNTCTCBPEModel")


@contextlib.contextmanager
def config_errors() -> Iterator[None]:
    """What Python and torch say to a value of a kind or size that nothing here expects, as a
    ValueError; around all that is built from a config, which is untrusted."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the config holds a value that fits nothing: {reason}") from error


def _parse(cls, section: str, data: dict, ignored: tuple = (), off: dict | None = None):
    """Builds dataclass `cls` from the mapping `data`.

    `ignored` keys do not change the numbers of this library. `off` maps keys of unimplemented
    features to the values that mean "not used"; any other value is an error.
    """
    kinds = {f.name: f.type for f in fields(cls)}
    off = off or {}
    kept = {}
    for key, value in data.items():
        if key in kinds:
            if isinstance(value, str | list | dict) and not isinstance(value, kinds[key]):
                raise ValueError(f"{section}.{key} is {value!r}, expected {_named(kinds[key])}")
            kept[key] = value
        elif key in off:
            if value is not None and value not in off[key]:
                raise ValueError(
                    f"{section}.{key} is {value!r}, which is not supported; "
                    f"expected one of {off[key]}"
                )
        elif key != "_target_" and key not in ignored:
            raise ValueError(f"{section}.{key} is not a known option (its value is {value!r})")
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in kept:
            raise ValueError(f"{section}.{f.name} is missing")
    return cls(**kept)


def _named(kind) -> str:
    return getattr(kind, "__name__", str(kind))


def _require(ok: bool, message: str):
    if not ok:
        raise ValueError(message)


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
        _require(
            self.log_zero_guard_type in ("add", "clamp"),
            f"preprocessor.log_zero_guard_type is {self.log_zero_guard_type!r}, "
            "expected add or clamp",
        )
        guard = self.log_zero_guard_value
        _require(
            not isinstance(guard, str) or guard in ("tiny", "eps"),
            f"preprocessor.log_zero_guard_value is {guard!r}, expected a number, tiny or eps",
        )
        _require(
            isinstance(self.pad_to, int),
            f"preprocessor.pad_to is {self.pad_to!r}, expected an integer",
        )
        _require(
            self.mel_norm in ("slaney", None), f"preprocessor.mel_norm {self.mel_norm!r} unknown"
        )
        _require(
            self.window in ("hann", "hamming", "blackman", "bartlett", "none", None),
            f"preprocessor.window is {self.window!r}, expected hann, hamming, blackman or bartlett",
        )
        _require(
            self.window_samples > 0 and self.hop_samples > 0, "preprocessor: empty window or hop"
        )
        _require(
            self.window_samples <= self.fft_size,
            f"preprocessor: window of {self.window_samples} samples exceeds n_fft {self.fft_size}",
        )
        _require(  # the filterbank is made from these before it meets the checkpoint's
            0 < self.features <= 1 << 12 and self.fft_size <= 1 << 16,
            f"preprocessor: {self.features} features of an n_fft of {self.fft_size}, expected at "
            "most 4096 of 65536",
        )
        _require(
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

    def __post_init__(self):
        _require(
            self.subsampling in ("dw_striding", "striding"),
            f"encoder.subsampling is {self.subsampling!r}, supported are dw_striding and striding",
        )
        _require(
            self.subsampling_factor in (2, 4, 8, 16),
            f"encoder.subsampling_factor is {self.subsampling_factor}, expected 2, 4, 8 or 16",
        )
        if self.reduces:
            _require(
                self.reduction in ("striding", "pooling"),
                f"encoder.reduction is {self.reduction!r}, supported are striding and pooling",
            )
            # NeMo's lengths after pooling by more than 2 are wrong
            _require(
                self.reduction_factor in ((2,) if self.reduction == "pooling" else (2, 4, 8)),
                f"encoder.reduction_factor is {self.reduction_factor}, expected 2, or for striding "
                "2, 4 or 8",
            )
            _require(
                self.reduction_position in range(-1, self.n_layers),
                f"encoder.reduction_position is {self.reduction_position}, expected a layer or -1",
            )
            _require(
                self.self_attention_model != "rwkv7_attn",
                "encoder.reduction does not go with rwkv7_attn",
            )
        _require(
            self.self_attention_model in ("rel_pos", "rel_pos_local_attn", "rwkv7_attn"),
            f"encoder.self_attention_model is {self.self_attention_model!r}, "
            "supported are rel_pos, rel_pos_local_attn and rwkv7_attn",
        )
        _require(
            self.att_context_style in ("regular", "chunked_limited", "chunked_limited_with_rc"),
            f"encoder.att_context_style is {self.att_context_style!r}, "
            "supported are regular, chunked_limited and chunked_limited_with_rc",
        )
        norm = self.conv_norm_type
        group_norm = norm.startswith("group_norm") and norm[len("group_norm") :].isdigit()
        _require(
            norm in ("batch_norm", "layer_norm", "instance_norm") or group_norm,
            f"encoder.conv_norm_type is {norm!r}, "
            "supported are batch_norm, layer_norm, instance_norm and group_normN",
        )
        _require(self.d_model % self.n_heads == 0, "encoder.d_model must be a multiple of n_heads")
        _require(self.conv_kernel_size % 2 == 1, "encoder.conv_kernel_size must be odd")
        _require(
            self.stochastic_depth_mode in ("linear", "uniform"),
            f"encoder.stochastic_depth_mode is {self.stochastic_depth_mode!r}",
        )
        left, right = self.conv_context
        _require(
            left + right + 1 == self.conv_kernel_size,
            f"encoder.conv_context_size {self.conv_context_size} does not fit the kernel",
        )
        for left, right in self.att_contexts:
            if self.att_context_style == "chunked_limited" and left > 0 and right >= 0:
                _require(
                    left % (right + 1) == 0,
                    f"encoder.att_context_size [{left}, {right}]: "
                    "left must be a multiple of right + 1",
                )
        width = self.wkv_head_size
        _require(
            width is None or (width > 0 and self.d_model % width == 0),
            f"encoder.wkv_head_size is {width}, expected a divisor of d_model {self.d_model}",
        )
        if self.self_attention_model == "rel_pos_local_attn":
            _require(
                min(self.att_contexts[0]) >= 0 and max(self.att_contexts[0]) > 0,
                "encoder.att_context_size must be positive for rel_pos_local_attn",
            )

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


@dataclass(frozen=True)
class PredictionConfig:
    """NeMo's RNNTDecoder: an LSTM over the emitted tokens."""

    vocab_size: int
    pred_hidden: int
    pred_rnn_layers: int = 1
    dropout: float = 0.0
    blank_as_pad: bool = True


@dataclass(frozen=True)
class JointConfig:
    """NeMo's RNNTJoint. The output holds V tokens, blank, then `n_durations` duration classes."""

    vocab_size: int
    encoder_hidden: int
    pred_hidden: int
    joint_hidden: int
    activation: str = "relu"
    dropout: float = 0.0
    n_durations: int = 0

    def __post_init__(self):
        _require(
            self.activation in ("relu", "sigmoid", "tanh"),
            f"joint.jointnet.activation is {self.activation!r}, expected relu, sigmoid or tanh",
        )


@dataclass(frozen=True)
class CTCConfig:
    vocab_size: int
    d_in: int


@dataclass(frozen=True)
class LossConfig:
    """How the heads are trained. `durations` empty: RNNT."""

    durations: tuple[int, ...] = ()
    sigma: float = 0.0
    omega: float = 0.0
    fastemit_lambda: float = 0.0
    clamp: float = -1.0
    rnnt_reduction: str = "mean_batch"
    ctc_reduction: str = "mean_batch"
    ctc_weight: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """All that defines a model. Build it with `ModelConfig.from_nemo`."""

    nemo: dict
    class_name: str
    preprocessor: PreprocessorConfig
    encoder: EncoderConfig
    decoder: PredictionConfig | None
    joint: JointConfig | None
    ctc: CTCConfig | None
    loss: LossConfig
    max_symbols: int | None
    segment_separators: tuple[str, ...]
    segment_gap_frames: int | None

    @property
    def sample_rate(self) -> int:
        return self.preprocessor.sample_rate

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the output heads, the default first."""
        transducer = ("tdt" if self.loss.durations else "rnnt",) if self.joint else ()
        return transducer + (("ctc",) if self.ctc else ())

    @property
    def vocab_size(self) -> int:
        return (self.joint or self.ctc).vocab_size

    @property
    def frame_seconds(self) -> float:
        """Seconds between two encoder frames."""
        pre = self.preprocessor
        # NeMo quirk kept: its times count `window_stride`, also where a hop of whole samples is
        # shorter (220 samples for 10 ms at 22,050 Hz). Not kept: they do not count a reduction.
        hop_s = pre.n_window_stride / pre.sample_rate if pre.n_window_stride else pre.window_stride
        return hop_s * self.encoder.frame_factor

    @staticmethod
    @config_errors()
    def from_nemo(cfg: dict) -> "ModelConfig":
        """Parses NeMo's resolved model config.

        Raises:
            ValueError: a class or an option that is not supported, or a section that is missing;
                the message names the key.
        """
        cfg = copy.deepcopy(cfg)
        class_name = str(cfg.get("target", "")).rsplit(".", 1)[-1]
        has_joint, has_aux = "joint" in cfg, "aux_ctc" in cfg
        if not class_name:  # archives of the first NeMo versions do not name their class
            class_name = (
                HYBRID_CLASSES[1]
                if has_aux
                else (TRANSDUCER_CLASSES if has_joint else CTC_CLASSES)[1]
            )
        known = CTC_CLASSES + TRANSDUCER_CLASSES + HYBRID_CLASSES
        _require(
            class_name in known,
            f"target: model class {class_name!r} is not supported; "
            f"supported are {', '.join(known)}",
        )
        for section in ("preprocessor", "encoder", "decoder"):
            _require(isinstance(cfg.get(section), dict), f"the config has no section {section!r}")

        preprocessor = _parse(
            PreprocessorConfig,
            "preprocessor",
            cfg["preprocessor"],
            ignored=(
                "max_duration",
                "rng",
                "nb_max_freq",
                "stft_conv",
                "stft_exact_pad",
                "use_grads",
            ),
            off={"nb_augmentation_prob": (0, 0.0), "use_torchaudio": (False,)},
        )
        _require(
            str(cfg["preprocessor"].get("_target_", "AudioToMelSpectrogramPreprocessor")).endswith(
                "AudioToMelSpectrogramPreprocessor"
            ),
            f"preprocessor._target_ {cfg['preprocessor'].get('_target_')!r} is not supported",
        )
        _require(
            str(cfg["encoder"].get("_target_", "ConformerEncoder")).endswith("ConformerEncoder"),
            f"encoder._target_ {cfg['encoder'].get('_target_')!r} is not supported",
        )
        encoder = _parse(
            EncoderConfig,
            "encoder",
            cfg["encoder"],
            ignored=(
                "pos_emb_max_len",
                "subsampling_conv_chunking_factor",
                "use_pytorch_sdpa",
                "use_pytorch_sdpa_backends",
                "sync_max_audio_length",
                "att_chunk_context_size",
            ),
            off={
                # dcc: dynamic chunks of convolutions, which NeMo 3.0 only uses in streaming
                "conv_context_style": ("regular", "dcc"),
                "conv_dual_mode": (False,),
            },
        )
        _require(
            encoder.feat_in == preprocessor.n_features,
            f"encoder.feat_in is {encoder.feat_in} but the preprocessor gives "
            f"{preprocessor.n_features}",
        )

        decoder = joint = ctc = None
        if class_name in CTC_CLASSES:
            ctc = _ctc_head("decoder", cfg["decoder"], encoder.d_out)
        else:
            _require(isinstance(cfg.get("joint"), dict), "the config has no section 'joint'")
            joint = _joint(cfg["joint"], encoder.d_out, cfg["decoder"])
            decoder = _prediction(cfg["decoder"], joint.vocab_size)
            if class_name in HYBRID_CLASSES:
                _require(
                    isinstance(cfg.get("aux_ctc"), dict), "the config has no section 'aux_ctc'"
                )
                ctc = _ctc_head(
                    "aux_ctc.decoder", cfg["aux_ctc"].get("decoder") or {}, encoder.d_out
                )
                _require(
                    ctc.vocab_size == joint.vocab_size,
                    f"aux_ctc has {ctc.vocab_size} tokens, the joint {joint.vocab_size}",
                )
        decoding = cfg.get("decoding") or {}
        greedy = decoding.get("greedy") or {}
        max_symbols = greedy.get("max_symbols") or greedy.get("max_symbols_per_step")
        if not greedy.keys() & {"max_symbols", "max_symbols_per_step"}:
            max_symbols = 10  # of archives older than the option
        _require(
            max_symbols is None or (isinstance(max_symbols, int) and max_symbols > 0),
            f"decoding.greedy.max_symbols is {max_symbols!r}, expected at least 1, or null",
        )
        return ModelConfig(
            nemo=cfg,
            class_name=class_name,
            preprocessor=preprocessor,
            encoder=encoder,
            decoder=decoder,
            joint=joint,
            ctc=ctc,
            loss=_loss(cfg, joint, ctc),
            max_symbols=max_symbols,
            segment_separators=tuple(decoding.get("segment_seperators") or (".", "!", "?")),
            segment_gap_frames=decoding.get("segment_gap_threshold"),
        )


def _count(section: str, num_classes, vocabulary) -> int:
    """Tokens without blank, from NeMo's `num_classes` (-1: the vocabulary's length)."""
    count = num_classes if num_classes and num_classes > 0 else len(vocabulary or ())
    _require(count > 0, f"{section} names neither num_classes nor a vocabulary")
    return count


def _ctc_head(section: str, data: dict, d_encoder: int) -> CTCConfig:
    _require(data.get("add_blank", True), f"{section}.add_blank: false is not supported")
    known = ("_target_", "feat_in", "num_classes", "vocabulary", "init_mode", "add_blank")
    for key in data:
        _require(
            key in known, f"{section}.{key} is not a known option (its value is {data[key]!r})"
        )
    return CTCConfig(
        vocab_size=_count(section, data.get("num_classes"), data.get("vocabulary")),
        d_in=data.get("feat_in") or d_encoder,
    )


def _joint(data: dict, d_encoder: int, decoder: dict) -> JointConfig:
    net = data.get("jointnet") or {}
    known = ("joint_hidden", "activation", "dropout", "encoder_hidden", "pred_hidden")
    for key, value in net.items():
        _require(
            key in known or (key == "masking_prob" and (value or 0) <= 0),
            f"joint.jointnet.{key} is {value!r}, which is not supported",
        )
    ignored = [
        "_target_",
        "log_softmax",
        "preserve_memory",
        "fuse_loss_wer",
        "fused_batch_size",
        "experimental_fuse_loss_wer",
        "num_classes",
        "vocabulary",
        "jointnet",
        "num_extra_outputs",
        "experimental_pipeline",
    ]
    for key in data:
        _require(key in ignored, f"joint.{key} is not a known option (its value is {data[key]!r})")
    _require(
        str(data.get("_target_", "RNNTJoint")).endswith(".RNNTJoint") or "_target_" not in data,
        f"joint._target_ {data.get('_target_')!r} is not supported",
    )
    _require("joint_hidden" in net, "joint.jointnet.joint_hidden is missing")
    return JointConfig(
        vocab_size=_count("joint", data.get("num_classes"), data.get("vocabulary")),
        encoder_hidden=net.get("encoder_hidden") or d_encoder,
        pred_hidden=net.get("pred_hidden") or (decoder.get("prednet") or {}).get("pred_hidden"),
        joint_hidden=net["joint_hidden"],
        activation=str(net.get("activation", "relu")).lower(),
        dropout=net.get("dropout") or 0.0,
        n_durations=data.get("num_extra_outputs") or 0,
    )


def _prediction(data: dict, vocab_size: int) -> PredictionConfig:
    net = data.get("prednet") or {}
    _require("pred_hidden" in net, "decoder.prednet.pred_hidden is missing")
    _require(
        str(data.get("_target_", ".RNNTDecoder")).endswith(".RNNTDecoder"),
        f"decoder._target_ {data.get('_target_')!r} is not supported, only RNNTDecoder is",
    )
    off = {"rnn_hidden_size": (-1, 0), "normalization_mode": ()}
    known = (
        "pred_hidden",
        "pred_rnn_layers",
        "dropout",
        "t_max",
        "forget_gate_bias",
        "weights_init_scale",
        "hidden_hidden_bias_scale",
    )
    for key, value in net.items():
        _require(
            key in known or (key in off and (value is None or value in off[key])),
            f"decoder.prednet.{key} is {value!r}, which is not supported",
        )
    known = "_target_ prednet vocab_size blank_as_pad normalization_mode random_state_sampling"
    for key in data:
        _require(
            key in known.split(),
            f"decoder.{key} is not a known option (its value is {data[key]!r})",
        )
    _require(
        data.get("normalization_mode") is None,
        f"decoder.normalization_mode {data.get('normalization_mode')!r} is not supported",
    )
    _require(
        not data.get("random_state_sampling"),
        "decoder.random_state_sampling: true is not supported",
    )
    size = data.get("vocab_size")
    _require(
        not size or size < 0 or size == vocab_size,
        f"decoder.vocab_size is {size}, the joint has {vocab_size} tokens",
    )
    return PredictionConfig(
        vocab_size=vocab_size,
        pred_hidden=net["pred_hidden"],
        pred_rnn_layers=net.get("pred_rnn_layers", 1),
        dropout=net.get("dropout") or 0.0,
        blank_as_pad=data.get("blank_as_pad", True),
    )


def _loss(cfg: dict, joint: JointConfig | None, ctc: CTCConfig | None) -> LossConfig:
    loss = cfg.get("loss") or {}
    name = loss.get("loss_name") or "default"
    aux = cfg.get("aux_ctc") or {}
    common = dict(
        rnnt_reduction=cfg.get("rnnt_reduction") or "mean_batch",
        ctc_reduction=(aux if joint else cfg).get("ctc_reduction") or "mean_batch",
        ctc_weight=1.0 if joint is None else (aux.get("ctc_loss_weight", 0.5) if ctc else 0.0),
    )
    if joint is None:
        return LossConfig(**common)
    if joint.n_durations == 0:
        _require(
            name in ("default", "warprnnt", "warprnnt_numba", "pytorch", "rnnt_triton"),
            f"loss.loss_name is {name!r}, which is not supported for an RNNT joint",
        )
        kwargs = loss.get(f"{name}_kwargs") or loss.get("warprnnt_numba_kwargs") or {}
        durations = ()
    else:
        _require(
            name in ("tdt", "tdt_pytorch", "default"),
            f"loss.loss_name is {name!r}, but the joint has {joint.n_durations} extra outputs; "
            "only TDT durations are supported",
        )
        kwargs = loss.get(f"{name}_kwargs") or loss.get("tdt_kwargs") or {}
        durations = (
            kwargs.get("durations")
            or (cfg.get("decoding") or {}).get("durations")
            or (cfg.get("model_defaults") or {}).get("tdt_durations")
        )
        _require(bool(durations), "no TDT durations in loss.tdt_kwargs, decoding or model_defaults")
        _require(
            len(durations) == joint.n_durations,
            f"{len(durations)} durations but joint.num_extra_outputs is {joint.n_durations}",
        )
    known = ("durations", "sigma", "omega", "fastemit_lambda", "clamp")
    for key in kwargs:
        _require(key in known, f"loss.{name}_kwargs.{key} is not a known option")
    return LossConfig(
        durations=tuple(int(d) for d in durations),
        sigma=kwargs.get("sigma") or 0.0,
        omega=kwargs.get("omega") or 0.0,
        fastemit_lambda=kwargs.get("fastemit_lambda") or 0.0,
        clamp=kwargs.get("clamp", -1.0),
        **common,
    )
