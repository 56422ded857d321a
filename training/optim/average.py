"""The mean of several checkpoints' weights. BatchNorm's statistics are averaged like weights; its
counter is the highest."""

import dataclasses
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch

from fastconformer.checkpoint.contents import Checkpoint, check_finite
from fastconformer.checkpoint.read import read_checkpoint
from training.optim.ema import plain_tensors
from training.setup.lora import lora_scale


def average_checkpoints(paths: Sequence[str | Path], like: str | Path | None = None) -> Checkpoint:
    """Mean of the checkpoints' tensors, in float64, in the first one's dtypes; config and tokenizer
    are the first one's, or, of Lightning's checkpoints, those of the model `like`.

    Raises:
        FileNotFoundError, ValueError: one cannot be read, or differs in the names or shapes of its
            tensors, or in its tokenizer.
    """
    first, sums, highest = None, {}, {}
    for path in paths:
        checkpoint = read_any(path, like)
        if first is None:
            first = checkpoint
        else:
            check_alike(first, checkpoint, f"{paths[0]} and {path}")
        for name, tensor in checkpoint.state_dict.items():
            if tensor.is_floating_point():
                sums[name] = sums.get(name, 0) + tensor.double()
            elif name in highest:
                highest[name] = torch.maximum(highest[name], tensor)
            else:
                highest[name] = tensor.clone()
    state = {
        name: (sums[name] / len(paths)).to(tensor.dtype) if name in sums else highest[name]
        for name, tensor in first.state_dict.items()
    }
    return dataclasses.replace(first, state_dict=state)


def read_any(path: str | Path, like: str | Path | None = None) -> Checkpoint:
    """A model folder, a `.nemo` archive, a run's `checkpoints/step_N.pt`, or a Lightning checkpoint
    of a model `like` another."""
    path = Path(path)
    if path.suffix != ".pt":
        return read_checkpoint(path, like)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        lora = state["recipe"]["lora"]
        scale = lora_scale(lora["rank"], lora["alpha"])
        tensors = plain_tensors(state["model"], state["ema"], scale)
        checkpoint = Checkpoint(state["config"], tensors, state["tokenizer_files"])
        check_finite(checkpoint.state_dict)
    except (RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a checkpoint of a run: {detail}") from None
    return checkpoint


def check_alike(first: Checkpoint, other: Checkpoint, names: str) -> None:
    """Raises ValueError with the first difference that makes an average meaningless."""
    ours, theirs = first.state_dict, other.state_dict
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs:
            raise ValueError(f"{names} are not of one model: only one of them has {name}")
        if ours[name].shape != theirs[name].shape:
            shapes = f"{tuple(ours[name].shape)} and {tuple(theirs[name].shape)}"
            raise ValueError(f"{names} are not of one model: {name} is {shapes}")
    if first.tokenizer_files != other.tokenizer_files:
        raise ValueError(f"{names} have different tokenizers")
