"""FastConformer and Parakeet speech recognition in plain PyTorch."""

import os

# How long torch's threads on a CPU spin while they wait for one another, read when torch is loaded.
# libgomp's own count is 30 times larger: nothing gained on an idle machine, and where other work
# takes a core away, each of thousands of waits lasts until that core is back. Your setting stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from .config import ModelConfig
from .model import ASRModel, Transcript, load_model
from .recordings.timestamps import Span

__all__ = ["ASRModel", "ModelConfig", "Span", "Transcript", "load_model"]
