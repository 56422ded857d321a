"""What a model is made of: checked dataclasses, read from NeMo's config."""

from .checks import config_errors
from .encoder import EncoderConfig
from .heads import (
    CTC_CLASSES,
    HEADS_OF_CLASS,
    HYBRID_CLASSES,
    TRANSDUCER_CLASSES,
    AEDConfig,
    CTCConfig,
    JointConfig,
    LossConfig,
    PredictionConfig,
)
from .model import ModelConfig
from .preprocessor import PreprocessorConfig

__all__ = [
    "CTC_CLASSES",
    "HEADS_OF_CLASS",
    "HYBRID_CLASSES",
    "TRANSDUCER_CLASSES",
    "AEDConfig",
    "CTCConfig",
    "EncoderConfig",
    "JointConfig",
    "LossConfig",
    "ModelConfig",
    "PredictionConfig",
    "PreprocessorConfig",
    "config_errors",
]
