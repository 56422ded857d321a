"""All that a run holds, made from its recipe: model, data, optimizer, position."""

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastconformer import ASRModel
from fastconformer.checkpoint.files import atomic_file
from training.data.batching import BatchRules
from training.data.json_lines import append_line, keep_lines_until
from training.data.sources import TrainingSet
from training.data.store import AudioStore
from training.loop.console import tensorboard
from training.loop.ranks import BatchShare, Parallel, Ranks
from training.loop.run_folder import (
    RunState,
    check_format,
    checkpoint_paths,
    prune_top,
    resume_newest,
    save_checkpoint,
    write_facts,
)
from training.objective.objective import Objective
from training.objective.retain import Retain
from training.optim.ema import EMA
from training.optim.optim import build_optimizer, schedule_of
from training.recipe.recipe import Recipe, recipe_to_yaml
from training.setup.batch_search import settled
from training.setup.freeze import Freezing
from training.setup.prepare import Prepared, RunLength, prepare_run, run_length
from training.setup.trainable import GradientWatch, format_table, parameter_table

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
    share: BatchShare
    device: torch.device
    model: ASRModel
    parallel: Parallel
    objective: Objective
    freezing: Freezing
    retain: Retain | None
    train: TrainingSet
    rules: BatchRules
    validation: dict[str, AudioStore]
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    watch: GradientWatch
    lr_at: Callable[..., float]
    max_steps: int
    val_every: int
    save_every: int
    progress: RunState
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

    def say(self, name: str, text: str) -> None:
        """A text on TensorBoard."""
        if self.board is not None:
            self.board.add_text(name, text, self.progress.step)


def set_up(recipe: Recipe, ranks: Ranks, baseline: dict | None) -> Run:
    """Everything before the first step, from the run folder's last checkpoint if there is one.

    Raises:
        ValueError, FileNotFoundError: the recipe's model or data cannot be used.
    """
    out = Path(recipe.output)
    check_format(out)
    checkpoints = checkpoint_paths(out / "checkpoints")
    if recipe.resume == "never" and checkpoints:
        raise ValueError(
            f"{out} already holds a run and resume is never; choose another output or remove it"
        )
    prepared = prepare_run(recipe, ranks, out / "dropped.jsonl", not checkpoints)
    prepared = settled(prepared, ranks, out)
    recipe, trainer = prepared.recipe, prepared.recipe.trainer
    model, train, freezing = prepared.model, prepared.train, prepared.freezing
    parallel = Parallel(model, ranks, trainer.parallel, prepared.device)
    optimizer = build_optimizer(model, recipe.optim, trainer.seed)
    ema = None if trainer.ema_decay is None else EMA(model, trainer.ema_decay)
    table = format_table(parameter_table(model, freezing, optimizer))
    if ranks.is_main:
        with atomic_file(out / "trainable.txt") as temporary:
            temporary.write_text(table, encoding="utf-8")
    log.info("what is trained:\n%s", table)
    length = run_length(prepared)
    lr_at = schedule_of(
        recipe.schedule, recipe.optim.lr, length.max_steps, model.config.encoder.d_model
    )

    progress = RunState()
    if checkpoints:
        progress = resume_newest(checkpoints, model, optimizer, ema, recipe, ranks)
    ranks.barrier()  # nobody looks for checkpoints any more
    if ranks.is_main:
        for name in ("log.jsonl", "nonfinite.jsonl"):
            keep_lines_until(out / name, progress.step)
        keep_lines_until(out / "ledger.jsonl", progress.evaluated)
    tell_size(prepared, length, ranks)
    if ranks.is_main:
        write_facts(out, prepared.device)
    run = Run(
        recipe=recipe,
        out=out,
        ranks=ranks,
        share=prepared.share,
        device=prepared.device,
        model=model,
        parallel=parallel,
        objective=prepared.objective,
        freezing=freezing,
        retain=prepared.retain,
        train=train,
        rules=prepared.rules,
        validation=prepared.validation,
        optimizer=optimizer,
        ema=ema,
        watch=GradientWatch(model),
        lr_at=lr_at,
        max_steps=length.max_steps,
        val_every=length.val_every,
        save_every=trainer.save_every_steps or length.val_every,
        progress=progress,
        baseline=baseline,
        started=time.monotonic() - progress.seconds,
        board=tensorboard(out / "tensorboard", progress.step) if ranks.is_main else None,
    )
    run.say("recipe", f"```yaml\n{recipe_to_yaml(recipe)}```")
    return run


def tell_size(prepared: Prepared, length: RunLength, ranks: Ranks) -> None:
    """What a run is about, in a line or two."""
    model, train, trainer = prepared.model, prepared.train, prepared.recipe.trainer
    log.info(
        "%d clips, %.2f h; %d batches an epoch, %d steps; %.2f M of %.2f M parameters move; "
        "heads %s; %s, %d threads",
        len(train.utterances),
        sum(u.duration_s for u in train.utterances) / 3600,
        length.batches_an_epoch,
        length.max_steps,
        sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6,
        sum(p.numel() for p in model.parameters()) / 1e6,
        "+".join(prepared.objective.heads),
        prepared.device,
        torch.get_num_threads(),
    )
    if ranks.world > 1:
        log.info(
            "%d processes, %s: of the %d batches of a step each takes %s",
            *(ranks.world, trainer.parallel, trainer.accumulate),
            "some clips of all"
            if prepared.share.by_clips
            else f"{trainer.accumulate // ranks.world}",
        )
