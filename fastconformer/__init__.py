"""FastConformer and Parakeet speech recognition in plain PyTorch."""

from .config import ModelConfig
from .model import ASRModel, Transcript, load_model
from .timestamps import Span

__all__ = ["ASRModel", "ModelConfig", "Span", "Transcript", "load_model"]
