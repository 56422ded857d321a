"""A NeMo file's `model.optim` with its schedule, in a recipe's words: what is left out means what
it means in NeMo, which is torch's default or 0, not the recipe's.

Source: NeMo's `core/optim/lr_scheduler.py`, whose warm-up, decay and floors
`training.optim.optim.learning_rate` follows step by step.
"""

OPTIMIZERS = {"adamw": "adamw", "adam": "adam", "adamw8bit": "adamw8bit"}
WEIGHT_DECAY = {"adamw": 0.01, "adam": 0.0, "adamw8bit": 0.01}  # torch's and bitsandbytes' defaults
SCHEDULERS = {
    "CosineAnnealing": "cosine",
    "NoamAnnealing": "noam",
    "InverseSquareRootAnnealing": "inverse_sqrt",
    "PolynomialDecayAnnealing": "linear",
    "PolynomialHoldDecayAnnealing": "wsd",
    "WarmupAnnealing": "linear",
    "WarmupPolicy": "constant",
    "WarmupHoldPolicy": "constant",
    "WarmupHoldAnnealLinear": "wsd",
    "WarmupHoldAnnealOneMinusSquareRoot": "wsd",
}
HOLDS = [name for name, ours in SCHEDULERS.items() if ours == "wsd"]


def translate_optimizer(tree: dict, found) -> None:
    """`tree`: the YAML; `found`: the Translation that is filled."""
    optim = (tree.get("model") or {}).get("optim")
    if not isinstance(optim, dict):
        return
    take = found.take
    name = str(optim.get("name", "adamw")).lower()
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"{found.where}: model.optim.name is {optim['name']!r}; here: {known}")
    take("model.optim.name", "optim.name", lambda v: OPTIMIZERS[name])
    take("model.optim.lr", "optim.lr", float)
    take("model.optim.eps", "optim.eps", float)
    take("model.optim.amsgrad", "optim.amsgrad")
    for key in ("fused", "foreach", "capturable", "differentiable"):
        take(f"model.optim.{key}")  # the same step by another road
    if take("model.optim.betas", "optim.betas", _pair) is None:
        found.set("optim.betas", [0.9, 0.999], "model.optim.betas (left out)")
    if take("model.optim.weight_decay", "optim.weight_decay", float) is None:
        found.set("optim.weight_decay", WEIGHT_DECAY[name], "model.optim.weight_decay (left out)")
    _schedule(optim.get("sched") or {}, found)


def _pair(value) -> list[float]:
    return [float(beta) for beta in value]


def _schedule(sched: dict, found) -> None:
    section, take = "model.optim.sched", found.take
    name = sched.get("name")
    if name is None:
        found.drop(section)
        found.set("schedule.name", "constant", f"{section} (left out)")
        found.set("schedule.min_lr", 0.0)
        return
    if name not in SCHEDULERS:
        known = ", ".join(SCHEDULERS)
        raise ValueError(f"{found.where}: {section}.name is {name!r}; known: {known}")
    take(f"{section}.name", "schedule.name", SCHEDULERS.get)
    warm_up = take(f"{section}.warmup_steps", "schedule.warmup_steps", int)
    ratio = take(f"{section}.warmup_ratio", "schedule.warmup_ratio", float)
    least = take(f"{section}.min_lr")
    if name == "InverseSquareRootAnnealing":
        least = 0.0  # NeMo has no floor before the last step
    found.set("schedule.min_lr", float(least or 0.0), f"{section}.min_lr")
    if name in HOLDS:
        _hold(name, bool(warm_up or ratio), found)
    else:
        for key in ("hold_steps", "hold_ratio"):
            take(f"{section}.{key}")  # WarmupHoldPolicy holds to the end
    if name == "WarmupHoldAnnealOneMinusSquareRoot":
        found.set("schedule.decay_shape", "sqrt", f"{section}.name")
    if name.startswith("Polynomial"):
        take(f"{section}.power", "schedule.power", float)
        if take(f"{section}.cycle"):
            found.refuse(f"{section}.cycle", "a decay in cycles has no counterpart here")
    if name == "CosineAnnealing":
        take(f"{section}.constant_steps", "schedule.constant_steps", int)
        if take(f"{section}.constant_ratio"):
            found.refuse(f"{section}.constant_ratio", "give constant_steps")
    take(f"{section}.d_model", "schedule.d_model", lambda v: v if isinstance(v, int) else None)
    steps, run = take(f"{section}.max_steps"), found.left.get("trainer.max_steps")
    if steps is not None and int(steps) > 0 and int(steps) != int(run or 0):
        found.refuse(f"{section}.max_steps", f"is {steps}, the run has {run}; leave it out")
    if take(f"{section}.last_epoch") not in (None, -1):
        found.refuse(f"{section}.last_epoch", "a schedule starts at its first step here")
    for key in ("monitor", "reduce_on_plateau", "iters_per_batch", "t_max_epochs"):
        take(f"{section}.{key}")  # of NeMo's own machinery


def _hold(name: str, warms_up: bool, found) -> None:
    section, take = "model.optim.sched", found.take
    steps = take(f"{section}.hold_steps", "schedule.hold_steps", int)
    ratio = take(f"{section}.hold_ratio", "schedule.hold_ratio", float)
    if steps is None and ratio is None:
        if warms_up:  # NeMo then decays as if the warm-up had not been, with a step at its end
            found.refuse(section, f"{name} with a warm-up needs hold_steps (0 for none)")
        found.set("schedule.hold_steps", 0, f"{section}.hold_steps (left out)")
