"""Path -> checkpoint, whichever of the forms lies there."""

import os
from pathlib import Path

from .contents import Checkpoint, check_finite
from .folder import read_folder
from .funasr_folder import is_funasr_folder, read_funasr
from .hugging_face import is_hugging_face, read_hugging_face
from .nemo_archive import read_nemo


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Reads a `.nemo` archive, a converted folder, or one of FunASR's or of transformers'. The
    tensors stay backed by the file: they take memory as they are touched, once, and may be changed
    without changing the file.

    Raises:
        FileNotFoundError: nothing is at path.
        ValueError: it has none of these forms, or is damaged or unsafe, or a weight is NaN or
            infinite.
    """
    path = Path(path)
    if not path.is_dir():
        checkpoint = read_nemo(path)
    elif is_funasr_folder(path):
        checkpoint = read_funasr(path)
    elif is_hugging_face(path):
        checkpoint = read_hugging_face(path)
    else:
        checkpoint = read_folder(path)
    try:
        check_finite(checkpoint.state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return checkpoint
