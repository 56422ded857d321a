"""One optimizer step: a batch to a loss, the loss to gradients, the gradients to new weights.

`batch_loss` is the forward pass and its reductions, `gradients` adds up what the batches of one
step give, `update` clips and moves the weights.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fastconformer import ASRModel
from fastconformer.augment import spec_augment
from training.data import Batch
from training.recipe import Recipe, SpecAugmentRecipe


def reduce_loss(losses: Tensor, target_lengths: Tensor, reduction: str) -> Tensor:
    """(B,) losses per clip -> scalar, with NeMo's meaning of its four names."""
    if reduction == "mean_batch":
        return losses.mean()
    if reduction == "mean":
        return (losses / target_lengths).mean()
    if reduction == "mean_volume":
        return losses.sum() / target_lengths.sum()
    assert reduction == "sum"
    return losses.sum()


def batch_loss(
    model: ASRModel,
    batch: Batch,
    heads: tuple[str, ...],
    augment: Callable[[Tensor, Tensor], Tensor] | None = None,
    bf16: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one batch, and its part of each head, as scalars.

    Both heads: `(1 - w) * transducer + w * ctc` with w = model.config.loss.ctc_weight (NeMo's
    EncDecHybridRNNTCTCModel); one head: its loss.
    """
    features, lengths = model.featurize(batch.audio, batch.audio_lengths)  # always float32
    if augment is not None:
        features = augment(features, lengths)
    with torch.autocast(batch.audio.device.type, dtype=torch.bfloat16, enabled=bf16):
        encoded, encoded_lengths = model.encode(features, lengths)
        losses = model.losses(
            encoded, encoded_lengths, batch.targets, batch.target_lengths, heads=heads
        )
    config = model.config.loss
    parts = {}
    for head, values in losses.items():
        reduction = config.ctc_reduction if head == "ctc" else config.rnnt_reduction
        parts[head] = reduce_loss(values.float(), batch.target_lengths, reduction)
    if len(parts) == 1:
        return next(iter(parts.values())), parts
    transducer = next(value for head, value in parts.items() if head != "ctc")
    return (1 - config.ctc_weight) * transducer + config.ctc_weight * parts["ctc"], parts


def update(optimizer: torch.optim.Optimizer, clip_grad_norm: float | None) -> float:
    """Clip, and one optimizer step at the rates that its groups hold (`set_learning_rates`);
    nothing moves when the gradient is not finite.

    Returns:
        The norm of all gradients before clipping.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not torch.isfinite(norm):
        return float(norm)
    if clip_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm, norm)
    optimizer.step()
    return float(norm)


def gradients(
    model: ASRModel,
    batches: list[Batch],
    heads: tuple[str, ...],
    augment: Callable | None,
    recipe: Recipe,
    step: int,
) -> dict[str, float]:
    """Forward and backward of one step's batches; their gradients' mean is left in `.grad`.

    Returns:
        Means over the batches: {"loss": ..., and each head's part}.
    Raises:
        ValueError: torch could not (no memory, say); names the clips.
    """
    means = Counter()
    for micro, batch in enumerate(batches):
        seed_step(recipe.trainer.seed, step, micro)
        try:
            total, parts = batch_loss(
                model, batch, heads, augment, recipe.trainer.precision == "bf16"
            )
            (total / len(batches)).backward()
        except RuntimeError as error:
            raise ValueError(
                f"step {step + 1} failed on a batch of {tuple(batch.audio.shape)} samples and "
                f"{tuple(batch.targets.shape)} tokens: {' '.join(str(error).split())[:200]}"
            ) from error
        for key, value in {"loss": total, **parts}.items():
            means[key] += float(value.detach()) / len(batches)
    return dict(means)


def seed_step(seed: int, step: int, micro: int) -> torch.Generator:
    """Set torch's generators (dither, dropout, omega, SpecAugment) for one batch of one step."""
    return torch.manual_seed(int(np.random.SeedSequence([seed, step, micro]).generate_state(1)[0]))


def augmentation(recipe: SpecAugmentRecipe, config: dict) -> Callable | None:
    """SpecAugment as the recipe says, and where it is silent as NeMo's `spec_augment` section."""
    section = config.get("spec_augment") or {}
    defaults = {"freq_masks": 0, "time_masks": 0, "freq_width": 10, "time_width": 10}  # NeMo's
    defaults |= {"rect_masks": 0, "rect_time": 5, "rect_freq": 20}
    given = {k: v for k, v in dataclasses.asdict(recipe).items() if v is not None}
    options = {k: given.get(k, section.get(k, v)) for k, v in defaults.items()}
    if not any(options[name] for name in ("freq_masks", "time_masks", "rect_masks")):
        return None
    return lambda features, lengths: spec_augment(features, lengths, **options)
