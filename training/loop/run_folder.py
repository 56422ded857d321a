"""What a run keeps in its folder: checkpoints, models, failed batches, JSON lines."""

import contextlib
import dataclasses
import json
import logging
import pickle
import platform
import shutil
from pathlib import Path

import torch

from fastconformer import __version__
from fastconformer.checkpoint.contents import Checkpoint
from fastconformer.checkpoint.files import atomic_file
from fastconformer.checkpoint.folder import write_folder
from training.data.json_lines import json_line
from training.data.store import Batch
from training.data.utterances import Utterance
from training.loop.keep import Kept
from training.loop.ranks import ONE, Ranks, cut_like, cut_moments, gathered
from training.optim.ema import EMA
from training.optim.optim import load_optimizer_state, optimizer_state
from training.recipe.recipe import Recipe, as_lists, recipe_differences, recipe_from_dict

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

log = logging.getLogger("finetune")

FORMAT_VERSION = 1  # of a run folder


@contextlib.contextmanager
def alone_in(folder: Path):
    """ValueError where another process is at work in the folder. The lock ends with its process,
    however that ends; the loader's workers, which may live on for seconds, do not hold it."""
    with open(folder / ".lock", "a") as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"{folder}: another run is at work there; wait for it, or choose another output"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): start no second run there", folder, error)
        yield


@dataclasses.dataclass
class RunState:
    """How far a run is; part of every checkpoint."""

    step: int = 0  # optimizer steps done, skipped ones included
    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    evaluated: int = -1  # step of the last evaluation
    baseline: dict | None = None  # the ledger's first record: the untouched model
    best: dict | None = None  # the ledger's record of best/
    kept: Kept = dataclasses.field(default_factory=Kept)
    skipped: int = 0  # steps without an update: a loss or gradient was not finite
    splits: int = 0  # steps that ran out of memory and were done again in pieces
    seconds: float = 0.0
    heard_s: float = 0.0  # seconds of audio that were trained on, by all processes
    losses: list[float] = dataclasses.field(default_factory=list)  # since the last evaluation
    ended: str | None = None  # why the run has ended before its last step
    averaged: bool = False  # the average of the best has been measured


def write_facts(out: Path, device: torch.device) -> None:
    """`run.json`: what the folder is, and what it was made with and on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts = {
        "format_version": FORMAT_VERSION,
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": f"{name}, {torch.get_num_threads()} threads" if name == "cpu" else name,
    }
    with atomic_file(out / "run.json") as temporary:
        temporary.write_text(json_line(facts), encoding="utf-8")


def check_format(out: Path) -> None:
    """ValueError: the run folder was written by a newer version of this program."""
    path = out / "run.json"
    if path.exists():
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.get("format_version", 0) > FORMAT_VERSION:
            raise ValueError(
                f"{out} was written by version {facts.get('version')}, this is {__version__}; "
                "update, or choose another output"
            )


# --- checkpoints --------------------------------------------------------------------------------


def checkpoint_paths(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob("step_*.pt"), key=lambda path: int(path.stem.removeprefix("step_")))


def save_checkpoint(
    folder: Path,
    model,
    optimizer,
    ema: EMA | None,
    progress: RunState,
    recipe: Recipe,
    ranks: Ranks = ONE,
) -> Path:
    """Everything that resuming needs, in one file, whatever the number of processes; older ones
    beyond `keep_last` go. `training.average` reads it too, so the config and tokenizer are in it.
    """
    path = folder / f"step_{progress.step:08d}.pt"
    state = {
        "model": gathered(model.state_dict()),
        "optimizer": gathered(optimizer_state(optimizer)),
        "ema": None if ema is None else gathered(ema.state_dict()),
        "progress": dataclasses.asdict(progress),
        "recipe": dataclasses.asdict(recipe),
        "config": model.config.record,
        "tokenizer_files": model.tokenizer_files,
    }
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            torch.save(state, temporary)
        for old in checkpoint_paths(folder)[: -recipe.trainer.keep_last]:
            old.unlink()
    ranks.barrier()
    return path


def resume_newest(
    paths: list[Path], model, optimizer, ema: EMA | None, recipe: Recipe, ranks: Ranks = ONE
) -> RunState:
    """`resume` from the newest of these checkpoints, oldest first, that can be read; damaged ones
    are renamed, so that they count no more.

    Raises:
        ValueError: none of them can be read; of the newest.
    """
    first_error, damaged = None, []
    for path in reversed(paths):
        try:
            state = resume(path, model, optimizer, ema, recipe)
        except ValueError as error:
            first_error = first_error or error
            damaged.append(path)
            continue
        ranks.barrier()  # all have read
        for bad in damaged:
            log.warning("%s is damaged, and is now %s.damaged", bad, bad.name)
            if ranks.is_main:
                bad.rename(bad.with_name(f"{bad.name}.damaged"))
        log.info("resuming after step %d from %s", state.step, path)
        return state
    raise first_error


def resume(path: Path, model, optimizer, ema: EMA | None, recipe: Recipe) -> RunState:
    """Load `save_checkpoint`'s file into model, optimizer and moving average.

    Raises:
        ValueError: the file is damaged or belongs to another model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        old = recipe_from_dict(as_lists(state["recipe"]), f"recipe in {path}")
        model.load_state_dict(cut_like(state["model"], model.state_dict()))
        load_optimizer_state(optimizer, cut_moments(state["optimizer"], optimizer))
        if ema is not None:
            ema.load_state_dict(cut_like(state["ema"] or {}, ema.average), model)
        progress = RunState(**state["progress"] | {"kept": Kept(**state["progress"]["kept"])})
    except (RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.PickleError) as error:
        raise ValueError(
            f"cannot resume from {path}: {' '.join(str(error).split())[:300]}; "
            "remove it to go on from an older one, or choose another output folder"
        ) from error
    for key, (before, now) in recipe_differences(old, recipe).items():
        log.warning("recipe changed since the checkpoint: %s was %s, is %s", key, before, now)
    return progress


# --- models -------------------------------------------------------------------------------------


def save_model(checkpoint: Checkpoint, folder: Path, ranks: Ranks = ONE) -> None:
    """A model folder, from tensors that may lie in shards."""
    state = gathered(checkpoint.state_dict)
    if ranks.is_main:
        write_folder(folder, dataclasses.replace(checkpoint, state_dict=state))
    ranks.barrier()


def top_folder(out: Path, step: int) -> Path:
    return out / "top" / f"step_{step:08d}"


def prune_top(out: Path, kept: Kept) -> None:
    """Only the models of `kept.top` stay. To be called after the checkpoint that names them."""
    names = {top_folder(out, step).name for _, _, step in kept.top}
    for folder in (out / "top").glob("step_*"):
        if folder.name not in names:
            shutil.rmtree(folder)


# --- batches that failed ------------------------------------------------------------------------


def save_batch(path: Path, batch: Batch, **facts) -> None:
    """A batch with its sound and tokens, and what else is known of it: `load_batch` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: getattr(batch, name).cpu()
        for name in ("audio", "audio_lengths", "targets", "target_lengths")
    }
    utterances = [dataclasses.asdict(utterance) for utterance in batch.utterances]
    with atomic_file(path) as temporary:
        torch.save({**tensors, "utterances": utterances, **facts}, temporary)


def load_batch(path: Path) -> tuple[Batch, dict]:
    """A batch that `save_batch` wrote, and its facts: {"seeds": the arguments of `seed_step`}."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    utterances = tuple(
        Utterance(**u | {"tokens": tuple(u["tokens"])}) for u in state.pop("utterances")
    )
    names = ("audio", "audio_lengths", "targets", "target_lengths")
    return Batch(utterances, *(state.pop(name) for name in names)), state
