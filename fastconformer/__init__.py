"""FastConformer and Parakeet speech recognition in plain PyTorch."""

import importlib
import os
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# How long torch's threads on a CPU spin while they wait for one another, read when torch is loaded.
# libgomp's own count is 30 times larger: nothing gained on an idle machine, and where other work
# takes a core away, each of thousands of waits lasts until that core is back. Your setting stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from .config import ModelConfig
    from .load import load_model
    from .model import ASRModel
    from .recordings.timestamps import Span
    from .recordings.transcript import Transcript

__all__ = ["ASRModel", "ModelConfig", "Span", "Transcript", "load_model"]

# Where each name lives. They are read when they are first asked for: `--help` needs no torch.
_HOMES = {
    "ASRModel": ".model",
    "ModelConfig": ".config",
    "Span": ".recordings.timestamps",
    "Transcript": ".recordings.transcript",
    "load_model": ".load",
}


def __getattr__(name: str):
    if name == "losses":
        return importlib.import_module(".losses", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = found
    return found
