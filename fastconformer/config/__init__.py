"""What a model is made of: checked dataclasses, read from NeMo's config."""

from .model import (
    CTC_CLASSES,
    HYBRID_CLASSES,
    TRANSDUCER_CLASSES,
    CTCConfig,
    EncoderConfig,
    JointConfig,
    LossConfig,
    ModelConfig,
    PredictionConfig,
    PreprocessorConfig,
    config_errors,
)

__all__ = [
    "CTC_CLASSES",
    "HYBRID_CLASSES",
    "TRANSDUCER_CLASSES",
    "CTCConfig",
    "EncoderConfig",
    "JointConfig",
    "LossConfig",
    "ModelConfig",
    "PredictionConfig",
    "PreprocessorConfig",
    "config_errors",
]
