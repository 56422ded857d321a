"""The loop of one stage, top to bottom: evaluate, load, step, log, save."""

import contextlib
import logging
import math
import time
from collections import Counter
from pathlib import Path

from fastconformer.checkpoint.native import write_native
from fastconformer.checkpoint.read import read_checkpoint
from training.data.json_lines import append_line, read_lines
from training.data.store import Batch, StorageGone
from training.data.stream import training_batches
from training.loop.batch_norm import StepStatistics
from training.loop.console import Stopped, progress_bar, stop_signals
from training.loop.evaluations import keep_average, keep_evaluation
from training.loop.ranks import BatchShare, Ranks
from training.loop.run_folder import RunState, save_batch, save_model
from training.loop.step import gradients, update
from training.loop.validate import results_table
from training.optim.ema import plain_checkpoint
from training.optim.optim import set_learning_rates
from training.recipe.recipe import Recipe
from training.setup.freeze import train_mode
from training.setup.run import Run, set_up

log = logging.getLogger("finetune")


def train_stage(recipe: Recipe, ranks: Ranks, baseline: dict | None, entry: dict) -> RunState:
    """One stage: evaluate, step, save, over and over. `entry` becomes a line of `runs.jsonl`."""
    run = set_up(recipe, ranks, baseline)
    progress, max_steps = run.progress, run.max_steps
    rank, world_size = run.share.turns
    run.train.store.pinned = run.device.type == "cuda"
    stream = training_batches(
        run.train,
        run.rules,
        progress.epoch,
        progress.batch,
        num_workers=recipe.data.num_workers,
        rank=rank,
        world_size=world_size,
    )
    with (
        stop_signals() as raise_stopped,
        progress_bar(max_steps, progress.step) as show,
        run.board or contextlib.nullcontext(),
    ):
        # In the middle of an evaluation the others would wait for this one's texts.
        stop_early = raise_stopped if ranks.world == 1 else lambda: None
        try:
            while True:
                # The untouched model first, so that all numbers stand beside it.
                due = progress.step % run.val_every == 0 or progress.step == max_steps
                if run.validation and due and progress.evaluated < progress.step:
                    keep_evaluation(run, stop_early)
                if progress.step >= max_steps or progress.ended:
                    break
                stop_together(raise_stopped, ranks)
                batches, position = [], (progress.epoch, progress.batch)
                while len(batches) < len(run.share.mine):
                    *position, batch = next(stream)
                    batches.append(batch.to(run.device))
                progress.epoch, progress.batch = position
                loss = take_step(run, batches)
                show(progress.step, loss)
                entry |= summary(progress, recipe)
                if progress.step % run.save_every == 0 or progress.step == max_steps:
                    run.save()
            if progress.ended:
                log.info("step %d: the run ends here: %s", progress.step, progress.ended)
            save_model(plain_checkpoint(run.model, run.ema), run.out / "last", ranks)
            if recipe.keep.average and len(progress.kept.top) > 1 and not progress.averaged:
                keep_average(run, stop_early)
            run.save()
        except Stopped as stop:
            path = run.save()
            told = f"{stop}; saved {path}, the same command goes on from there"
            raise Stopped(told, stop.signal) from None
        except StorageGone as error:
            if ranks.world > 1:  # the others wait elsewhere: torchrun ends them
                raise
            path = run.save()
            told = f"{error}; saved {path}, the same command goes on from there"
            raise StorageGone(told) from None
        finally:
            stream.close()

    if "steps" in entry:  # something was done in this call
        entry |= summary(progress, recipe)
    best = run.out / "best" if run.validation else run.out / "last"
    if ranks.is_main:
        archive = write_native(run.out, read_checkpoint(best))
    if progress.best:
        table = results_table(progress.best, progress.baseline)
        log.info("best, step %d:\n%s", progress.best["step"], table)
    if ranks.is_main:
        log.info("done in %.1f minutes: %s is %s", progress.seconds / 60, archive, best)
    return progress


def stop_together(raise_stopped, ranks: Ranks) -> None:
    """Raises Stopped in every process when one of them was asked to stop."""
    asked = None
    try:
        raise_stopped()
    except Stopped as stop:
        asked = stop
    if any(ranks.total(asked is not None)):
        raise asked or Stopped("stopped with another process")


def summary(progress: RunState, recipe: Recipe) -> dict:
    """What a line of `runs.jsonl` says of a run."""

    def rates(record):
        return record and {key: record[key] for key in ("step", "wer", "cer")}

    return {
        "seed": recipe.trainer.seed,
        "steps": progress.step,
        "minutes": round(progress.seconds / 60, 2),
        "before": rates(progress.baseline),
        "best": rates(progress.best),
        "ended": progress.ended,
        "skipped_steps": progress.skipped,
        "splits": progress.splits,
    }


# --- one step -----------------------------------------------------------------------------------


def take_step(run: Run, batches: list[Batch]) -> float:
    """One optimizer step over this process's batches; gives its loss."""
    model, progress, share, parallel = run.model, run.progress, run.share, run.parallel
    trainer, number = run.recipe.trainer, run.progress.step
    train_mode(model, run.freezing, number)
    statistics = StepStatistics(model)
    run.optimizer.zero_grad(set_to_none=True)
    parallel.gather_weights()
    try:
        result = gradients(model, batches, run.objective, trainer.seed, number, share, statistics)
    except ValueError:
        names = [u.name for batch in batches for u in batch.utterances]
        append_line(run.out / "failed.jsonl", {"step": number, "utterances": names})
        save_failed(run.out / "failed", batches, share, trainer.seed, number)
        raise
    losses, grad_norm = result.losses, math.nan
    if math.isfinite(losses["loss"]):
        parallel.average_gradients()
        set_learning_rates(run.optimizer, run.lr_at, number)
        if run.retain:
            run.retain.before_update(number)
        grad_norm = update(run.optimizer, trainer.clip_grad_norm)
        if run.retain:
            run.retain.after_update()
    else:
        parallel.release_weights()
    heard = sum(int(batch.audio_lengths.sum()) for batch in batches) / model.sample_rate
    progress.heard_s += heard * (1 if share.by_clips else run.ranks.world)
    progress.step += 1
    progress.splits += result.splits > 0
    progress.seconds = time.monotonic() - run.started

    if math.isfinite(grad_norm):
        run.watch.check()
        if run.ema is not None:
            run.ema.update(model)
        if run.validation:
            progress.losses.append(losses["loss"])
    else:
        # The forward pass has already fed BatchNorm's running statistics.
        statistics.restore()
        skip(run, batches, losses["loss"], grad_norm, result.suspects)
    if result.splits:
        log.warning(
            "step %d ran out of memory and was done in pieces; %d such steps so far; a smaller "
            "data.batch_duration_s would be faster",
            *(progress.step, progress.splits),
        )
    more = {"splits": result.splits} if result.splits else {}
    if trainer.log_clips:
        more["clips"] = clip_names(run, batches)
    log_step(run, losses | {"lr": run.lr_at(number), "grad_norm": grad_norm}, more)
    return losses["loss"]


def clip_names(run: Run, batches: list[Batch]) -> list[list[str]]:
    """The clips of a step, of all processes, a list for each batch."""
    names = [[u.name for u in batch.utterances] for batch in batches]
    found = run.ranks.gather(names)
    if run.share.by_clips:  # every process has the same batches
        return found[0]
    return [batch for share in found for batch in share]


def skip(run: Run, batches, loss: float, grad_norm: float, suspects: list[str]) -> None:
    """Write down a step that was not finite.

    Raises:
        ValueError: there were too many; names their clips.
    """
    progress, trainer, ranks = run.progress, run.recipe.trainer, run.ranks
    progress.skipped += 1
    if not suspects:  # the losses were finite, the gradient was not
        names = [u.name for batch in batches for u in batch.utterances]
        suspects = [name for share in ranks.gather(names) for name in share]
    save_failed(run.out / "nonfinite", batches, run.share, trainer.seed, progress.step - 1)
    path = run.out / "nonfinite.jsonl"
    run.write(path.name, {"step": progress.step, "loss": str(loss), "utterances": suspects})
    log.warning(
        "step %d skipped: loss %s, gradient norm %s; its clips are in %s",
        *(progress.step, loss, grad_norm, path),
    )
    ranks.barrier()  # the line is written
    if progress.skipped >= trainer.max_nonfinite_steps:
        raise ValueError(too_many_skipped(progress.skipped, run.out))


def too_many_skipped(count: int, out: Path) -> str:
    records = read_lines(out / "nonfinite.jsonl")
    suspects = Counter(name for record in records for name in record["utterances"])
    worst = "; ".join(f"{name}, {n} times" for name, n in suspects.most_common(5))
    more = f" and {len(suspects) - 5} more" if len(suspects) > 5 else ""
    return (
        f"{count} steps were not finite; lower optim.lr, or look at these clips: {worst}{more} "
        f"(all in {out / 'nonfinite.jsonl'}, their batches in {out / 'nonfinite'})"
    )


def save_failed(folder: Path, batches, share: BatchShare, seed: int, step: int) -> None:
    """This process's batches of a step that failed, for `run_folder.load_batch`."""
    if share.by_clips and not share.ranks.is_main:
        return  # the main process has the same ones
    for micro, batch in zip(share.mine, batches, strict=True):
        save_batch(
            folder / f"step_{step + 1:08d}_batch_{micro}.pt", batch, seeds=[seed, step, micro]
        )


def log_step(run: Run, values: dict[str, float], more: dict) -> None:
    progress = run.progress
    record = {k: v if math.isfinite(v) else None for k, v in values.items()}
    position = {"step": progress.step, "epoch": progress.epoch}
    run.write("log.jsonl", position | record | more)
    if progress.step % run.recipe.trainer.log_every_steps and progress.step < run.max_steps:
        return
    losses = [name for name in values if name not in ("lr", "grad_norm")]
    log.info(
        "step %d/%d  epoch %d  %s  lr %.2e  grad %.2f  %.1f min",
        *(progress.step, run.max_steps, progress.epoch),
        "  ".join(f"{name} {values[name]:.3f}" for name in losses),
        *(values["lr"], values["grad_norm"], progress.seconds / 60),
    )
    run.draw(record, "train/")
