"""Path -> checkpoint, whichever of the forms lies there."""

import os
import zipfile
from pathlib import Path

import torch

from .contents import CONFIG_FILE, Checkpoint, check_finite, check_tensors
from .folder import read_folder
from .funasr_folder import is_funasr_folder, read_funasr
from .hub import fetch, is_hub_id
from .hugging_face import is_hugging_face, read_hugging_face
from .nemo_archive import WEIGHTS_MEMBER, read_nemo
from .pickled import load_weights
from .yaml_config import CONFIG_MEMBER


def read_checkpoint(path: str | os.PathLike, like: str | os.PathLike | None = None) -> Checkpoint:
    """Reads a `.nemo` archive, a converted folder, one of FunASR's or of transformers', the best
    model of a run's folder, or a model by its name on the Hugging Face hub. The tensors stay backed
    by the file: they take memory as they are touched, once, and may be changed without changing the
    file.

    Args:
        like: the model whose config and tokenizer belong to the weights of a Lightning `.ckpt`.
    Raises:
        FileNotFoundError: nothing is at path.
        ValueError: it has none of these forms, or is damaged or unsafe, or a weight is NaN or
            infinite.
    """
    if is_hub_id(path):
        path = fetch(str(path))
    path = Path(path)
    if path.is_file() and _is_zip(path):
        checkpoint = _read_weights(path, like)
    elif like is not None:
        raise ValueError(f"{path} is a whole model; --like is for weights alone, as in a .ckpt")
    elif not path.is_dir():
        checkpoint = read_nemo(path)
    elif is_funasr_folder(path):
        checkpoint = read_funasr(path)
    elif is_hugging_face(path):
        checkpoint = read_hugging_face(path)
    else:
        checkpoint = read_folder(_model_folder(path))
    _add_counters(checkpoint.state_dict)
    try:
        _drop_adapters(checkpoint)
        check_finite(checkpoint.state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return checkpoint


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:  # zipfile would take an archive that ends with one for one
        head = file.read(len(_OLD_TORCH))
        if head == _OLD_TORCH:
            raise ValueError(f"{path} is in torch's format of before 1.6; torch.save it anew")
        if not head.startswith(b"PK\3\4"):
            return False
        if not zipfile.is_zipfile(file):
            raise ValueError(
                f"{path} is cut short: no whole .ckpt, and truncated or not a tar archive"
            )
        return True


_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled number


def _model_folder(path: Path) -> Path:
    """The folder itself; of a run's its best model, or else its last."""
    if (path / CONFIG_FILE).exists():
        return path
    for name in ("best", "last"):
        if (path / name / CONFIG_FILE).exists():
            return path / name
    if (path / CONFIG_MEMBER).exists() and (path / WEIGHTS_MEMBER).exists():
        raise ValueError(
            f"{path} is an extracted .nemo archive; pack it again: tar -cf model.nemo -C {path} ."
        )
    return path


def _read_weights(path: Path, like: str | os.PathLike | None) -> Checkpoint:
    """A Lightning checkpoint's weights, with all else of the model that it is like."""
    if like is None:
        raise ValueError(
            f"{path} has weights but no config and no tokenizer, as a Lightning checkpoint or a "
            "run's checkpoint.pt; give the model of the same run, or converters.nemo2st "
            f"{path.name} --like MODEL.nemo"
        )
    checkpoint = read_checkpoint(like)
    weights = load_weights(path)
    for prefix in ("module.", "_orig_mod."):  # of DataParallel and torch.compile
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    try:
        check_tensors(checkpoint.state_dict, weights)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {like}: {error}") from None
    checkpoint.state_dict = {name: weights[name] for name in checkpoint.state_dict}
    return checkpoint


def _drop_adapters(checkpoint: Checkpoint) -> None:
    """Takes out NeMo's adapters that are not enabled, and names them among what was dropped."""
    section = checkpoint.config.get("adapters")
    section = section if isinstance(section, dict) else {}
    off = [n for n, a in section.items() if isinstance(a, dict) and a.get("enabled") is False]
    if not off:
        return
    kept = {name: value for name, value in section.items() if name not in off}
    checkpoint.config = checkpoint.config | {"adapters": kept}
    checkpoint.state_dict = {
        name: tensor
        for name, tensor in checkpoint.state_dict.items()
        if name.partition(".adapter_layer.")[2].partition(".")[0] not in off
    }
    checkpoint.dropped += tuple(f"the disabled adapter {name}" for name in off)


def _add_counters(state_dict: dict[str, torch.Tensor]) -> None:
    """BatchNorm's counts of batches, which older archives lack and nothing here asks for."""
    for name in list(state_dict):
        counter = name.removesuffix("running_var") + "num_batches_tracked"
        if name.endswith(".running_var") and counter not in state_dict:
            state_dict[counter] = torch.tensor(0, device="cpu")
