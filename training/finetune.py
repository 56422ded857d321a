"""Fine-tune, or train from scratch: one recipe in, a run folder out.

    python -m training.finetune recipes/finetune.yaml
    python -m training.finetune recipes/finetune.yaml optim.lr=1e-4 output=runs/second

The run folder holds `recipe.yaml` (resolved), `dropped.jsonl` (data that is left out, and why),
`log.jsonl` (every step), `ledger.jsonl` (every evaluation; the first is the untouched model),
`tensorboard/`, `checkpoints/` (for resuming), `best/` and `last/` (model folders; best by
validation WER) and `model.nemo` (the best). The same command goes on where a run was stopped.

Everything random in a step follows from (seed, step), so that a resumed run repeats the unbroken
one bit for bit on a CPU with the same number of threads.
"""

import argparse
import logging
import math
import os
import sys
import time
from pathlib import Path

import torch

from fastconformer.checkpoint import read_checkpoint, write_folder
from fastconformer.files import atomic_file
from fastconformer.nemo_archive import write_nemo
from training.console import Lines, Stopped, progress_bar, stop_signals, tensorboard
from training.ema import EMA, plain_checkpoint, plain_weights
from training.freeze import GradientWatch, format_table, parameter_table, train_mode
from training.load import batch_order, load_data, training_batches
from training.optim import build_optimizer, schedule_of, set_learning_rates
from training.recipe import Recipe, load_recipe, recipe_to_yaml
from training.run_folder import (
    Progress,
    append_line,
    checkpoint_paths,
    keep_lines_until,
    resume,
    save_checkpoint,
)
from training.start import build_model, prepare
from training.step import augmentation, gradients, update
from training.validate import evaluate, percent

log = logging.getLogger("finetune")


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"trainer.device is {name}, but this torch finds no CUDA device")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"trainer.device is {name!r}, expected auto, cpu or cuda") from None


def finetune(recipe: Recipe) -> None:
    """Run a recipe to its end, or on from where its run folder stands.

    Raises:
        ValueError, FileNotFoundError: the recipe's model or data cannot be used, or too many steps
            were not finite.
        Stopped: SIGINT or SIGTERM; a checkpoint is written before.
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
    heads = {
        "all": model.heads,
        "ctc": tuple(head for head in model.heads if head == "ctc"),
        "transducer": tuple(head for head in model.heads if head != "ctc"),
    }[recipe.loss.heads]
    if not heads:
        raise ValueError(f"loss.heads is {recipe.loss.heads}, this model has {model.heads[0]} only")
    augment = augmentation(recipe.spec_augment, model.config.nemo)
    freezing = prepare(model, recipe, heads)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "recipe.yaml") as temporary:
        temporary.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    log.info("recipe, as resolved:\n%s", recipe_to_yaml(recipe))

    train, validation = load_data(recipe, model, heads, out / "dropped.jsonl")
    model.to(device)
    optimizer = build_optimizer(model, recipe.optim, trainer.seed)
    ema = None if trainer.ema_decay is None else EMA(model, trainer.ema_decay)
    table = format_table(parameter_table(model, freezing, optimizer))
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
    keep_lines_until(out / "log.jsonl", progress.step)
    keep_lines_until(out / "ledger.jsonl", progress.evaluated)
    n_moving = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(
        "%d clips, %.2f h; %d batches an epoch, %d steps; %.2f M of %.2f M parameters move; "
        "heads %s; %s, %d threads",
        len(train.utterances),
        sum(u.duration_s for u in train.utterances) / 3600,
        first_epoch,
        max_steps,
        n_moving / 1e6,
        sum(p.numel() for p in model.parameters()) / 1e6,
        "+".join(heads),
        device,
        torch.get_num_threads(),
    )

    def save():
        return save_checkpoint(out / "checkpoints", model, optimizer, ema, progress, recipe)

    started = time.monotonic() - progress.seconds
    stream = training_batches(train, recipe, progress.epoch, progress.batch)
    board = tensorboard(out / "tensorboard", progress.step)
    with stop_signals() as check_stop, progress_bar(max_steps, progress.step) as show, board:
        try:
            while True:
                # Evaluate: the untouched model first, so that all numbers stand beside it.
                due = progress.step % val_every == 0 or progress.step == max_steps
                if validation and due and progress.evaluated < progress.step:
                    log.info("step %d: evaluating", progress.step)
                    with plain_weights(model, ema):
                        result = evaluate(model, validation, heads, recipe, check_stop)
                    record = _ledger_record(progress, result, heads, started)
                    append_line(out / "ledger.jsonl", record)
                    for name, rates in {**result["sets"], "all": result["all"]}.items():
                        for head, values in rates.items():
                            for kind, value in values.items():
                                board.add_scalar(f"{kind}/{name}/{head}", value, progress.step)
                    rates = result["all"][heads[0]]
                    wer_cer = rates["wer"], rates["cer"]
                    if progress.best is None or wer_cer < tuple(progress.best):
                        write_folder(out / "best", plain_checkpoint(model, ema))
                        progress.best, progress.best_step = wer_cer, progress.step
                    progress.baseline = progress.baseline or wer_cer
                    log.info(
                        "step %d: %s WER %.2f %%, CER %.2f %%; best WER %.2f %%",
                        *(progress.step, heads[0], *percent(rates), 100 * progress.best[0]),
                    )
                    progress.evaluated, progress.losses = progress.step, []
                if progress.step >= max_steps:
                    break

                # One optimizer step over `accumulate` batches.
                check_stop()
                train_mode(model, freezing, progress.step)
                batches = []
                while len(batches) < trainer.accumulate:
                    progress.epoch, progress.batch, batch = next(stream)
                    batches.append(batch.to(device))
                names = [utterance.name for batch in batches for utterance in batch.utterances]
                statistics = [b.clone() for b in model.buffers()]
                lr, grad_norm = lr_at(progress.step), math.nan
                optimizer.zero_grad(set_to_none=True)
                try:
                    losses = gradients(model, batches, heads, augment, recipe, progress.step)
                except ValueError:
                    append_line(out / "failed.jsonl", {"step": progress.step, "utterances": names})
                    raise
                if math.isfinite(losses["loss"]):
                    set_learning_rates(optimizer, lr_at, progress.step)
                    grad_norm = update(optimizer, trainer.clip_grad_norm)
                progress.step += 1
                progress.seconds = time.monotonic() - started

                if math.isfinite(grad_norm):
                    watch.check()
                    if ema is not None:
                        ema.update(model)
                    if validation:
                        progress.losses.append(losses["loss"])
                else:
                    # The forward pass has already fed BatchNorm's running statistics.
                    for buffer, value in zip(model.buffers(), statistics, strict=True):
                        buffer.copy_(value)
                    progress.skipped += 1
                    bad = {"step": progress.step, "loss": str(losses["loss"]), "utterances": names}
                    append_line(out / "nonfinite.jsonl", bad)
                    log.warning(
                        "step %d skipped: loss %s, gradient norm %s; its clips are in %s",
                        *(progress.step, losses["loss"], grad_norm, out / "nonfinite.jsonl"),
                    )
                    if progress.skipped >= trainer.max_nonfinite_steps:
                        raise ValueError(
                            f"{progress.skipped} steps were not finite; lower optim.lr, or look at "
                            f"the clips in {out / 'nonfinite.jsonl'}"
                        )
                record = {"step": progress.step, "epoch": progress.epoch, **losses}
                record |= {"lr": lr, "grad_norm": grad_norm}
                record = {k: v if math.isfinite(v) else None for k, v in record.items()}
                append_line(out / "log.jsonl", record)
                show(progress.step, losses["loss"])
                if progress.step % trainer.log_every_steps == 0 or progress.step == max_steps:
                    log.info(
                        "step %d/%d  epoch %d  %s  lr %.2e  grad %.2f  %.1f min",
                        *(progress.step, max_steps, progress.epoch),
                        "  ".join(f"{name} {value:.3f}" for name, value in losses.items()),
                        *(lr, grad_norm, progress.seconds / 60),
                    )
                    for key in (*losses, "lr", "grad_norm"):
                        if record[key] is not None:
                            board.add_scalar(f"train/{key}", record[key], progress.step)
                if progress.step % save_every == 0 or progress.step == max_steps:
                    save()
        except Stopped as stop:
            path = save()
            raise Stopped(f"{stop}; saved {path}, the same command goes on from there") from None
        finally:
            stream.close()

    save()
    write_folder(out / "last", plain_checkpoint(model, ema))
    best = out / "best" if validation else out / "last"
    write_nemo(out / "model.nemo", read_checkpoint(best))
    if validation:
        log.info(
            "%s WER %.2f %%, CER %.2f %% before; WER %.2f %%, CER %.2f %% at the best step, %d",
            *(heads[0], *(100 * rate for rate in (*progress.baseline, *progress.best))),
            progress.best_step,
        )
    log.info("done in %.1f minutes: %s is %s", progress.seconds / 60, out / "model.nemo", best)


def _ledger_record(progress: Progress, result: dict, heads, started: float) -> dict:
    losses = progress.losses
    return {
        "step": progress.step,
        "epoch": progress.epoch,
        "head": heads[0],
        "wer": result["all"][heads[0]]["wer"],
        "cer": result["all"][heads[0]]["cer"],
        "sets": result["sets"],
        "train_loss": sum(losses) / len(losses) if losses else None,
        "skipped_steps": progress.skipped,
        "minutes": round((time.monotonic() - started) / 60, 3),
    }


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
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[Lines()], force=True)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        finetune(recipe)
    except (ValueError, OSError, Stopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the second Ctrl-C, or one before the first step
        print("error: interrupted; the last checkpoint stands", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.exit(main())
