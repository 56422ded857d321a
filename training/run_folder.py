"""What a run keeps in its folder: checkpoints to resume from, and JSON lines."""

import contextlib
import dataclasses
import json
import logging
import pickle
from pathlib import Path

import torch

from fastconformer.files import atomic_file
from training.ema import EMA
from training.optim import load_optimizer_state, optimizer_state
from training.recipe import Recipe, recipe_differences, recipe_from_dict

log = logging.getLogger("finetune")


@dataclasses.dataclass
class Progress:
    """How far a run is; part of every checkpoint."""

    step: int = 0  # optimizer steps done, skipped ones included
    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    evaluated: int = -1  # step of the last evaluation
    best: tuple[float, float] | None = None  # (WER, CER) of best/
    best_step: int = 0
    baseline: tuple[float, float] | None = None  # of the untouched model
    skipped: int = 0  # steps without an update: a loss or gradient was not finite
    seconds: float = 0.0
    losses: list[float] = dataclasses.field(default_factory=list)  # since the last evaluation


def checkpoint_paths(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob("step_*.pt"), key=lambda path: int(path.stem.removeprefix("step_")))


def save_checkpoint(
    folder: Path, model, optimizer, ema: EMA | None, progress: Progress, recipe: Recipe
) -> Path:
    """Everything that resuming needs, in one file; older ones beyond `keep_last` go."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{progress.step:08d}.pt"
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer_state(optimizer),
        "ema": None if ema is None else ema.state_dict(),
        "progress": dataclasses.asdict(progress),
        "recipe": dataclasses.asdict(recipe),
    }
    with atomic_file(path) as temporary:
        torch.save(state, temporary)
    for old in checkpoint_paths(folder)[: -recipe.trainer.keep_last]:
        old.unlink()
    return path


def resume(path: Path, model, optimizer, ema: EMA | None, recipe: Recipe) -> Progress:
    """Load `save_checkpoint`'s file into model, optimizer and moving average.

    Raises:
        ValueError: the file is damaged or belongs to another model.
    """
    try:
        state = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
        old = recipe_from_dict(_lists(state["recipe"]), f"recipe in {path}")
        model.load_state_dict(state["model"])
        load_optimizer_state(optimizer, state["optimizer"])
        if ema is not None:
            ema.load_state_dict(state["ema"] or {})
        progress = Progress(**state["progress"])
    except (RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"cannot resume from {path}: {' '.join(str(error).split())[:300]}; "
            "remove it to go on from an older one, or choose another output folder"
        ) from error
    for key, (before, now) in recipe_differences(old, recipe).items():
        log.warning("recipe changed since the checkpoint: %s was %s, is %s", key, before, now)
    return progress


def _lists(value):
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def json_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def append_line(path: Path, record: dict) -> None:
    """One more JSON line, on disk when this returns to the operating system."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json_line(record))


def keep_lines_until(path: Path, step: int) -> None:
    """Drop lines past a step, which a resumed run writes again, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
