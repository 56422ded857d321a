"""Which heads a model has, and their numbers: a dataclass for each section that a head owns."""

from collections.abc import Mapping
from dataclasses import dataclass

from .checks import require

CTC_CLASSES = ("EncDecCTCModel", "EncDecCTCModelBPE")
TRANSDUCER_CLASSES = ("EncDecRNNTModel", "EncDecRNNTBPEModel")
HYBRID_CLASSES = ("EncDecHybridRNNTCTCModel", "EncDecHybridRNNTCTCBPEModel")
AED_CLASSES = ("EncDecMultiTaskModel",)
# with a language's prompt between encoder and heads
PROMPTED_CLASSES = ("EncDecRNNTBPEModelWithPrompt", "EncDecHybridRNNTCTCBPEModelWithPrompt")

# The heads of NeMo's model classes, the default first. "transducer" is "tdt" where its joint gives
# durations, else "rnnt".
HEADS_OF_CLASS = {
    **dict.fromkeys(CTC_CLASSES, ("ctc",)),
    **dict.fromkeys(TRANSDUCER_CLASSES, ("transducer",)),
    **dict.fromkeys(HYBRID_CLASSES, ("transducer", "ctc")),
    **dict.fromkeys(AED_CLASSES, ("aed",)),
    **dict(zip(PROMPTED_CLASSES, (("transducer",), ("transducer", "ctc")), strict=True)),
}


@dataclass(frozen=True)
class PredictionConfig:
    """NeMo's RNNTDecoder, an LSTM over the emitted tokens; with a context_size its
    StatelessTransducerDecoder, embeddings of the last tokens, `normalized` together or not."""

    vocab_size: int
    pred_hidden: int
    pred_rnn_layers: int = 1
    dropout: float = 0.0
    blank_as_pad: bool = True
    context_size: int | None = None
    normalized: bool = False

    def __post_init__(self):
        size = self.context_size
        require(
            size is None or (isinstance(size, int) and 0 < size <= 64),
            f"decoder.context_size is {size!r}, expected 1 to 64 tokens",
        )


@dataclass(frozen=True)
class JointConfig:
    """NeMo's RNNTJoint. The output holds V tokens, blank, then `n_durations` duration classes.
    `hat`: its HATJoint, where blank is a decision before the tokens'."""

    vocab_size: int
    encoder_hidden: int
    pred_hidden: int
    joint_hidden: int
    activation: str = "relu"
    dropout: float = 0.0
    n_durations: int = 0
    hat: bool = False

    def __post_init__(self):
        require(
            not (self.hat and self.n_durations),
            f"joint.num_extra_outputs is {self.n_durations}; a HATJoint has no durations",
        )
        require(
            self.activation in ("relu", "sigmoid", "tanh"),
            f"joint.jointnet.activation is {self.activation!r}, expected relu, sigmoid or tanh",
        )


@dataclass(frozen=True)
class CTCConfig:
    vocab_size: int
    d_in: int


@dataclass(frozen=True)
class PromptsConfig:
    """NeMo's prompts behind the encoder: which language is to be written, {name: place in a one-hot
    vector of `count`}."""

    names: dict[str, int]
    count: int

    def __post_init__(self):
        for name, index in self.names.items():
            require(
                isinstance(index, int) and 0 <= index < self.count,
                f"model_defaults.prompt_dictionary.{name} is {index!r}, expected 0 to "
                f"{self.count - 1}",
            )

    def knows(self, name) -> bool:
        """Whether it is a language that the model can be asked for."""
        return isinstance(name, str) and name in self.names

    @property
    def are_several(self) -> bool:
        """Whether there is anything to choose."""
        return len(set(self.names.values())) > 1

    def index(self, slots: Mapping) -> int:
        """The prompt of {"target_lang": name}; without it that of "auto", as in NeMo. ValueError:
        another slot, or no such language; the message lists them."""
        for slot in slots:
            if slot != "target_lang":
                raise ValueError(f"{slot} is no slot of this model's prompt, target_lang is")
        name = slots.get("target_lang", "auto")
        if not self.knows(name):
            given = "not given" if "target_lang" not in slots else repr(name)
            raise ValueError(f"target_lang is {given}, expected one of {', '.join(self.names)}")
        return self.names[name]


@dataclass(frozen=True)
class TransformerConfig:
    """NeMo's TransformerDecoder and TransformerEncoder: a stack of layers."""

    hidden_size: int
    inner_size: int
    num_layers: int
    num_attention_heads: int = 1
    hidden_act: str = "relu"
    pre_ln: bool = False
    pre_ln_final_layer_norm: bool = True
    attn_score_dropout: float = 0.0
    attn_layer_dropout: float = 0.0
    ffn_dropout: float = 0.0

    def __post_init__(self):
        require(
            self.hidden_act in ("relu", "gelu"),
            f"transf_decoder: hidden_act is {self.hidden_act!r}, expected relu or gelu",
        )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"transf_decoder: hidden_size {self.hidden_size} must be a multiple of "
            f"num_attention_heads {self.num_attention_heads}",
        )


@dataclass(frozen=True)
class AEDConfig:
    """The attention decoder of NeMo's EncDecMultiTaskModel (Canary).

    vocab_size: outputs, the tokenizer's pieces rounded up to a multiple of 8; encoder: layers
    between FastConformer and decoder, None in all released models; prompt_defaults: {slot: value};
    prompt_values: {slot: {value: special token}}, of our own; max_generation_delta: tokens that a
    text may have more than frames, negative: as many as there are positions; one_more: NeMo's beam
    search gives a token more than that.
    """

    vocab_size: int
    decoder: TransformerConfig
    encoder: TransformerConfig | None
    prompt_format: str
    prompt_defaults: dict
    prompt_values: dict
    max_sequence_length: int = 512
    num_token_types: int = 2
    learn_positional_encodings: bool = False
    embedding_dropout: float = 0.0
    head_dropout: float = 0.0
    max_generation_delta: int = -1
    one_more: bool = True

    def __post_init__(self):
        require(self.vocab_size % 8 == 0, f"head.num_classes is {self.vocab_size}, not of eights")
        require(
            0 < self.max_sequence_length <= 1 << 20,
            f"transf_decoder: max_sequence_length is {self.max_sequence_length}",
        )


@dataclass(frozen=True)
class LossConfig:
    """How the heads are trained. `durations` empty: RNNT. label_smoothing and mask_prompt: of an
    attention decoder."""

    durations: tuple[int, ...] = ()
    sigma: float = 0.0
    omega: float = 0.0
    fastemit_lambda: float = 0.0
    clamp: float = -1.0
    rnnt_reduction: str = "mean_batch"
    ctc_reduction: str = "mean_batch"
    ctc_weight: float = 0.0
    label_smoothing: float = 0.0
    mask_prompt: bool = False
