"""A model in the form that the project which it comes from reads."""

from dataclasses import replace
from pathlib import Path

from ..config.changes import with_data_sections
from .contents import Checkpoint
from .funasr_folder import write_funasr
from .nemo_archive import write_nemo


def write_for_nemo(path: Path, checkpoint: Checkpoint) -> None:
    """A `.nemo` that NeMo restores, and transcribes paths with; see `write_nemo`."""
    if checkpoint.kind == "nemo":
        checkpoint = replace(checkpoint, config=with_data_sections(checkpoint.config))
    write_nemo(path, checkpoint)


FORMS = {"nemo": ("model.nemo", write_for_nemo), "funasr": ("model_funasr", write_funasr)}


def write_native(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes `model.nemo` into the folder, or `model_funasr`, in the place of an older one; gives
    its path."""
    name, write = FORMS[checkpoint.kind]
    write(folder / name, checkpoint)
    return folder / name
