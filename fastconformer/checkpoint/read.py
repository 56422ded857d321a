"""Path -> checkpoint, whichever of the forms lies there."""

import os
from pathlib import Path

from .contents import Checkpoint, check_finite
from .folder import read_folder
from .nemo_archive import read_nemo


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Reads a `.nemo` archive or a converted folder. The tensors stay backed by the file: they
    take memory as they are touched, once, and may be changed without changing the file.

    Raises:
        FileNotFoundError: nothing is at path.
        ValueError: it is neither form, or damaged, or unsafe, or a weight is NaN or infinite.
    """
    path = Path(path)
    checkpoint = read_folder(path) if path.is_dir() else read_nemo(path)
    try:
        check_finite(checkpoint.state_dict)
        if checkpoint.aligner:
            check_finite(checkpoint.aligner.state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return checkpoint
