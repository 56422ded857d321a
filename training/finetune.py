"""Fine-tune, or train from scratch: one recipe in, a run folder out.

    python -m training.finetune recipes/finetune.yaml
    python -m training.finetune recipes/finetune.yaml optim.lr=1e-4 output=runs/second
    torchrun --nproc-per-node 8 -m training.finetune recipes/finetune.yaml

The run folder holds `recipe.yaml` (resolved), `dropped.jsonl` (data that is left out, and why),
`log.jsonl` (every step), `ledger.jsonl` (every evaluation; the first is the untouched model),
`tensorboard/`, `checkpoints/` (for resuming), `best/`, `top/` and `last/` (model folders) and
`model.nemo` (the best), and in the end `report.html`. The same command goes on where a run was
stopped. A line about every run goes to `runs.jsonl` beside the run folder.

Everything random in a step follows from (seed, step), so that a resumed run repeats the unbroken
one bit for bit on a CPU with the same number of threads.
"""

import contextlib
import logging
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from fastconformer import ASRModel, cli, load_model
from fastconformer.checkpoint.files import atomic_file
from fastconformer.checkpoint.folder import write_folder
from fastconformer.checkpoint.nemo_archive import write_nemo
from fastconformer.checkpoint.read import read_checkpoint
from training.average import average_checkpoints
from training.data.sources import training_batches
from training.data.store import Batch
from training.loop.console import Lines, Stopped, progress_bar, stop_signals
from training.loop.keep import guard_holds, metrics_of
from training.loop.ranks import ONE, Deal, Ranks, StepStatistics, join, leave
from training.loop.run_folder import (
    Progress,
    alone_in,
    append_line,
    json_line,
    read_lines,
    save_batch,
    save_model,
    top_folder,
)
from training.loop.step import gradients, update
from training.loop.validate import evaluate, results_table
from training.optim.ema import plain_checkpoint, plain_weights
from training.optim.optim import set_learning_rates
from training.recipe.recipe import Recipe, load_recipe, recipe_to_yaml, stage_recipes
from training.report import write_report
from training.setup.freeze import train_mode
from training.setup.run import Run, set_up

log = logging.getLogger("finetune")


def finetune(recipe: Recipe, ranks: Ranks = ONE, baseline: dict | None = None) -> Progress:
    """Run a recipe, stage after stage, to its end, or on from where its run folder stands.

    Args:
        baseline: the ledger's record of the model that was there before the first stage.
    Raises:
        ValueError, FileNotFoundError: the recipe's model or data cannot be used, or too many steps
            were not finite.
        Stopped: SIGINT or SIGTERM; a checkpoint is written before.
    """
    out = Path(recipe.output)
    with contextlib.ExitStack() as stack:
        if ranks.is_main:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone_in(out))
            with atomic_file(out / "recipe.yaml") as temporary:
                temporary.write_text(recipe_to_yaml(recipe), encoding="utf-8")
        entry = stack.enter_context(listed_run(out, ranks))
        if not recipe.stages:
            log.info("recipe, as resolved:\n%s", recipe_to_yaml(recipe))
            return run(recipe, ranks, baseline, entry)
        for number, stage in enumerate(stage_recipes(recipe), start=1):
            log.info("stage %d of %d, in %s", number, len(recipe.stages), stage.output)
            progress = finetune(stage, ranks, baseline)
            baseline = progress.baseline
            entry |= summary(progress, stage)
        if ranks.is_main:
            gather_stages(out, stage_recipes(recipe))
        ranks.barrier()
        return progress


def gather_stages(out: Path, stages: list[Recipe]) -> None:
    """The last stage's models, and all evaluations, where a run of one stage has them."""
    last = Path(stages[-1].output)
    for name in ("best", "last"):
        if (last / name).is_dir():
            write_folder(out / name, read_checkpoint(last / name))
    best = out / "best" if (last / "best").is_dir() else out / "last"
    write_nemo(out / "model.nemo", read_checkpoint(best))
    lines = []
    for number, stage in enumerate(stages, start=1):
        records = read_lines(Path(stage.output) / "ledger.jsonl")
        lines += [json_line({"stage": number} | record) for record in records]
    with atomic_file(out / "ledger.jsonl") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    log.info("all stages are done: %s is %s", out / "model.nemo", best)


@contextlib.contextmanager
def listed_run(out: Path, ranks: Ranks):
    """A line in `runs.jsonl`, beside the run folder, however the run ends; gives the dict to fill.
    Without "steps" in it nothing was done, and nothing is written."""
    entry = {"output": str(out), "status": "failed", "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        yield entry
        entry["status"] = "done"
    except (Stopped, KeyboardInterrupt):
        entry["status"] = "stopped"
        raise
    finally:
        if ranks.is_main and "steps" in entry:
            append_line(out.parent / "runs.jsonl", entry)


def summary(progress: Progress, recipe: Recipe) -> dict:
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


def run(recipe: Recipe, ranks: Ranks, baseline: dict | None, entry: dict) -> Progress:
    """One stage: evaluate, step, save, over and over. `entry` becomes a line of `runs.jsonl`."""
    this = set_up(recipe, ranks, baseline)
    progress, max_steps = this.progress, this.max_steps
    stream = training_batches(
        this.train, this.recipe, progress.epoch, progress.batch, *this.deal.turns
    )
    with (
        stop_signals() as raise_stopped,
        progress_bar(max_steps, progress.step) as show,
        this.board or contextlib.nullcontext(),
    ):
        # In the middle of an evaluation the others would wait for this one's texts.
        stop_early = raise_stopped if ranks.world == 1 else lambda: None
        try:
            while True:
                # The untouched model first, so that all numbers stand beside it.
                due = progress.step % this.val_every == 0 or progress.step == max_steps
                if this.validation and due and progress.evaluated < progress.step:
                    keep_evaluation(this, stop_early)
                if progress.step >= max_steps or progress.ended:
                    break
                stop_together(raise_stopped, ranks)
                batches = []
                while len(batches) < len(this.deal.mine):
                    progress.epoch, progress.batch, batch = next(stream)
                    batches.append(batch.to(this.device))
                loss = step(this, batches)
                show(progress.step, loss)
                entry |= summary(progress, recipe)
                if progress.step % this.save_every == 0 or progress.step == max_steps:
                    this.save()
            if progress.ended:
                log.info("step %d: the run ends here: %s", progress.step, progress.ended)
            save_model(plain_checkpoint(this.model, this.ema), this.out / "last", ranks)
            if recipe.keep.average and len(progress.kept.top) > 1 and not progress.averaged:
                keep_average(this, stop_early)
            this.save()
        except Stopped as stop:
            path = this.save()
            raise Stopped(f"{stop}; saved {path}, the same command goes on from there") from None
        finally:
            stream.close()

    if "steps" in entry:  # something was done in this call
        entry |= summary(progress, recipe)
    best = this.out / "best" if this.validation else this.out / "last"
    archive = this.out / "model.nemo"
    if ranks.is_main:
        write_nemo(archive, read_checkpoint(best))
    if progress.best:
        table = results_table(progress.best, progress.baseline)
        log.info("best, step %d:\n%s", progress.best["step"], table)
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


# --- one step -----------------------------------------------------------------------------------


def step(this: Run, batches: list[Batch]) -> float:
    """One optimizer step over this process's batches; gives its loss."""
    model, progress, deal, together = this.model, this.progress, this.deal, this.together
    trainer, number = this.recipe.trainer, this.progress.step
    train_mode(model, this.freezing, number)
    statistics = StepStatistics(model)
    this.optimizer.zero_grad(set_to_none=True)
    together.gather_weights()
    try:
        result = gradients(model, batches, this.objective, trainer.seed, number, deal, statistics)
    except ValueError:
        names = [u.name for batch in batches for u in batch.utterances]
        append_line(this.out / "failed.jsonl", {"step": number, "utterances": names})
        save_failed(this.out / "failed", batches, deal, trainer.seed, number)
        raise
    losses, grad_norm = result.losses, math.nan
    if math.isfinite(losses["loss"]):
        together.average_gradients()
        set_learning_rates(this.optimizer, this.lr_at, number)
        if this.retain:
            this.retain.before_update(number)
        grad_norm = update(this.optimizer, trainer.clip_grad_norm)
        if this.retain:
            this.retain.after_update()
    else:
        together.release_weights()
    progress.step += 1
    progress.splits += result.splits > 0
    progress.seconds = time.monotonic() - this.started

    if math.isfinite(grad_norm):
        this.watch.check()
        if this.ema is not None:
            this.ema.update(model)
        if this.validation:
            progress.losses.append(losses["loss"])
    else:
        # The forward pass has already fed BatchNorm's running statistics.
        statistics.restore()
        skip(this, batches, losses["loss"], grad_norm, result.suspects)
    if result.splits:
        log.warning(
            "step %d ran out of memory and was done in pieces; %d such steps so far; a smaller "
            "data.batch_duration_s would be faster",
            *(progress.step, progress.splits),
        )
    log_step(this, losses | {"lr": this.lr_at(number), "grad_norm": grad_norm}, result.splits)
    return losses["loss"]


def skip(this: Run, batches, loss: float, grad_norm: float, suspects: list[str]) -> None:
    """Write down a step that was not finite.

    Raises:
        ValueError: there were too many; names their clips.
    """
    progress, trainer, ranks = this.progress, this.recipe.trainer, this.ranks
    progress.skipped += 1
    if not suspects:  # the losses were finite, the gradient was not
        names = [u.name for batch in batches for u in batch.utterances]
        suspects = [name for share in ranks.gather(names) for name in share]
    save_failed(this.out / "nonfinite", batches, this.deal, trainer.seed, progress.step - 1)
    path = this.out / "nonfinite.jsonl"
    this.write(path.name, {"step": progress.step, "loss": str(loss), "utterances": suspects})
    log.warning(
        "step %d skipped: loss %s, gradient norm %s; its clips are in %s",
        *(progress.step, loss, grad_norm, path),
    )
    ranks.barrier()  # the line is written
    if progress.skipped >= trainer.max_nonfinite_steps:
        raise ValueError(too_many_skipped(progress.skipped, this.out))


def too_many_skipped(count: int, out: Path) -> str:
    records = read_lines(out / "nonfinite.jsonl")
    suspects = Counter(name for record in records for name in record["utterances"])
    worst = "; ".join(f"{name}, {n} times" for name, n in suspects.most_common(5))
    more = f" and {len(suspects) - 5} more" if len(suspects) > 5 else ""
    return (
        f"{count} steps were not finite; lower optim.lr, or look at these clips: {worst}{more} "
        f"(all in {out / 'nonfinite.jsonl'}, their batches in {out / 'nonfinite'})"
    )


def save_failed(folder: Path, batches, deal: Deal, seed: int, step: int) -> None:
    """This process's batches of a step that failed, for `run_folder.load_batch`."""
    if deal.by_clips and not deal.ranks.is_main:
        return  # the main process has the same ones
    for micro, batch in zip(deal.mine, batches, strict=True):
        save_batch(
            folder / f"step_{step + 1:08d}_batch_{micro}.pt", batch, seeds=[seed, step, micro]
        )


def log_step(this: Run, values: dict[str, float], splits: int) -> None:
    progress = this.progress
    record = {k: v if math.isfinite(v) else None for k, v in values.items()}
    position = {"step": progress.step, "epoch": progress.epoch}
    this.write("log.jsonl", position | record | ({"splits": splits} if splits else {}))
    if progress.step % this.recipe.trainer.log_every_steps and progress.step < this.max_steps:
        return
    losses = [name for name in values if name not in ("lr", "grad_norm")]
    log.info(
        "step %d/%d  epoch %d  %s  lr %.2e  grad %.2f  %.1f min",
        *(progress.step, this.max_steps, progress.epoch),
        "  ".join(f"{name} {values[name]:.3f}" for name in losses),
        *(values["lr"], values["grad_norm"], progress.seconds / 60),
    )
    this.draw(record, "train/")


# --- evaluations --------------------------------------------------------------------------------


def measure(this: Run, model: ASRModel, facts: dict, stop_early) -> dict:
    """Evaluate a model, and write it down; gives the ledger's record, `facts` in it."""
    progress, heads, guard = this.progress, this.objective.heads, this.recipe.guard
    log.info("step %d: evaluating", progress.step)
    result = evaluate(model, this.validation, heads, this.recipe, stop_early, this.ranks)
    record = ledger_record(progress, result, heads[0], this.started) | facts
    if progress.baseline is None:
        progress.baseline = this.baseline or record
    record["guard_holds"] = guard_holds(record, progress.baseline, guard)
    this.write("ledger.jsonl", record)
    log.info("step %d:\n%s", progress.step, results_table(record, progress.baseline))
    if not record["guard_holds"]:
        log.info("%s is beyond guard.limit: not a candidate for best", guard.set)
    return record


def keep_evaluation(this: Run, stop_early) -> None:
    """Evaluate the model as it would be saved; keep it if it is among the best."""
    progress, keep, ranks = this.progress, this.recipe.keep, this.ranks
    with plain_weights(this.model, this.ema):
        this.together.gather_weights()
        record = measure(this, this.model, {}, stop_early)
        this.together.release_weights()
    if progress.kept.consider(record, keep, record["guard_holds"]):
        save_model(plain_checkpoint(this.model, this.ema), this.out / "best", ranks)
        progress.best = record
    if keep.top_k > 1 and progress.step in [number for _, _, number in progress.kept.top]:
        folder = top_folder(this.out, progress.step)
        save_model(plain_checkpoint(this.model, this.ema), folder, ranks)
    this.draw(metrics_of(record))
    progress.evaluated, progress.losses = progress.step, []
    progress.ended = progress.kept.reason_to_stop(keep, this.recipe.guard)


def keep_average(this: Run, stop_early) -> None:
    """The mean of the best models' weights becomes `best/` if it is better than all of them."""
    progress, metric, out = this.progress, this.recipe.keep.metric, this.out
    numbers = [number for _, _, number in progress.kept.top]
    if this.ranks.is_main:
        folders = [top_folder(out, number) for number in numbers]
        write_folder(out / "average", average_checkpoints(folders))
    this.ranks.barrier()
    model = load_model(out / "average", this.device)
    record = measure(this, model, {"average_of": numbers}, stop_early)
    now, before = (metrics_of(r).get(metric, math.inf) for r in (record, progress.best))
    better = record["guard_holds"] and (now, record["cer"]) < (before, progress.best["cer"])
    log.info(
        "average of %d: %s %.4f, the best single %.4f: %s",
        *(len(numbers), metric, now, before, "kept" if better else "not kept"),
    )
    if better:
        save_model(model.to_checkpoint(), out / "best", this.ranks)
        progress.best = record
    progress.averaged = True


def ledger_record(progress: Progress, result: dict, head: str, started: float) -> dict:
    losses = progress.losses
    return {
        "step": progress.step,
        "epoch": progress.epoch,
        "head": head,
        "wer": result["all"][head]["wer"],
        "cer": result["all"][head]["cer"],
        "sets": result["sets"],
        "all": result["all"],
        "train_loss": sum(losses) / len(losses) if losses else None,
        "skipped_steps": progress.skipped,
        "splits": progress.splits,
        "minutes": round((time.monotonic() - started) / 60, 3),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser(
        "training.finetune",
        "Fine-tune a FastConformer, or train one from scratch, as a recipe says.",
        "recipes/finetune.yaml optim.lr=1e-4 output=runs/second   "
        "(the same command goes on where a run was stopped)",
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. trainer.seed=7")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    is_main = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if is_main else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[Lines()], force=True)
    who = "error" if is_main else f"error (process {os.environ['RANK']})"
    return cli.run(who, lambda: job(options, is_main))


def job(options, is_main: bool) -> None:
    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except (ValueError, FileNotFoundError) as error:
        raise cli.UsageError(str(error)) from None
    try:
        finetune(recipe, join())
    except Stopped as error:
        raise cli.Failed(str(error)) from None
    except torch.OutOfMemoryError as error:  # outside of a step's passes, which are split
        words = " ".join(str(error).split())[:200]
        raise cli.Failed(f"{words}; lower data.batch_duration_s or batch_size") from None
    except KeyboardInterrupt:  # the second Ctrl-C, or one before the first step
        log.error("the last checkpoint stands")
        raise
    if is_main:
        try:
            log.info("the run on one page: %s", write_report(Path(recipe.output)))
        except (ValueError, OSError, RuntimeError) as error:  # the run itself is safe
            log.warning("no report.html: %s; python -m training.report makes it", error)
    leave()  # not after an error: then torchrun ends the others


if __name__ == "__main__":
    sys.exit(main())
