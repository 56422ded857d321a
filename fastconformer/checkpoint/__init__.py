"""What a model is on disk."""

from .folder import Checkpoint, read_checkpoint, write_folder

__all__ = ["Checkpoint", "read_checkpoint", "write_folder"]
