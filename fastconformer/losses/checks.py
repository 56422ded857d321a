"""Arguments of the transducer losses: what fits together, and the reductions; no arithmetic."""

import math
import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..transfers import on_host


def check_reduction(reduction: str | None):
    if reduction not in ("mean_batch", "mean", "mean_volume", "sum", "none", None):
        raise ValueError(
            f"reduction is {reduction!r}, expected mean_batch, mean, mean_volume, sum or none"
        )


def reduce(losses: Tensor, target_lengths: Tensor, reduction: str | None) -> Tensor:
    """(B,) -> scalar, or as they are; what the names mean stands in `rnnt_loss`."""
    if reduction == "mean_batch":
        return losses.mean()
    if reduction == "mean":
        return (losses / target_lengths).mean()
    if reduction == "mean_volume":
        return losses.sum() / target_lengths.sum()
    return losses.sum() if reduction == "sum" else losses


def check_batch(
    inputs: str,
    batch: int,
    n_frames: int,
    n_rows: int,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
):
    """Targets and lengths fit a lattice (B, T', U+1); `inputs` describes what gave that shape."""
    if targets.dim() != 2 or len(targets) != batch or not _is_integer(targets):
        raise ValueError(f"targets are {describe(targets)}, expected integers ({batch}, U)")
    logit_lengths, target_lengths = on_host(logit_lengths, target_lengths)
    for name, lengths, low, high, of in (
        ("logit_lengths", logit_lengths, 1, n_frames, "frames of the logits"),
        ("target_lengths", target_lengths, 0, n_rows - 1, "logit rows less one"),
        ("target_lengths", target_lengths, 0, targets.shape[1], "columns of targets"),
    ):
        if lengths.shape != (batch,) or not _is_integer(lengths):
            raise ValueError(f"{name} are {describe(lengths)}, expected integers ({batch},)")
        for clip, length in enumerate(lengths.tolist()):
            if not low <= length <= high:
                raise ValueError(
                    f"{name}[{clip}] is {length}, expected {low} to {high} (the {of}); "
                    f"{inputs}, targets {tuple(targets.shape)}"
                )


def check_targets(targets: Tensor, target_lengths: Tensor, n_classes: int, blank: int):
    position = torch.arange(targets.shape[1], device=targets.device)
    used = position < target_lengths.to(targets.device)[:, None]
    bad = used & ((targets < 0) | (targets >= n_classes) | (targets == blank))
    if bad.any():
        clip, place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"targets[{clip}, {place}] is {targets[clip, place].item()}, expected a token from 0 "
            f"to {n_classes - 1} other than the blank {blank}"
        )


def check_durations(durations: Sequence[int]) -> tuple[int, ...]:
    try:
        whole = tuple(operator.index(d) for d in durations)  # of a tensor or an array, too
    except TypeError:
        whole = ()
    if not whole or min(whole) < 0 or max(whole) == 0:
        raise ValueError(
            f"durations are {durations}, expected integers of at least 0, one of them positive "
            f"(a blank must advance), for example (0, 1, 2, 3, 4)"
        )
    return whole


def check_classes(n_outputs: int, durations: Sequence[int] | None, blank: int) -> int:
    """V+1, when the joint's outputs, the durations and the blank fit together."""
    n_classes = n_outputs - len(durations or ())
    if not isinstance(blank, numbers.Integral):
        raise ValueError(f"blank is {blank!r}, expected an integer, an index of the logits")
    if durations is None and not 0 <= blank < n_classes:
        raise ValueError(f"blank is {blank}, expected 0 to {n_classes - 1}, an index of the logits")
    # With blank in the middle a list of durations that is too short could not be told from tokens.
    if durations is not None and (n_classes < 1 or blank not in (0, n_classes - 1)):
        raise ValueError(
            f"logits have {n_outputs} outputs and there are {len(durations)} durations, which "
            f"leaves {n_classes} for tokens and blank, but blank is {blank}; expected V tokens, "
            "blank, then one output for each duration, with blank the last of the first V+1 "
            "(or index 0)"
        )
    return n_classes


def check_options(sigma: float, omega: float, fastemit_lambda: float, clamp: float):
    if not math.isfinite(sigma):
        raise ValueError(f"sigma is {sigma}, expected a finite number")
    if not 0.0 <= omega <= 1.0:
        raise ValueError(f"omega is {omega}, expected a probability from 0 to 1")
    if not (math.isfinite(fastemit_lambda) and fastemit_lambda >= 0.0):
        raise ValueError(f"fastemit_lambda is {fastemit_lambda}, expected a number of at least 0")
    if math.isnan(clamp):
        raise ValueError("clamp is nan, expected a number; 0 or less means no clamping")


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _is_integer(tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
