"""All that a run holds, made from its recipe: model, data, optimizer, position."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastconformer import ASRModel
from fastconformer.checkpoint.files import atomic_file
from training.data.sources import TrainingSet, batch_order, load_data
from training.data.store import AudioStore
from training.find_batch import settled
from training.loop.console import tensorboard
from training.loop.keep import check_metric
from training.loop.ranks import Deal, Ranks, Together, deal_of, sync_batchnorm
from training.loop.run_folder import (
    Progress,
    append_line,
    checkpoint_paths,
    keep_lines_until,
    prune_top,
    resume,
    save_checkpoint,
)
from training.objective.objective import Objective, objective_of
from training.objective.retain import Retain, make_retain, new_rows_first, read_original
from training.optim.ema import EMA
from training.optim.optim import build_optimizer, schedule_of
from training.recipe.recipe import Recipe
from training.setup.freeze import Freezing, GradientWatch, format_table, parameter_table
from training.setup.start import build_model, prepare

log = logging.getLogger("finetune")


@dataclasses.dataclass
class Run:
    """What `set_up` makes of a recipe; the loop works on it.

    baseline: the ledger's record of the model before the first stage, where there was one.
    started: `time.monotonic()` of the run's beginning, earlier calls included.
    """

    recipe: Recipe
    out: Path
    ranks: Ranks
    deal: Deal
    device: torch.device
    model: ASRModel
    together: Together
    objective: Objective
    freezing: Freezing
    retain: Retain | None
    train: TrainingSet
    validation: dict[str, AudioStore]
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    watch: GradientWatch
    lr_at: Callable[..., float]
    max_steps: int
    val_every: int
    save_every: int
    progress: Progress
    baseline: dict | None
    started: float
    board: object | None  # TensorBoard's writer, of the main process

    def save(self) -> Path:
        """A checkpoint to resume from; models that are no longer among the best go."""
        path = save_checkpoint(
            self.out / "checkpoints",
            self.model,
            self.optimizer,
            self.ema,
            self.progress,
            self.recipe,
            self.ranks,
        )
        if self.ranks.is_main:
            prune_top(self.out, self.progress.kept)
        return path

    def write(self, name: str, record: dict) -> None:
        """A line in one of the run folder's files."""
        if self.ranks.is_main:
            append_line(self.out / name, record)

    def draw(self, values: dict[str, float | None], prefix: str = "") -> None:
        """Points on TensorBoard's curves."""
        for name, value in values.items():
            if self.board is not None and value is not None:
                self.board.add_scalar(prefix + name, value, self.progress.step)


def set_up(recipe: Recipe, ranks: Ranks, baseline: dict | None) -> Run:
    """Everything before the first step, from the run folder's last checkpoint if there is one.

    Raises:
        ValueError, FileNotFoundError: the recipe's model or data cannot be used.
    """
    trainer, out = recipe.trainer, Path(recipe.output)
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    device = choose_device(trainer.device)
    checkpoints = checkpoint_paths(out / "checkpoints")
    if recipe.resume == "never" and checkpoints:
        raise ValueError(
            f"{out} already holds a run and resume is never; choose another output or remove it"
        )
    model = build_model(recipe.model, recipe.loss, trainer.seed, recipe.encoder)
    objective = objective_of(recipe, model)
    heads = objective.heads
    deal = deal_of(ranks, trainer.accumulate, trainer.sync_batchnorm)
    if deal.synced:
        sync_batchnorm(model)
    check_metric(recipe.keep.metric, recipe.data.validation, heads)
    # Where processes read the same clips, one of them says which cannot be read.
    reports = ranks.is_main or not deal.by_clips
    dropped = out / "dropped.jsonl" if reports else None
    train, validation = load_data(recipe, model, heads, dropped, ranks.is_main)
    original, change = read_original(recipe, model, train, validation, not checkpoints)
    freezing = prepare(model, recipe, objective)
    if recipe.retain.new_rows_steps:
        freezing = new_rows_first(model, freezing, recipe.retain.new_rows_steps)

    model.to(device)
    retain = make_retain(model, original, change, recipe)
    if retain:
        objective = retain.objective(objective)
    recipe = settled(recipe, train, model, objective, freezing, ranks)
    together = Together(model, ranks, trainer.parallel, device)
    optimizer = build_optimizer(model, recipe.optim, trainer.seed)
    ema = None if trainer.ema_decay is None else EMA(model, trainer.ema_decay)
    table = format_table(parameter_table(model, freezing, optimizer))
    if ranks.is_main:
        with atomic_file(out / "trainable.txt") as temporary:
            temporary.write_text(table, encoding="utf-8")
    log.info("what is trained:\n%s", table)
    first_epoch = len(batch_order(train, recipe, 0))
    if trainer.max_steps is not None:
        max_steps = trainer.max_steps
    else:
        batches = sum(len(batch_order(train, recipe, e)) for e in range(trainer.epochs))
        max_steps = max(1, batches // trainer.accumulate)
    val_every = trainer.val_every_steps or max(1, first_epoch // trainer.accumulate)
    lr_at = schedule_of(recipe.schedule, recipe.optim.lr, max_steps, model.config.encoder.d_model)

    progress = Progress()
    if checkpoints:
        progress = resume(checkpoints[-1], model, optimizer, ema, recipe)
        log.info("resuming after step %d from %s", progress.step, checkpoints[-1])
    ranks.barrier()  # nobody looks for checkpoints any more
    if ranks.is_main:
        for name in ("log.jsonl", "nonfinite.jsonl"):
            keep_lines_until(out / name, progress.step)
        keep_lines_until(out / "ledger.jsonl", progress.evaluated)
    log.info(
        "%d clips, %.2f h; %d batches an epoch, %d steps; %.2f M of %.2f M parameters move; "
        "heads %s; %s, %d threads",
        len(train.utterances),
        sum(u.duration_s for u in train.utterances) / 3600,
        first_epoch,
        max_steps,
        sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6,
        sum(p.numel() for p in model.parameters()) / 1e6,
        "+".join(heads),
        device,
        torch.get_num_threads(),
    )
    if ranks.world > 1:
        log.info(
            "%d processes, %s: of the %d batches of a step each takes %s",
            *(ranks.world, trainer.parallel, trainer.accumulate),
            "some clips of all" if deal.by_clips else f"{trainer.accumulate // ranks.world}",
        )
    return Run(
        recipe=recipe,
        out=out,
        ranks=ranks,
        deal=deal,
        device=device,
        model=model,
        together=together,
        objective=objective,
        freezing=freezing,
        retain=retain,
        train=train,
        validation=validation,
        optimizer=optimizer,
        ema=ema,
        watch=GradientWatch(model),
        lr_at=lr_at,
        max_steps=max_steps,
        val_every=val_every,
        save_every=trainer.save_every_steps or val_every,
        progress=progress,
        baseline=baseline,
        started=time.monotonic() - progress.seconds,
        board=tensorboard(out / "tensorboard", progress.step) if ranks.is_main else None,
    )


def choose_device(name: str) -> torch.device:
    """The recipe's device; of many processes each takes the GPU that torchrun names."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"trainer.device is {name}, but this torch finds no CUDA device")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"trainer.device is {name!r}, expected auto, cpu or cuda") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
