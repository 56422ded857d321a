"""Fine-tune, or train from scratch: one recipe in, a run folder out.

    python -m training.finetune recipes/finetune.yaml
    python -m training.finetune recipes/finetune.yaml optim.lr=1e-4 output=runs/second
    torchrun --nproc-per-node 8 -m training.finetune recipes/finetune.yaml

The run folder holds `recipe.yaml` (resolved), `dropped.jsonl` (data that is left out, and why),
`log.jsonl` (every step), `ledger.jsonl` (every evaluation; the first is the untouched model),
`tensorboard/`, `checkpoints/` (for resuming), `best/`, `top/` and `last/` (model folders) and
`model.nemo` (the best). The same command goes on where a run was stopped. A line about every run
goes to `runs.jsonl` beside the run folder.

Everything random in a step follows from (seed, step), so that a resumed run repeats the unbroken
one bit for bit on a CPU with the same number of threads.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from fastconformer import load_model
from fastconformer.checkpoint import read_checkpoint, write_folder
from fastconformer.files import atomic_file
from fastconformer.nemo_archive import write_nemo
from training.average import average_checkpoints
from training.console import Lines, Stopped, progress_bar, stop_signals, tensorboard
from training.ema import EMA, plain_checkpoint, plain_weights
from training.find_batch import settled
from training.freeze import GradientWatch, format_table, parameter_table, train_mode
from training.keep import check_metric, guard_holds, metrics_of
from training.load import batch_order, load_data, training_batches
from training.objective import objective_of
from training.optim import build_optimizer, schedule_of, set_learning_rates
from training.ranks import ONE, Deal, Ranks, StepStatistics, Together, deal_of, join, sync_batchnorm
from training.recipe import Recipe, load_recipe, recipe_to_yaml, stage_recipes
from training.retain import make_retain, new_rows_first, read_original
from training.run_folder import (
    Progress,
    append_line,
    checkpoint_paths,
    keep_lines_until,
    prune_top,
    resume,
    save_batch,
    save_checkpoint,
    save_model,
    top_folder,
)
from training.start import build_model, prepare
from training.step import gradients, update
from training.validate import evaluate, results_table

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
    if ranks.is_main:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_file(out / "recipe.yaml") as temporary:
            temporary.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    if not recipe.stages:
        log.info("recipe, as resolved:\n%s", recipe_to_yaml(recipe))
        with listed_run(out, ranks) as entry:
            return run(recipe, ranks, baseline, entry)
    with listed_run(out, ranks) as entry:
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
        ledger = Path(stage.output) / "ledger.jsonl"
        if ledger.exists():
            records = map(json.loads, ledger.read_text(encoding="utf-8").splitlines())
            lines += [json.dumps({"stage": number} | record) + "\n" for record in records]
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
    """One stage: load, then evaluate, step, save, over and over."""
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
    watch = GradientWatch(model)
    first_epoch = len(batch_order(train, recipe, 0))
    if trainer.max_steps is not None:
        max_steps = trainer.max_steps
    else:
        batches = sum(len(batch_order(train, recipe, e)) for e in range(trainer.epochs))
        max_steps = max(1, batches // trainer.accumulate)
    val_every = trainer.val_every_steps or max(1, first_epoch // trainer.accumulate)
    save_every = trainer.save_every_steps or val_every
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

    def save() -> Path:
        path = save_checkpoint(out / "checkpoints", model, optimizer, ema, progress, recipe, ranks)
        if ranks.is_main:
            prune_top(out, progress.kept)
        return path

    def write(name: str, record: dict) -> None:
        if ranks.is_main:
            append_line(out / name, record)

    started = time.monotonic() - progress.seconds
    stream = training_batches(train, recipe, progress.epoch, progress.batch, *deal.turns)
    board = tensorboard(out / "tensorboard", progress.step) if ranks.is_main else None
    with (
        stop_signals() as raise_stopped,
        progress_bar(max_steps, progress.step) as show,
        board or contextlib.nullcontext(),
    ):

        def check_stop() -> None:
            """Stops all processes when one of them was asked to."""
            asked = None
            try:
                raise_stopped()
            except Stopped as stop:
                asked = stop
            if any(ranks.total(asked is not None)):
                raise asked or Stopped("stopped with another process")

        # In the middle of an evaluation the others would wait for this one's texts.
        stop_early = raise_stopped if ranks.world == 1 else lambda: None

        def measure(candidate, facts: dict) -> dict:
            """Evaluate, and write down; gives the ledger's record."""
            log.info("step %d: evaluating", progress.step)
            result = evaluate(candidate, validation, heads, recipe, stop_early, ranks)
            record = ledger_record(progress, result, heads[0], started) | facts
            if progress.baseline is None:
                progress.baseline = baseline or record
            record["guard_holds"] = guard_holds(record, progress.baseline, recipe.guard)
            write("ledger.jsonl", record)
            log.info("step %d:\n%s", progress.step, results_table(record, progress.baseline))
            if not record["guard_holds"]:
                log.info("%s is beyond guard.limit: not a candidate for best", recipe.guard.set)
            return record

        try:
            while True:
                # Evaluate: the untouched model first, so that all numbers stand beside it.
                due = progress.step % val_every == 0 or progress.step == max_steps
                if validation and due and progress.evaluated < progress.step:
                    with plain_weights(model, ema):
                        together.gather_weights()
                        record = measure(model, {})
                        together.release_weights()
                    is_best = progress.kept.consider(record, recipe.keep, record["guard_holds"])
                    if is_best:
                        save_model(plain_checkpoint(model, ema), out / "best", ranks)
                        progress.best = record
                    kept_steps = [step for _, _, step in progress.kept.top]
                    if recipe.keep.top_k > 1 and progress.step in kept_steps:
                        folder = top_folder(out, progress.step)
                        save_model(plain_checkpoint(model, ema), folder, ranks)
                    if board is not None:
                        for name, value in metrics_of(record).items():
                            board.add_scalar(name, value, progress.step)
                    progress.evaluated, progress.losses = progress.step, []
                    progress.ended = progress.kept.reason_to_stop(recipe.keep, recipe.guard)
                if progress.step >= max_steps or progress.ended:
                    break

                # One optimizer step over `accumulate` batches.
                check_stop()
                train_mode(model, freezing, progress.step)
                batches = []
                while len(batches) < len(deal.mine):
                    progress.epoch, progress.batch, batch = next(stream)
                    batches.append(batch.to(device))
                names = [u.name for batch in batches for u in batch.utterances]
                statistics = StepStatistics(model)
                seed, step = trainer.seed, progress.step
                optimizer.zero_grad(set_to_none=True)
                together.gather_weights()
                try:
                    result = gradients(model, batches, objective, seed, step, deal, statistics)
                except ValueError:
                    append_line(out / "failed.jsonl", {"step": step, "utterances": names})
                    save_failed(out / "failed", batches, deal, seed, step)
                    raise
                losses, lr, grad_norm = result.losses, lr_at(progress.step), math.nan
                if math.isfinite(losses["loss"]):
                    together.average_gradients()
                    set_learning_rates(optimizer, lr_at, progress.step)
                    if retain:
                        retain.before_update(progress.step)
                    grad_norm = update(optimizer, trainer.clip_grad_norm)
                    if retain:
                        retain.after_update()
                else:
                    together.release_weights()
                progress.step += 1
                progress.splits += result.splits > 0
                progress.seconds = time.monotonic() - started
                entry |= summary(progress, recipe)

                if math.isfinite(grad_norm):
                    watch.check()
                    if ema is not None:
                        ema.update(model)
                    if validation:
                        progress.losses.append(losses["loss"])
                else:
                    # The forward pass has already fed BatchNorm's running statistics.
                    statistics.restore()
                    progress.skipped += 1
                    suspects = result.suspects or [
                        n for share in ranks.gather(names) for n in share
                    ]
                    save_failed(out / "nonfinite", batches, deal, seed, step)
                    bad = {"step": progress.step, "loss": str(losses["loss"])}
                    write("nonfinite.jsonl", bad | {"utterances": suspects})
                    log.warning(
                        "step %d skipped: loss %s, gradient norm %s; its clips are in %s",
                        *(progress.step, losses["loss"], grad_norm, out / "nonfinite.jsonl"),
                    )
                    ranks.barrier()
                    if progress.skipped >= trainer.max_nonfinite_steps:
                        raise ValueError(too_many_skipped(progress.skipped, out))
                if result.splits:
                    log.warning(
                        "step %d ran out of memory and was done in pieces; %d such steps so far; "
                        "a smaller data.batch_duration_s would be faster",
                        *(progress.step, progress.splits),
                    )
                record = {"step": progress.step, "epoch": progress.epoch, **losses}
                record |= {"lr": lr, "grad_norm": grad_norm}
                record = {k: v if math.isfinite(v) else None for k, v in record.items()}
                write("log.jsonl", record | ({"splits": result.splits} if result.splits else {}))
                show(progress.step, losses["loss"])
                if progress.step % trainer.log_every_steps == 0 or progress.step == max_steps:
                    log.info(
                        "step %d/%d  epoch %d  %s  lr %.2e  grad %.2f  %.1f min",
                        *(progress.step, max_steps, progress.epoch),
                        "  ".join(f"{name} {value:.3f}" for name, value in losses.items()),
                        *(lr, grad_norm, progress.seconds / 60),
                    )
                    for key in (*losses, "lr", "grad_norm"):
                        if board is not None and record[key] is not None:
                            board.add_scalar(f"train/{key}", record[key], progress.step)
                if progress.step % save_every == 0 or progress.step == max_steps:
                    save()
            if progress.ended:
                log.info("step %d: the run ends here: %s", progress.step, progress.ended)
            save_model(plain_checkpoint(model, ema), out / "last", ranks)
            tops = [top_folder(out, step) for _, _, step in progress.kept.top]
            if recipe.keep.average and len(tops) > 1 and not progress.averaged:
                best_average(tops, out, device, progress, recipe, ranks, measure)
            save()
        except Stopped as stop:
            path = save()
            raise Stopped(f"{stop}; saved {path}, the same command goes on from there") from None
        finally:
            stream.close()

    if "steps" in entry:  # something was done in this call
        entry |= summary(progress, recipe)
    best = out / "best" if validation else out / "last"
    if ranks.is_main:
        write_nemo(out / "model.nemo", read_checkpoint(best))
    if validation:
        log.info(
            "best, step %d:\n%s",
            *(progress.best["step"], results_table(progress.best, progress.baseline)),
        )
    log.info("done in %.1f minutes: %s is %s", progress.seconds / 60, out / "model.nemo", best)
    return progress


def best_average(folders, out: Path, device, progress: Progress, recipe, ranks, measure) -> None:
    """The mean of the best models' weights becomes `best/` if it is better than all of them."""
    if ranks.is_main:
        write_folder(out / "average", average_checkpoints(folders))
    ranks.barrier()
    model = load_model(out / "average", device)
    record = measure(model, {"average_of": [int(f.name.removeprefix("step_")) for f in folders]})
    metric = recipe.keep.metric
    now, before = (metrics_of(r).get(metric, math.inf) for r in (record, progress.best))
    better = record["guard_holds"] and (now, record["cer"]) < (before, progress.best["cer"])
    log.info(
        "average of %d: %s %.4f, the best single %.4f: %s",
        *(len(folders), metric, now, before, "kept" if better else "not kept"),
    )
    if better:
        save_model(model.to_checkpoint(), out / "best", ranks)
        progress.best = record
    progress.averaged = True


def save_failed(folder: Path, batches, deal: Deal, seed: int, step: int) -> None:
    """This process's batches of a step that failed, for `run_folder.load_batch`."""
    if deal.by_clips and not deal.ranks.is_main:
        return  # the main process has the same ones
    for micro, batch in zip(deal.mine, batches, strict=True):
        save_batch(
            folder / f"step_{step + 1:08d}_batch_{micro}.pt", batch, seeds=[seed, step, micro]
        )


def too_many_skipped(count: int, out: Path) -> str:
    lines = (out / "nonfinite.jsonl").read_text(encoding="utf-8").splitlines()
    suspects = Counter(name for line in lines for name in json.loads(line)["utterances"])
    worst = "; ".join(f"{name}, {n} times" for name, n in suspects.most_common(5))
    more = f" and {len(suspects) - 5} more" if len(suspects) > 5 else ""
    return (
        f"{count} steps were not finite; lower optim.lr, or look at these clips: {worst}{more} "
        f"(all in {out / 'nonfinite.jsonl'}, their batches in {out / 'nonfinite'})"
    )


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.finetune",
        description="Fine-tune a FastConformer, or train one from scratch, as a recipe says.",
        epilog="example: python -m training.finetune recipes/finetune.yaml optim.lr=1e-4 "
        "output=runs/second   (the same command goes on where a run was stopped)",
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. trainer.seed=7")
    options = parser.parse_args(arguments)
    is_main = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if is_main else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[Lines()], force=True)
    who = "error" if is_main else f"error (process {os.environ['RANK']})"
    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except (ValueError, FileNotFoundError) as error:
        print(f"{who}: {error}", file=sys.stderr)
        return 2
    try:
        finetune(recipe, join())
    except (ValueError, OSError, Stopped) as error:
        print(f"{who}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the second Ctrl-C, or one before the first step
        print(f"{who}: interrupted; the last checkpoint stands", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.exit(main())
