"""What a model is on disk."""

from .contents import Checkpoint
from .folder import write_folder
from .read import read_checkpoint

__all__ = ["Checkpoint", "read_checkpoint", "write_folder"]
