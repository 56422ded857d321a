"""Fun-ASR-Nano's config: the one file that knows the keys of FunASR's `config.yaml`.

The resolved `config.yaml` is the only record of a model; it is kept verbatim in
`FunASRConfig.funasr`, together with two sections of ours: `llm_config`, the language model's own
config.json, and `files`, which names the tokenizers' files. Options that change the numbers and
that this library does not implement raise a ValueError naming the key.
"""

import copy
import dataclasses
from dataclasses import dataclass

from .checks import config_errors, require
from .preprocessor import FbankConfig

MODEL_NAME = "FunASRNano"
MODEL_TYPES = ("qwen3",)
MEL_EDGES = ("keep", "stretch")
DEFAULT_CTC_CLASSES = 60515  # FunASR's, where the config does not say


@dataclass(frozen=True)
class Qwen3Config:
    """The numbers of Qwen3's config.json that its computation depends on."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = True
    eos_token_id: int = 0
    max_positions: int = 40960

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "n_heads", "n_kv_heads")
        for name in (*sizes, "n_layers", "head_dim", "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"the language model's {name} is {value!r}, expected 1 or more")
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ValueError(
                f"the language model has {self.n_heads} heads, {self.n_kv_heads} for keys, of "
                f"width {self.head_dim}; expected a multiple and an even width"
            )


@dataclass(frozen=True)
class SANMConfig:
    """SenseVoiceEncoderSmall: rows of `d_in` features -> `d_model`."""

    d_in: int
    d_model: int = 256
    n_heads: int = 4
    d_inner: int = 2048
    n_blocks: int = 6
    n_tp_blocks: int = 0
    kernel: int = 11
    dropout: float = 0.1
    attention_dropout: float = 0.0

    att_contexts = ((-1, -1),)  # of all rows, as `EncoderConfig` says it
    attends_to_all = True
    takes_local_attention = False
    mixes_clips = False


@dataclass(frozen=True)
class AdaptorConfig:
    """FunASR's adaptor `Transformer`, also that of the CTC branch."""

    d_in: int
    d_inner: int
    d_out: int
    n_layers: int = 2
    n_heads: int = 8
    downsample: int = 1
    dropout: float = 0.0
    attention_dropout: float = 0.0


@dataclass(frozen=True)
class FunASRConfig:
    """All that defines a model. Build it with `FunASRConfig.from_funasr`. `ctc`: the CTC branch's
    decoder; None: the model has none. `low_frame_rate`: the language model is given the first
    eighth of the adaptor's rows alone."""

    funasr: dict
    frontend: FbankConfig
    encoder: SANMConfig
    adaptor: AdaptorConfig
    llm: Qwen3Config
    ctc: AdaptorConfig | None
    ctc_classes: int  # blank, the last, included
    n_languages: int
    low_frame_rate: bool = True
    system_prompt: bool = True
    think: bool = True
    ctc_weight: float = 0.3
    llm_reduction: str = "mean_volume"  # over all tokens of a batch, as FunASR
    ctc_reduction: str = "mean_volume"

    segment_separators = (".", "?", "!", "。", "？", "！")
    segment_gap_frames = None
    looks_at_all = True  # its encoder does: silence at a clip's ends would be heard
    prompts = None  # between encoder and heads, as some of NeMo's models have them

    @property
    def record(self) -> dict:
        """The config as a checkpoint holds it."""
        return self.funasr

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads, the default first."""
        return ("llm", "ctc") if self.ctc else ("llm",)

    @property
    def sample_rate(self) -> int:
        return self.frontend.sample_rate

    @property
    def frame_seconds(self) -> float:
        """Seconds between two encoder rows."""
        return self.frontend.stride * self.frontend.hop_s

    @property
    def vocab_size(self) -> int:
        """CTC's tokens without blank."""
        return self.ctc_classes - 1

    def changed(self, **options) -> "FunASRConfig":
        """The config with these keys of its record, such as ctc_weight."""
        changed = FunASRConfig.from_funasr(copy.deepcopy(self.funasr) | options)
        return changed if self.ctc else changed.without_ctc()

    def with_dropout(self, probability: float) -> "FunASRConfig":
        """Of the encoder's layers and their attention."""
        names = "dropout_rate", "positional_dropout_rate", "attention_dropout_rate"
        section = self.funasr["audio_encoder_conf"] | dict.fromkeys(names, probability)
        return self.changed(audio_encoder_conf=section)

    def without_ctc(self) -> "FunASRConfig":
        """The same model whose CTC weights are not there."""
        return dataclasses.replace(self, ctc=None)

    def with_sample_rate(self, rate_hz: int, mel_edges: str = "keep") -> "FunASRConfig":
        """A front end of another rate before the same weights.

        Args:
            mel_edges: "keep": filters stay where they were, those above half of the new rate are
                empty; "stretch": as FunASR's `frontend_conf.fs`, all filters below half of the new
                rate, each at another frequency than the encoder was trained with.
        Raises:
            ValueError: a rate above the model's or no whole part of it, another mel_edges.
        """
        if mel_edges not in MEL_EDGES:
            raise ValueError(f"mel_edges is {mel_edges!r}, expected {' or '.join(MEL_EDGES)}")
        if rate_hz == self.sample_rate:
            return self
        if rate_hz > self.sample_rate or self.sample_rate % rate_hz:
            raise ValueError(
                f"the sample rate is {rate_hz}, the model's is {self.sample_rate}; give a half or "
                "a quarter of it, or leave it out: data of another rate is resampled"
            )
        section = self.funasr["frontend_conf"] | {"fs": rate_hz, "mel_high_hz": None}
        if mel_edges == "keep":
            section["mel_high_hz"] = self.frontend.top_hz
        return self.changed(frontend_conf=section)

    @staticmethod
    def from_funasr(config: dict) -> "FunASRConfig":
        """Reads FunASR's resolved config, with `llm_config` in it.

        Raises:
            ValueError: an option that is not supported, or a section that is missing; the message
                names the key.
        """
        return _read(config)


@config_errors()
def _read(config: dict) -> FunASRConfig:
    config = copy.deepcopy(config)
    _is(config, "model", MODEL_NAME)
    _is(config, "audio_encoder", "SenseVoiceEncoderSmall")
    _is(config, "audio_adaptor", "Transformer")
    _is(config, "frontend", "WavFrontend", "wav_frontend")
    frontend = _frontend(_section(config, "frontend_conf"))
    encoder = _encoder(_section(config, "audio_encoder_conf"), frontend.row_size)
    llm = _llm(_section(config, "llm_config"))
    adaptor_conf = _section(config, "audio_adaptor_conf")
    adaptor = _adaptor("audio_adaptor_conf", adaptor_conf, encoder.d_model, llm.hidden_size)
    dataset = config.get("dataset_conf") or {}
    ctc = None
    if config.get("ctc_decoder") is not None:
        _is(config, "ctc_decoder", "Transformer")
        section = _section(config, "ctc_decoder_conf")
        ctc = _adaptor("ctc_decoder_conf", section, encoder.d_model, section.get("llm_dim", 4096))
        require(
            ctc.downsample == 1 and ctc.d_out == encoder.d_model,
            "ctc_decoder_conf: downsample_rate and llm_dim change the rows; expected 1 and the "
            f"encoder's output_size, {encoder.d_model}",
        )
    classes = config.get("ctc_vocab_size", DEFAULT_CTC_CLASSES)
    blank = (config.get("ctc_conf") or {}).get("blank_id", classes - 1)
    require(blank == classes - 1, f"ctc_conf.blank_id is {blank}, expected the last, {classes - 1}")
    tokenizer = config.get("ctc_tokenizer_conf") or dataset.get("ctc_tokenizer_conf") or {}
    return FunASRConfig(
        funasr=config,
        frontend=frontend,
        encoder=encoder,
        adaptor=adaptor,
        llm=llm,
        ctc=ctc,
        ctc_classes=classes,
        n_languages=tokenizer.get("num_languages", 8749),
        low_frame_rate=bool(adaptor_conf.get("use_low_frame_rate", False)),
        system_prompt=bool(dataset.get("sys_prompt", True)),
        think=bool(dataset.get("do_think", True)),
        ctc_weight=float(config.get("ctc_weight", 0.3)),
        llm_reduction=config.get("llm_reduction", "mean_volume"),  # ours, as the next
        ctc_reduction=config.get("ctc_reduction", "mean_volume"),
    )


def _section(config: dict, name: str) -> dict:
    require(isinstance(config.get(name), dict), f"the config has no section {name!r}")
    return config[name]


def _is(section: dict, key: str, *supported) -> None:
    value = section.get(key)
    listed = " or ".join(repr(name) for name in supported)
    require(value in supported, f"{key} is {value!r}, supported is {listed}")


def _unless(section: dict, where: str, **expected) -> None:
    """Refuses keys that are there with another value than the one implemented."""
    for key, value in expected.items():
        found = section.get(key, value)
        require(found == value, f"{where}.{key} is {found!r}, supported is {value!r}")


def _frontend(section: dict) -> FbankConfig:
    _unless(section, "frontend_conf", cmvn_file=None, snip_edges=True, upsacle_samples=True)
    return FbankConfig(
        sample_rate=int(section.get("fs", 16000)),
        n_mels=section.get("n_mels", 80),
        window=section.get("window", "hamming"),
        window_s=section.get("frame_length", 25) / 1000,
        hop_s=section.get("frame_shift", 10) / 1000,
        high_hz=section.get("mel_high_hz"),  # ours: of `with_sample_rate`
        stack=section.get("lfr_m", 1),
        stride=section.get("lfr_n", 1),
        dither=float(section.get("dither", 1.0)),
    )


def _encoder(section: dict, d_in: int) -> SANMConfig:
    expected = dict(normalize_before=True, concat_after=False, sanm_shfit=0)
    expected |= dict(selfattention_layer_type="sanm", stochastic_depth_rate=0.0)
    _unless(section, "audio_encoder_conf", **expected)
    config = SANMConfig(
        d_in=d_in,
        d_model=section.get("output_size", 256),
        n_heads=section.get("attention_heads", 4),
        d_inner=section.get("linear_units", 2048),
        n_blocks=section.get("num_blocks", 6),
        n_tp_blocks=section.get("tp_blocks", 0),
        kernel=section.get("kernel_size", 11),
        dropout=section.get("dropout_rate", 0.1),
        attention_dropout=section.get("attention_dropout_rate", 0.0),
    )
    _positive("audio_encoder_conf", config, may_be_zero=("n_tp_blocks", *DROPOUTS))
    require(
        config.d_model % config.n_heads == 0,
        f"audio_encoder_conf: width {config.d_model} is no multiple of {config.n_heads} heads",
    )
    return config


DROPOUTS = ("dropout", "attention_dropout")


def _adaptor(name: str, section: dict, d_in: int, d_out: int) -> AdaptorConfig:
    config = AdaptorConfig(
        d_in=d_in,
        d_inner=section.get("ffn_dim", 2048),
        d_out=d_out,
        n_layers=section.get("n_layer", 2),
        n_heads=section.get("attention_heads", 8),
        downsample=section.get("downsample_rate", 2),
        dropout=section.get("dropout_rate", 0.0),
        attention_dropout=section.get("attention_dropout_rate", 0.0),
    )
    _positive(name, config, may_be_zero=("n_layers", *DROPOUTS))
    require(
        config.d_out % config.n_heads == 0,
        f"{name}: width {config.d_out} is no multiple of {config.n_heads} heads",
    )
    return config


def _positive(where: str, config, may_be_zero: tuple[str, ...]) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        share = field.name in DROPOUTS
        kind = int | float if share else int
        low, high = (0, 1) if share else (0 if field.name in may_be_zero else 1, 1 << 20)
        require(
            isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high,
            f"{where}: {field.name} is {value!r}, expected {low} to {high}",
        )


def _llm(section: dict) -> Qwen3Config:
    _is(section, "model_type", *MODEL_TYPES)
    where = "the language model's config.json"
    _unless(section, where, attention_bias=False, hidden_act="silu", use_sliding_window=False)
    rope = section.get("rope_parameters") or section.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind == "default", f"{where}: rope type {kind!r} is not supported")
    theta = rope.get("rope_theta", section.get("rope_theta", 10000.0))
    eos = section.get("eos_token_id")
    require(
        isinstance(eos, int) and 0 <= eos < section["vocab_size"],
        f"{where}: eos_token_id is {eos!r}, expected one token of its vocabulary",
    )
    return Qwen3Config(
        vocab_size=section["vocab_size"],
        hidden_size=section["hidden_size"],
        intermediate_size=section["intermediate_size"],
        n_layers=section["num_hidden_layers"],
        n_heads=section["num_attention_heads"],
        n_kv_heads=section.get("num_key_value_heads", section["num_attention_heads"]),
        head_dim=section.get("head_dim", section["hidden_size"] // section["num_attention_heads"]),
        rms_norm_eps=section.get("rms_norm_eps", 1e-6),
        rope_theta=float(theta),
        tie_word_embeddings=bool(section.get("tie_word_embeddings", False)),
        eos_token_id=eos,
        max_positions=section.get("max_position_embeddings", 32768),
    )
