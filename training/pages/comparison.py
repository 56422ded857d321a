"""What a recipe amounts to, and what its differences from another, or from the training of its
checkpoint, mean."""

import dataclasses
from pathlib import Path

from fastconformer import ASRModel
from training.data.stream import batch_order
from training.optim.optim import schedule_of, warm_up
from training.recipe.funasr import own_training
from training.recipe.nemo_optim import SCHEDULERS
from training.recipe.recipe import Recipe, stage_recipes
from training.setup.prepare import Prepared, run_length

MEANINGS = {  # prefixes of keys; the longest decides
    "output": "results go to another folder",
    "resume": "whether a run folder that is there is gone on with",
    "model.init_from": "another start: nothing else is comparable before the first evaluation",
    "model.tokenizer": "another vocabulary: losses per token are not comparable, WER is",
    "model.transfer": "whether pieces keep what they learnt",
    "model.dropout": "more dropout fits small data, and slows learning",
    "model.sample_rate": "another front end; what lies above half the rate is not heard",
    "model.mel_edges": "keep: filters above half of the rate are empty, a constant; stretch: all "
    "lie below it, and each hears another frequency than the encoder was trained with",
    "encoder": "another attention: longer audio, and weights that must be learnt again",
    "data.train": "other training data",
    "data.validation": "numbers are measured on other clips: not comparable",
    "data.batch": "other batches: with a larger one a step is surer, and there are fewer an epoch",
    "data.m": "other clips are left out",
    "data.num_workers": "speed only",
    "data.cache_gb": "speed only",
    "loss.heads": "which heads learn; one that does not stays as it was while the encoder moves",
    "loss.eps": "gradients skip unlikely cells of the lattice: faster steps, not quite NeMo's",
    "loss": "another objective: loss values are not comparable, WER is",
    "freeze": "other parts stay as they are; frozen layers keep the old domain, and cost less",
    "lora": "adapters instead of whole weights: less memory, less capacity to change",
    "optim.name": "8-bit states save about 6 bytes a parameter",
    "optim.lr": "how far a step goes; too high forgets the checkpoint in the first hundred steps",
    "optim": "how the optimizer moves",
    "schedule": "how the rate rises and falls",
    "prompt": "other values of a prompt's slots",
    "retain": "how much of the original is held on to",
    "trainer.max_steps": "how long it learns",
    "trainer.epochs": "how long it learns",
    "trainer.accumulate": "batches in a step: a larger effective batch, slower steps",
    "trainer.precision": "memory and speed; bf16 has 8 bits of precision",
    "trainer.seed": "another order and other masks: the spread between seeds is the noise",
    "trainer": "how it runs, not what it learns",
    "spec_augment": "how much of the features is hidden: against overfitting, for longer training",
    "augment": "how the audio is changed: for conditions that the data lacks",
    "keep": "which of the evaluated models is kept",
    "guard": "whether forgetting the general set disqualifies a model",
    "stages": "another sequence of stages",
}


def planned_stages(recipe: Recipe) -> list[Recipe]:
    """The recipe, or each of its stages; a stage that starts from a model which is not there yet
    starts from the first stage's instead: the same parts, other weights."""
    stages = stage_recipes(recipe) or [recipe]
    first = stages[0].model
    planned = stages[:1]
    for stage in stages[1:]:
        model = stage.model
        if not Path(model.init_from).exists():
            kept = {"dropout": model.dropout, "sample_rate": model.sample_rate or first.sample_rate}
            model = dataclasses.replace(first, **kept)
        planned.append(dataclasses.replace(stage, model=model))
    return planned


def facts(run: Prepared) -> dict[str, str]:
    """What the recipe amounts to, in numbers that two runs can be compared by."""
    recipe, trainer = run.recipe, run.recipe.trainer
    order, length = batch_order(run.train, run.rules, 0), run_length(run)
    hours = float(run.train.durations_s.sum()) / 3600
    drawn = float(run.train.durations_s[[i for batch in order for i in batch]].sum())
    step_s = drawn / len(order) * trainer.accumulate
    epochs = length.max_steps * trainer.accumulate / len(order)
    moving = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in run.model.parameters())
    later = f", more at steps {sorted(recipe.freeze.until.values())}" if recipe.freeze.until else ""
    relative = lr_beside_scratch(run.model, recipe)
    return {
        "heads trained": "+".join(run.objective.heads),
        "front end": run.model.preprocessor.description,
        "parameters that move": f"{moving / 1e6:.2f} M of {total / 1e6:.2f} M{later}",
        "training audio": f"{hours:.2f} h in {len(run.train.utterances)} clips",
        "audio in a step": f"{step_s:.0f} s",
        "steps": f"{length.max_steps}",
        "epochs": f"{epochs:.1f}",
        "audio heard": f"{length.max_steps * step_s / 3600:.1f} h",
        "highest lr": highest_lr(run, length.max_steps)
        + (f", {relative:.3g} x from scratch" if relative else ""),
        "lowest lr": f"{recipe.schedule.min_lr:g}",
        "schedule": recipe.schedule.name,
        "warm-up": f"{warm_up(recipe.schedule, length.max_steps)} steps",
        "optimizer": recipe.optim.name,
        "betas": _numbers(recipe.optim.betas),
        "weight decay": f"{recipe.optim.weight_decay:g}",
        "most clips in a batch": str(recipe.data.batch_size),
        "most seconds in a batch": str(recipe.data.batch_duration_s),
        "batches in a step": str(trainer.accumulate),
        "precision": trainer.precision,
        "frozen parts": _frozen(run),
        "longest clip, s": f"{recipe.data.max_duration_s:g}",
        "pieces": str(run.model.config.vocab_size),
        "sample rate": str(run.model.sample_rate),
        **_of_config(own_training(run.model.config.record)),
        **_lattice(run),
        "SpecAugment": _spec_augment(run),
        "other augmentation": _augmentation(recipe),
    }


def checkpoint_facts(config: dict) -> dict[str, str]:
    """The rows of `facts` that a checkpoint's own config tells of its training."""
    config = own_training(config)
    optim = config.get("optim") or {}
    sched, data = optim.get("sched") or {}, config.get("train_ds") or {}
    peak = peak_lr(optim, (config.get("encoder") or {}).get("d_model") or 1)
    steps = sched.get("warmup_steps")
    found = {
        "highest lr": peak and f"{peak:.3g}",
        "lowest lr": sched.get("min_lr"),
        "schedule": SCHEDULERS.get(sched.get("name"), sched.get("name")),
        "warm-up": None if steps is None else f"{steps} steps",
        "optimizer": optim.get("name"),
        "betas": optim.get("betas") and _numbers(optim["betas"]),
        "weight decay": optim.get("weight_decay"),
        "most clips in a batch": data.get("batch_size"),
        "longest clip, s": data.get("max_duration"),
        "pieces": _vocabulary(config),
        "sample rate": _rate(config),
        **_of_config(config),
        "SpecAugment": _masks(config),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _of_config(config: dict) -> dict[str, str]:
    encoder = config.get("encoder") or {}
    found = {
        "dropout": encoder.get("dropout"),
        "attention": encoder.get("self_attention_model"),
        "loss": _loss(config),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _lattice(run: Prepared) -> dict[str, str]:
    """Which cells the gradient of a transducer's lattice skips."""
    eps = run.objective.eps
    told = f"below {eps:g}" if eps else "none"
    return {"lattice cells left out": told} if run.objective.has_lattice else {}


def _numbers(values) -> str:
    return ", ".join(f"{float(value):g}" for value in values)


def _frozen(run: Prepared) -> str:
    """Parts that never move, with their parameters."""
    sizes: dict[str, int] = {}
    for name, parameter in run.model.named_parameters():
        if run.freezing.parameters[name] is None:
            part = ".".join(name.split(".")[:3]) if ".layers." in name else name.split(".")[0]
            sizes[part] = sizes.get(part, 0) + parameter.numel()
    total = sum(sizes.values())
    listed = ", ".join(list(sizes)[:4]) + (f" and {len(sizes) - 4} more" if len(sizes) > 4 else "")
    return f"{listed} ({total / 1e6:.2f} M)" if sizes else "none"


def highest_lr(run: Prepared, max_steps: int) -> str:
    """The highest rate that the run reaches; Noam's lr is a factor and no rate."""
    recipe = run.recipe
    width = run.model.config.encoder.d_model
    rate_at = schedule_of(recipe.schedule, recipe.optim.lr, max_steps, width)
    steps = {min(max_steps - 1, step) for step in (0, 1, *_turns(recipe, max_steps))}
    highest = max(rate_at(step) for step in steps)
    told = f"{highest:.3g}"
    if recipe.schedule.name == "noam":
        told += f" (Noam, factor {recipe.optim.lr:g})"
        if max_steps <= warm_up(recipe.schedule, max_steps):
            peak = _noam_peak(recipe, width, max_steps)
            told += f"; the run ends in the warm-up, below its peak of {peak:.3g}"
    return told


def _turns(recipe: Recipe, max_steps: int) -> tuple[int, ...]:
    """Steps at which a schedule is at its highest, or near."""
    last = warm_up(recipe.schedule, max_steps)
    return last, last + 1


def _noam_peak(recipe: Recipe, width: int, max_steps: int) -> float:
    steps = max(1, warm_up(recipe.schedule, max_steps))
    return recipe.optim.lr * (recipe.schedule.d_model or width) ** -0.5 * steps**-0.5


def lr_beside_scratch(model: ASRModel, recipe: Recipe) -> float | None:
    """The recipe's highest rate over that of the checkpoint's own training; None if unknown."""
    width = model.config.encoder.d_model
    peak = peak_lr(own_training(model.config.record).get("optim") or {}, width)
    mine = recipe.optim.lr
    if recipe.schedule.name == "noam":
        mine = _noam_peak(recipe, width, recipe.trainer.max_steps or 1)
    return mine / peak if peak else None


def peak_lr(optim: dict, d_model: int) -> float | None:
    """Highest rate of a NeMo `optim` section; Noam's factor is not a rate."""
    lr, sched = optim.get("lr"), optim.get("sched") or {}
    if lr is None or not isinstance(lr, int | float):
        return None
    if sched.get("name") != "NoamAnnealing":
        return float(lr)
    steps, width = sched.get("warmup_steps") or 0, sched.get("d_model")
    width = width if isinstance(width, int) else d_model
    return float(lr) * width**-0.5 * steps**-0.5 if steps else None


def _spec_augment(run: Prepared) -> str:
    section = own_training(run.model.config.record).get("spec_augment") or {}
    given = dataclasses.asdict(run.recipe.spec_augment)
    options = {k: v if v is not None else section.get(k) for k, v in given.items()}
    if run.objective.augment is None:
        return "none"
    return ", ".join(f"{k} {v}" for k, v in options.items() if v)


def _augmentation(recipe: Recipe) -> str:
    augment, parts = recipe.augment, []
    if augment.speeds:
        parts.append(f"speeds {list(augment.speeds)}")
    if augment.gain_db:
        parts.append("gain")
    if augment.shift_s:
        parts.append("shift")
    for name in ("white_noise", "noise", "rir", "babble", "hum", "telephone"):
        if probability := getattr(augment, name).probability:
            parts.append(f"{name} on {probability:.0%} of clips")
    return ", ".join(parts) or "none"


def meaning(key: str) -> str:
    """What a difference of this recipe key means, in words."""
    known = [prefix for prefix in MEANINGS if key.startswith(prefix)]
    return MEANINGS[max(known, key=len)] if known else ""


def _vocabulary(config: dict) -> int | None:
    labels = (config.get("joint") or config.get("decoder") or {}).get("vocabulary")
    return len(labels) if labels else None


def _rate(config: dict):
    return (config.get("preprocessor") or {}).get("sample_rate") or config.get("sample_rate")


def _masks(config: dict) -> str:
    section = config.get("spec_augment") or {}
    keys = ("freq_masks", "time_masks", "freq_width", "time_width", "rect_masks")
    return ", ".join(f"{k} {section[k]}" for k in keys if section.get(k)) or "none"


def _loss(config: dict) -> str | None:
    section = config.get("loss") or {}
    kwargs = section.get(f"{section.get('loss_name')}_kwargs") or {}
    options = [f"{k} {kwargs[k]}" for k in ("sigma", "omega") if k in kwargs]
    if "use_loss_mask_for_prompt" in config:  # of multi-task models
        of = "the text" if config["use_loss_mask_for_prompt"] else "prompt and text"
        options = [f"label_smoothing {section.get('label_smoothing', 0.0)}, of {of}"]
    return " ".join(part for part in (section.get("loss_name"), *options) if part) or None
