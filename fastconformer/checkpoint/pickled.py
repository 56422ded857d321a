"""Tensors from torch's pickled files: the only place that reads pickle, and nothing but tensors
comes out of it."""

import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


def load_tensors(path: Path, name: str, wrappers: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Tensors by name, mapped from the file where its form allows.

    Args:
        name: of the file in messages.
        wrappers: keys under one of which a training tool may have put the tensors.
    Raises:
        ValueError: it holds something else than dense tensors, or is damaged.
    """
    try:
        mappable = _is_stored_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they hint at is an error below
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        names = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {names[1]}" if names else "it holds more than that"
        raise ValueError(
            f"refusing {name}: only plain tensors are unpickled, and {reason}"
        ) from error
    except (MemoryError, OSError):
        raise
    except Exception as error:  # torch raises anything on damaged bytes
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]  # advice follows
        raise ValueError(f"{name} is damaged: {reason}") from error
    for _ in range(4):  # a wrapper in a wrapper
        inner = [
            key for key in wrappers if isinstance(state, dict) and isinstance(state.get(key), dict)
        ]
        if not inner:
            break
        state = state[inner[0]]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{name} holds a {type(state).__name__}, expected tensors by name")
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: {key!r} is a {type(tensor).__name__}, expected a tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"{name}: tensor {key} is not dense")
        # A stride of zero lets a few bytes claim any size.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name}: tensor {key} is larger than its data")
    if not mappable:
        logger.warning("%s is in an old format: it was copied into memory", name)
    return {key: tensor.detach() for key, tensor in state.items()}


def _is_stored_zip(path: Path) -> bool:
    """True for what torch.save has written since 1.6: mapping needs uncompressed zip records."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """`state_dict` of a training tool's checkpoint. What else lies in it (settings, states of
    callbacks) is of classes that are never loaded: each stands for nothing here."""
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stubs = [(type("Nothing", (_Nothing,), {}), name) for name in unknown]
    with torch.serialization.safe_globals(stubs):
        return load_tensors(path, path.name, ("state_dict",))


class _Nothing:
    """Takes whatever it is made with, and keeps nothing."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):
        pass
