"""The optimizer and the learning rate.

`build_optimizer` gives AdamW (NeMo's default) or its 8-bit form, over groups of parameters with
their own rates; `learning_rate` is a pure function of the step, so that resuming needs no scheduler
state. Parameters in bfloat16 (`trainer.precision: bf16_pure`) get their updates with stochastic
rounding.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from training.setup.freeze import depth_of, matching

# --- the learning rate --------------------------------------------------------------------------


def learning_rate(
    step: int,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    max_steps: int,
    name: str = "cosine",
    hold_steps: int = 0,
    decay_shape: str = "linear",
    d_model: int = 1,
    power: float = 1.0,
    constant_steps: int = 0,
) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Warm-up, for step <= warmup_steps: `lr * (step + 1) / (warmup_steps + 1)`. With
    `x = (step - warmup_steps) / (max_steps - warmup_steps)`, after it:

        constant      lr
        cosine        min_lr + (lr - min_lr) * (1 + cos(pi * x)) / 2
        linear        min_lr + (lr - min_lr) * (1 - x) ** power
        inverse_sqrt  lr / sqrt((step + 1) / (warmup_steps + 1)), not below min_lr
        wsd           lr for `hold_steps`, then over y = 0 ... 1 of the rest: "linear" as above, or
                      "sqrt": lr * (1 - sqrt(y)), not below min_lr

    and min_lr after max_steps (but for "constant"). "noam" is all of one piece, with s = max(1,
    step): `lr / sqrt(d_model) * min(s ** -0.5, s * warmup_steps ** -1.5)`, not below min_lr after
    the warm-up; its lr is a factor, 1 to 5, not a rate. "cosine" with constant_steps, as NeMo has
    it, ends so many steps earlier and stays at min_lr; its warm-up is `lr * step / warmup_steps`.

    Source: NeMo's CosineAnnealing, WarmupAnnealing, PolynomialDecayAnnealing and
    PolynomialHoldDecayAnnealing (with a power), WarmupHoldPolicy (constant),
    InverseSquareRootAnnealing (which has no floor before max_steps), WarmupHoldAnnealLinear
    (arXiv:2404.06395), WarmupHoldAnnealOneMinusSquareRoot (arXiv:2405.18392), NoamAnnealing.
    """
    if name == "noam":
        s = max(1, step)
        factor = s**-0.5 if warmup_steps == 0 else min(s**-0.5, s * warmup_steps**-1.5)
        rate = lr * d_model**-0.5 * factor
        return max(rate, min_lr) if s > warmup_steps else rate
    if name == "cosine" and constant_steps:
        if step <= warmup_steps and warmup_steps > 0:
            return lr * step / warmup_steps
        decay_steps = max_steps - constant_steps - warmup_steps
        if step > warmup_steps + decay_steps:
            return min_lr
        progress = (step - warmup_steps) / decay_steps
        return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2
    if warmup_steps > 0 and step <= warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if name == "constant":
        return lr
    if step > max_steps:
        return min_lr
    if name == "inverse_sqrt":
        return max(min_lr, lr / math.sqrt((step + 1) / (warmup_steps + 1)))
    start = warmup_steps + (hold_steps if name == "wsd" else 0)
    if step < start:
        return lr
    progress = (step - start) / max(1, max_steps - start)
    if name == "cosine":
        return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2
    if name == "wsd" and decay_shape == "sqrt":
        return max(min_lr, lr * (1 - math.sqrt(progress)))
    assert name in ("linear", "wsd"), name
    return min_lr + (lr - min_lr) * (1 - progress) ** power


def schedule_of(schedule, lr: float, max_steps: int, d_model: int = 1) -> Callable[..., float]:
    """A ScheduleRecipe -> function of a step, and of a group's highest rate where it is not `lr`.

    Raises:
        ValueError: the warm-up, or the warm-up and the hold, are as long as the run.
    """
    warmup_steps = warm_up(schedule, max_steps)
    if warmup_steps and warmup_steps >= max_steps and schedule.name != "noam":
        raise ValueError(
            f"schedule.warmup_steps is {warmup_steps}, but the run has {max_steps} steps; "
            "shorten the warm-up or train longer"
        )
    hold_steps = schedule.hold_steps or 0
    if schedule.hold_ratio is not None:
        hold_steps = int(schedule.hold_ratio * max_steps)
    if schedule.name == "wsd":
        if schedule.hold_steps is None and schedule.hold_ratio is None:
            hold_steps = int(0.8 * max_steps) - warmup_steps  # the last fifth decays
        if hold_steps < 0 or warmup_steps + hold_steps >= max_steps:
            raise ValueError(
                f"schedule wsd: {warmup_steps} steps of warm-up and {hold_steps} of hold leave "
                f"nothing of {max_steps} steps for the decay; shorten them"
            )
    constant_steps = schedule.constant_steps or 0
    if constant_steps and warmup_steps + constant_steps >= max_steps:
        raise ValueError(
            f"schedule.constant_steps is {constant_steps}: with {warmup_steps} steps of warm-up "
            f"nothing of {max_steps} steps is left for the decay; shorten them"
        )
    d_model = schedule.d_model or d_model

    def rate(step: int, peak: float = lr) -> float:
        # A group whose highest rate is below min_lr stays at it.
        return learning_rate(
            step,
            peak,
            min(schedule.min_lr, peak),
            warmup_steps,
            max_steps,
            schedule.name,
            hold_steps,
            schedule.decay_shape,
            d_model,
            schedule.power,
            constant_steps,
        )

    return rate


def warm_up(schedule, max_steps: int) -> int:
    """Steps of a ScheduleRecipe's warm-up."""
    if schedule.warmup_ratio is not None:
        return int(schedule.warmup_ratio * max_steps)
    return schedule.warmup_steps or 0


def set_learning_rates(optimizer: torch.optim.Optimizer, rate: Callable, step: int) -> None:
    """Every group's rate of this step, from its highest (`peak_lr`)."""
    for group in optimizer.param_groups:
        group["lr"] = rate(step, group["peak_lr"])


# --- groups of parameters -----------------------------------------------------------------------


def is_vector(name: str, parameter: Tensor) -> bool:
    """Norms and biases: one dimension that is not 1, or called a bias (attention's position biases
    are matrices, heads by width)."""
    return parameter.numel() == max(parameter.shape, default=1) or "bias" in name.split(".")[-1]


def parameter_groups(model: nn.Module, optim) -> list[dict]:
    """Trainable parameters in the model's order, by learning rate and weight decay.

    The rate of a parameter is that of the most specific name in `optim.lr_groups` that covers it,
    else `optim.lr`; times `layer_decay ** (layers above it)`, where the heads lie above the last
    encoder layer and the subsampling below the first (Clark et al. 2020, arXiv:2003.10555). NeMo
    decays every parameter, and so one group is the default; `decay_norms_and_biases: false` exempts
    vectors.

    Returns:
        Groups with "params", "names", "peak_lr", "lr" and "weight_decay".
    Raises:
        ValueError: nothing is trainable, or lr_groups names what the model does not have.
    """
    rates = []  # (path, rate), the most specific last
    for name, rate in optim.lr_groups.items():
        rates += [(path, rate) for path in matching(model, name, "optim.lr_groups")]
    rates.sort(key=lambda item: item[0].count("."))
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = optim.lr
        for path, value in rates:
            if f"{name}.".startswith(f"{path}."):
                rate = value
        if optim.layer_decay is not None:
            rate *= optim.layer_decay ** depth_of(model, name)
        decay = optim.weight_decay
        if not optim.decay_norms_and_biases and is_vector(name, parameter):
            decay = 0.0
        group = groups.setdefault((rate, decay), {"params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError("every parameter is frozen; freeze less (recipe section `freeze`)")
    return [
        {**group, "peak_lr": rate, "lr": rate, "weight_decay": decay}
        for (rate, decay), group in groups.items()
    ]


# --- the optimizer ------------------------------------------------------------------------------


def build_optimizer(model: nn.Module, optim, seed: int = 0) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, as an OptimRecipe says ("adam": weight decay is a part
    of the gradient); `seed` is that of the stochastic rounding, which parameters in bfloat16 get.

    "adamw8bit" keeps the two moments in 8 bits (bitsandbytes), but those of embeddings in 32:
    their rows get rare and uneven gradients (Dettmers et al. 2022, arXiv:2110.02861). That paper's
    StableEmbedding also puts a LayerNorm behind the embedding, which no stock checkpoint has, and
    which is not added here.
    """
    groups = parameter_groups(model, optim)
    arguments = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    parameters = [parameter for group in groups for parameter in group["params"]]
    half = any(parameter.dtype == torch.bfloat16 for parameter in parameters)
    if optim.name == "adamw":
        if half:
            return RoundedAdamW(groups, seed=seed, **arguments)
        # The fused form is one pass over each tensor, on the CPU as on the GPU.
        return torch.optim.AdamW(groups, fused=True, amsgrad=optim.amsgrad, **arguments)
    if optim.name == "adam":
        return torch.optim.Adam(groups, fused=True, amsgrad=optim.amsgrad, **arguments)
    import bitsandbytes

    optimizer = bitsandbytes.optim.AdamW8bit(groups, **arguments)
    # A manager of its own: the global one knows parameters by their address, which another model
    # of the same process may get later.
    optimizer.mng = bitsandbytes.optim.GlobalOptimManager.__new__(type(optimizer.mng))
    optimizer.mng.initialize()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            optimizer.mng.override_config(module.weight, "optim_bits", 32)
    if half:
        _round_updates(optimizer, parameters, seed)
    return optimizer


def stochastic_round(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, up or down at random so that the expectation is the value itself.

    A value between two neighbours becomes the upper one with probability (value - lower) /
    (upper - lower); a value that bfloat16 has stays. To nearest, an update below half a unit in the
    last place (1/512 of the weight) would be lost whole, and at small rates nearly all are.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(
        0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    # bfloat16 is the upper half of the bits: a carry out of the lower half rounds up.
    return (bits + noise).bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)


class Rounding:
    """The random bits of an update follow from the seed and the place and step of its (first)
    parameter: equal after resuming, and equal on every process that holds a copy."""

    def __init__(self, parameters: Iterable[Tensor], seed: int):
        self.place = {parameter: i for i, parameter in enumerate(parameters)}
        self.seed = seed
        self.generators = {}

    def __call__(self, parameter: Tensor, values: Tensor, step: int) -> Tensor:
        device = values.device
        generator = self.generators.setdefault(device, torch.Generator(device))
        entropy = np.random.SeedSequence([self.seed, self.place[parameter], step])
        generator.manual_seed(int(entropy.generate_state(1)[0]))
        return stochastic_round(values, generator)


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW for parameters in bfloat16: moments and the update in float32, a few parameters at a
    time, then stochastic rounding. Parameters in float32 are updated as ever."""

    def __init__(self, groups: list[dict], lr: float, betas, eps: float, seed: int):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.rounding = Rounding([p for g in self.param_groups for p in g["params"]], seed)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameters in _portions([p for p in group["params"] if p.grad is not None]):
                self._update(group, parameters)

    def _update(self, group: dict, parameters: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = 0
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = torch.zeros_like(parameter, dtype=torch.float32)
        values = [parameter.float() for parameter in parameters]  # themselves where float32
        done = [float(state["step"]) for state in states]
        adamw(
            values,
            [parameter.grad.float() for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            list(torch.tensor(done, device=values[0].device).unbind()),
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for state in states:
            state["step"] += 1
        halves = [i for i, p in enumerate(parameters) if p.dtype == torch.bfloat16]
        if halves:
            first, flat = halves[0], torch.cat([values[i].flatten() for i in halves])
            rounded = self.rounding(parameters[first], flat, states[first]["step"])
            parts = rounded.split([values[i].numel() for i in halves])
            for i, part in zip(halves, parts, strict=True):
                parameters[i].copy_(part.view_as(parameters[i]))

    def load_state_dict(self, state_dict: dict):
        """torch casts moments to their parameter's type; these stay float32."""
        super().load_state_dict(state_dict)
        given = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(given, own, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    value = value.to(parameter.device, torch.float32, copy=True)
                self.state[parameter][key] = value


def _portions(parameters: list[Tensor], most: int = 1 << 25) -> Iterator[list[Tensor]]:
    """Lists of neighbours with at most so many elements, or of one parameter: what is held in
    float32 besides stays small."""
    portion, size = [], 0
    for parameter in parameters:
        if portion and size + parameter.numel() > most:
            yield portion
            portion, size = [], 0
        portion.append(parameter)
        size += parameter.numel()
    if portion:
        yield portion


def _round_updates(optimizer, parameters: list[Tensor], seed: int) -> None:
    """Makes bitsandbytes update a float32 copy of each bfloat16 parameter, which is then rounded;
    its kernels round to nearest."""
    update, rounding = optimizer.update_step, Rounding(parameters, seed)

    @torch.no_grad()
    def update_step(group, parameter, group_index, index):
        if parameter.dtype != torch.bfloat16:
            update(group, parameter, group_index, index)
            return
        half, gradient = parameter.data, parameter.grad
        parameter.grad = None
        parameter.data = half.float()
        parameter.grad = gradient.float()
        update(group, parameter, group_index, index)
        value, parameter.grad = parameter.data, None
        half.copy_(rounding(parameter, value, optimizer.state[parameter]["step"]))
        parameter.data, parameter.grad = half, gradient

    optimizer.update_step = update_step


# --- its state in checkpoints -------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """{parameter name: its moments and step}; parameters that have not moved yet have none."""
    state = optimizer.state_dict()
    names = [name for group in optimizer.param_groups for name in group["names"]]
    return {names[index]: value for index, value in state["state"].items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, named: dict[str, dict]) -> None:
    """By name, so that groups, rates and what is frozen may have changed since; what is new starts
    without moments. Rates, decay and betas stay this optimizer's own."""
    own = optimizer.state_dict()
    names = [name for group in optimizer.param_groups for name in group["names"]]
    state = {index: named[name] for index, name in enumerate(names) if name in named}
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})
