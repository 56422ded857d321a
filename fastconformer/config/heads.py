"""Which heads a model has, and their numbers: a dataclass for each section that a head owns."""

from dataclasses import dataclass

from .checks import require

CTC_CLASSES = ("EncDecCTCModel", "EncDecCTCModelBPE")
TRANSDUCER_CLASSES = ("EncDecRNNTModel", "EncDecRNNTBPEModel")
HYBRID_CLASSES = ("EncDecHybridRNNTCTCModel", "EncDecHybridRNNTCTCBPEModel")

# The heads of NeMo's model classes, the default first. "transducer" is "tdt" where its joint gives
# durations, else "rnnt".
HEADS_OF_CLASS = {
    **dict.fromkeys(CTC_CLASSES, ("ctc",)),
    **dict.fromkeys(TRANSDUCER_CLASSES, ("transducer",)),
    **dict.fromkeys(HYBRID_CLASSES, ("transducer", "ctc")),
}


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
        require(
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
