"""One optimizer step: batches to gradients, gradients to new weights.

`gradients` adds up what the batches of one step give, over all processes, and in pieces where
memory runs out; `update` clips and moves the weights.
"""

import dataclasses
import math
from collections import Counter

import numpy as np
import torch
from torch import nn

from fastconformer import ASRModel
from fastconformer.process_memory import is_out_of_memory
from training.data.store import Batch
from training.loop.batch_norm import StepStatistics
from training.loop.ranks import BatchShare
from training.objective.objective import Objective, make_views, views_loss
from training.setup.device import release_memory


@dataclasses.dataclass
class StepResult:
    """What a step's batches gave, the same on all processes.

    losses: {"loss": ..., and each part}, means over the batches. suspects: names of clips with a
    loss that is not finite. splits: how often memory ran out and batches were halved.
    """

    losses: dict[str, float]
    suspects: list[str]
    splits: int


def gradients(
    model: ASRModel,
    batches: list[Batch],
    objective: Objective,
    seed: int,
    step: int,
    share: BatchShare,
    statistics: StepStatistics,
) -> StepResult:
    """Forward and backward of one step's batches.

    This process's share of the gradient of their mean loss, times the number of processes, is left
    in `.grad`: the mean over the processes is the step's gradient.

    Where memory runs out the step is done again with batches in pieces of half the clips. The
    gradient is the same, but for dropout, omega's coin, and BatchNorm, which sees smaller batches.

    Args:
        batches: of this process, those of `share.mine`.
        statistics: of the model as it is before the step.
    Raises:
        ValueError: torch could not, or a single clip is too large for the memory; names the clips.
    """
    ranks, n_batches = share.ranks, share.n_batches
    parameters = [p for p in model.parameters() if p.requires_grad]
    n_pieces, splits = 1, 0
    while True:
        for parameter in parameters:
            parameter.grad = None
        statistics.start(by_hand=ranks.world > 1 or n_pieces > 1)
        sums, clips, finite_clips, trouble, batch = Counter(), [], [], "", None
        try:
            for micro, batch in zip(share.mine, batches, strict=True):
                seed_step(seed, step, micro)
                views = make_views(model, batch, objective)
                n_clips = len(batch.target_lengths)
                rows = share.rows(n_clips)
                if share.by_clips:  # the same masks everywhere; other dropout
                    seed_step(seed, step, micro, 1 + ranks.rank)
                # A process without a clip goes through the first one, for nothing: synced
                # BatchNorm waits for it.
                counts, rows = (1, rows) if len(rows) else (0, torch.tensor([0]))
                for piece in pieces(views, rows, n_pieces):
                    total, parts, finite = views_loss(model, piece, objective)
                    (total * (counts * ranks.world / n_batches)).backward()
                    statistics.add_piece(n_batches - 1 - micro, counts * len(finite) / n_clips)
                    for name, value in {"loss": total, **parts}.items():
                        sums[name] += counts * value.detach().double() / n_batches
                    clips += piece.batch.utterances
                    finite_clips.append(finite)
        except RuntimeError as error:
            if share.synced or not is_out_of_memory(error):
                raise ValueError(_failure(step, batch, error)) from error
            trouble = " ".join(str(error).split())[:200]
        largest = max(len(batch.target_lengths) for batch in batches)
        any_trouble, hopeless = ranks.total(bool(trouble), bool(trouble) and n_pieces >= largest)
        if hopeless:
            trouble = trouble or "another process ran out of memory on a single clip"
            raise ValueError(_failure(step, batch, trouble))
        if not any_trouble:
            break
        splits += 1
        n_pieces *= 2 if trouble else 1
        views = piece = total = parts = None  # what still holds on to the failed forward pass
        release_memory()
    statistics.finish(n_batches, ranks)
    names = ("loss", *objective.parts)
    # All that the host wants to know of the forward pass, in one wait for the device.
    known = torch.cat((torch.stack([sums[name] for name in names]), *finite_clips)).tolist()
    values = ranks.total(*known[: len(names)])
    suspects = [u.name for u, finite in zip(clips, known[len(names) :]) if not finite]
    if not math.isfinite(values[0]):
        suspects = [name for names in ranks.gather(suspects) for name in names]
    return StepResult(dict(zip(names, values, strict=True)), suspects, splits)


def pieces(views, rows: torch.Tensor, n_pieces: int):
    """These clips of a batch, in so many parts of like size."""
    if n_pieces == 1 and len(rows) == len(views.batch.target_lengths):
        yield views
        return
    for part in rows.tensor_split(min(n_pieces, len(rows))):
        yield views.rows(part)


def _failure(step: int, batch: Batch, reason) -> str:
    return (
        f"step {step + 1} failed on a batch of {tuple(batch.audio.shape)} samples and "
        f"{tuple(batch.targets.shape)} tokens: {' '.join(str(reason).split())[:200]}"
    )


def update(optimizer: torch.optim.Optimizer, clip_grad_norm: float | None) -> float:
    """Clip, and one optimizer step at the rates that its groups hold (`set_learning_rates`);
    nothing moves when the gradient is not finite.

    Returns:
        The norm of all gradients before clipping.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(value):
        return value
    if clip_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm, norm)
    optimizer.step()
    return value


def seed_step(*numbers: int) -> torch.Generator:
    """Set torch's generators (dither, dropout, omega, SpecAugment) for one batch of one step."""
    return torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
