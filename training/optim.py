"""The optimizer and the learning rate.

`build_optimizer` gives AdamW (NeMo's default) or its 8-bit form; `learning_rate` is a pure
function of the step, so that resuming needs no scheduler state.
"""

import math
from collections.abc import Callable

import torch
from torch import nn


def learning_rate(
    step: int, lr: float, min_lr: float, warmup_steps: int, max_steps: int, name: str = "cosine"
) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Warm-up, for step <= warmup_steps: `lr * (step + 1) / (warmup_steps + 1)`. Then "constant" stays
    at lr, and "cosine" is `min_lr + (lr - min_lr) * (1 + cos(pi * x)) / 2` with
    `x = (step - warmup_steps) / (max_steps - warmup_steps)`, and min_lr after max_steps.
    Source: NeMo's CosineAnnealing (WarmupAnnealHoldPolicy without a hold).
    """
    if warmup_steps > 0 and step <= warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if name == "constant":
        return lr
    if step > max_steps:
        return min_lr
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def schedule_of(schedule, lr: float, max_steps: int) -> Callable[[int], float]:
    """A ScheduleRecipe -> step -> learning rate.

    Raises:
        ValueError: the warm-up is as long as the run.
    """
    warmup_steps = schedule.warmup_steps or 0
    if schedule.warmup_ratio is not None:
        warmup_steps = int(schedule.warmup_ratio * max_steps)
    if warmup_steps and warmup_steps >= max_steps:
        raise ValueError(
            f"schedule.warmup_steps is {warmup_steps}, but the run has {max_steps} steps; "
            "shorten the warm-up or train longer"
        )
    return lambda step: learning_rate(
        step, lr, schedule.min_lr, warmup_steps, max_steps, schedule.name
    )


def parameter_groups(model: nn.Module, optim) -> list[dict]:
    """Trainable parameters in the model's order, with their weight decay.

    One group as in NeMo, which decays everything; with `decay_norms_and_biases: false` a second one
    without decay for every one-dimensional parameter.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("every parameter is frozen; freeze less (recipe section `freeze`)")
    if optim.decay_norms_and_biases:
        return [{"params": trainable, "weight_decay": optim.weight_decay}]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, optim) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, as an OptimRecipe says.

    "adamw8bit" keeps the two moments in 8 bits (bitsandbytes), but those of embeddings in 32:
    their rows get rare and uneven gradients (Dettmers et al. 2022, arXiv:2110.02861).
    """
    groups = parameter_groups(model, optim)
    arguments = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if optim.name == "adamw":
        # The fused form is one pass over each tensor, on the CPU as on the GPU.
        return torch.optim.AdamW(groups, fused=True, **arguments)
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.register_parameters([p for group in groups for p in group["params"]])
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            manager.override_config(module.weight, "optim_bits", 32)
    return bitsandbytes.optim.AdamW8bit(groups, **arguments)
