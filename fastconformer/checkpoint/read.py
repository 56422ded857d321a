"""Path -> checkpoint, whichever of the forms lies there."""

import os
from pathlib import Path

from .contents import Checkpoint, check_finite
from .folder import read_folder
from .funasr_folder import is_funasr_folder, read_funasr
from .nemo_archive import read_nemo


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Reads a `.nemo` archive, a converted folder, or one of FunASR's. The tensors stay backed by
    the file: they take memory as they are touched, once, and may be changed without changing it.

    Raises:
        FileNotFoundError: nothing is at path.
        ValueError: it is neither form, or damaged, or unsafe, or a weight is NaN or infinite.
    """
    path = Path(path)
    if path.is_dir():
        checkpoint = read_funasr(path) if is_funasr_folder(path) else read_folder(path)
    else:
        checkpoint = read_nemo(path)
    try:
        check_finite(checkpoint.state_dict)
        if checkpoint.aligner:
            check_finite(checkpoint.aligner.state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return checkpoint
