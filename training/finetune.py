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
import contextlib
import dataclasses
import json
import logging
import math
import os
import pickle
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastconformer import ASRModel
from fastconformer.augment import spec_augment
from fastconformer.checkpoint import read_checkpoint
from fastconformer.files import atomic_file
from fastconformer.metrics import char_errors, word_errors
from fastconformer.nemo_archive import write_nemo
from fastconformer.subsampling import output_length
from training.data import (
    AudioStore,
    Batch,
    Dropped,
    batches_ahead,
    check_for_training,
    epoch_batches,
    read_manifest,
)
from training.optim import build_optimizer, schedule_of
from training.recipe import (
    Recipe,
    SpecAugmentRecipe,
    load_recipe,
    recipe_differences,
    recipe_from_dict,
    recipe_to_yaml,
)
from training.start import build_model, freeze, train_mode

log = logging.getLogger("finetune")

SAMPLES_SHOWN = 3  # predictions printed for each validation set


class Stopped(Exception):
    """SIGINT or SIGTERM asked for an end."""


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


# --- one step -----------------------------------------------------------------------------------


def reduce_loss(losses: Tensor, target_lengths: Tensor, reduction: str) -> Tensor:
    """(B,) losses per clip -> scalar, with NeMo's meaning of its four names."""
    if reduction == "mean_batch":
        return losses.mean()
    if reduction == "mean":
        return (losses / target_lengths).mean()
    if reduction == "mean_volume":
        return losses.sum() / target_lengths.sum()
    assert reduction == "sum"
    return losses.sum()


def batch_loss(
    model: ASRModel,
    batch: Batch,
    heads: tuple[str, ...],
    augment: Callable[[Tensor, Tensor], Tensor] | None = None,
    bf16: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one batch, and its part of each head, as scalars.

    Both heads: `(1 - w) * transducer + w * ctc` with w = model.config.loss.ctc_weight (NeMo's
    EncDecHybridRNNTCTCModel); one head: its loss.
    """
    features, lengths = model.featurize(batch.audio, batch.audio_lengths)  # always float32
    if augment is not None:
        features = augment(features, lengths)
    with torch.autocast(batch.audio.device.type, dtype=torch.bfloat16, enabled=bf16):
        encoded, encoded_lengths = model.encode(features, lengths)
        losses = model.losses(
            encoded, encoded_lengths, batch.targets, batch.target_lengths, heads=heads
        )
    config = model.config.loss
    parts = {}
    for head, values in losses.items():
        reduction = config.ctc_reduction if head == "ctc" else config.rnnt_reduction
        parts[head] = reduce_loss(values.float(), batch.target_lengths, reduction)
    if len(parts) == 1:
        return next(iter(parts.values())), parts
    transducer = next(value for head, value in parts.items() if head != "ctc")
    return (1 - config.ctc_weight) * transducer + config.ctc_weight * parts["ctc"], parts


def update(optimizer: torch.optim.Optimizer, lr: float, clip_grad_norm: float | None) -> float:
    """Clip, and one optimizer step; nothing moves when the gradient is not finite.

    Returns:
        The norm of all gradients before clipping.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not torch.isfinite(norm):
        return float(norm)
    if clip_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return float(norm)


def gradients(
    model: ASRModel,
    batches: list[Batch],
    heads: tuple[str, ...],
    augment: Callable | None,
    recipe: Recipe,
    step: int,
) -> dict[str, float]:
    """Forward and backward of one step's batches; their gradients' mean is left in `.grad`.

    Returns:
        Means over the batches: {"loss": ..., and each head's part}.
    Raises:
        ValueError: torch could not (no memory, say); names the clips.
    """
    means = Counter()
    for micro, batch in enumerate(batches):
        seed_step(recipe.trainer.seed, step, micro)
        try:
            total, parts = batch_loss(
                model, batch, heads, augment, recipe.trainer.precision == "bf16"
            )
            (total / len(batches)).backward()
        except RuntimeError as error:
            raise ValueError(
                f"step {step + 1} failed on a batch of {tuple(batch.audio.shape)} samples and "
                f"{tuple(batch.targets.shape)} tokens: {' '.join(str(error).split())[:200]}"
            ) from error
        for key, value in {"loss": total, **parts}.items():
            means[key] += float(value.detach()) / len(batches)
    return dict(means)


def seed_step(seed: int, step: int, micro: int) -> torch.Generator:
    """Set torch's generators (dither, dropout, omega, SpecAugment) for one batch of one step."""
    return torch.manual_seed(int(np.random.SeedSequence([seed, step, micro]).generate_state(1)[0]))


def augmentation(recipe: SpecAugmentRecipe, config: dict) -> Callable | None:
    """SpecAugment as the recipe says, and where it is silent as NeMo's `spec_augment` section."""
    section = config.get("spec_augment") or {}
    if section.get("rect_masks"):
        raise ValueError("spec_augment.rect_masks of the checkpoint's config is not supported")
    defaults = {"freq_masks": 0, "time_masks": 0, "freq_width": 10, "time_width": 10}  # NeMo's
    given = {k: v for k, v in dataclasses.asdict(recipe).items() if v is not None}
    options = {k: given.get(k, section.get(k, v)) for k, v in defaults.items()}
    if not options["freq_masks"] and not options["time_masks"]:
        return None
    return lambda features, lengths: spec_augment(features, lengths, **options)


# --- data ---------------------------------------------------------------------------------------


def load_data(recipe: Recipe, model: ASRModel, heads, dropped_path: Path):
    """(training store, {name: validation store}); what is left out goes to `dropped_path`."""
    data, dropped = recipe.data, []

    def encoder_frames(seconds: float) -> int:
        samples = torch.tensor([int(max(seconds, data.pad_to_s) * model.sample_rate)])
        frames = int(model.preprocessor.featurizer.feature_lengths(samples))
        encoder = model.config.encoder
        return output_length(frames, encoder.subsampling_factor, encoder.causal_downsampling)

    train, n_train_lines = [], 0
    for manifest in data.train:
        found, bad = read_manifest(manifest, data.lang)
        usable, unusable = check_for_training(
            found,
            model.tokenizer,
            data.min_duration_s,
            data.max_duration_s,
            encoder_frames if "ctc" in heads else None,
        )
        n_train_lines += len(found) + len(bad)
        dropped += bad + unusable
        train += usable
    validation = {}
    for name, manifest in data.validation.items():
        validation[name], bad = read_manifest(manifest, data.lang)
        dropped += bad
        if not validation[name]:
            raise ValueError(f"validation set {name}: no usable line in {manifest}; {_why(bad)}")

    with atomic_file(dropped_path) as temporary:
        lines = [_json_line(dataclasses.asdict(item)) for item in dropped]
        temporary.write_text("".join(lines), encoding="utf-8")
    if dropped:
        log.warning("left out %d manifest lines: %s", len(dropped), _why(dropped))
        log.warning("each is listed with its reason in %s", dropped_path)
    if not train:
        raise ValueError(
            f"no usable training clip among {n_train_lines} lines of {', '.join(data.train)}; "
            f"{_why(dropped)}; see {dropped_path}"
        )

    def on_dropped(item: Dropped):
        log.warning("left out %s, line %d: %s", item.manifest, item.line, item.detail)
        append_line(dropped_path, dataclasses.asdict(item))

    def store(utterances, max_duration_s=None):
        return AudioStore(
            utterances,
            model.sample_rate,
            data.cache_gb,
            max_duration_s,
            data.pad_to_s,
            on_dropped,
        )

    return store(train, data.max_duration_s), {name: store(v) for name, v in validation.items()}


def _why(dropped: list[Dropped]) -> str:
    counts = Counter(item.reason for item in dropped).most_common()
    return ", ".join(f"{count} {reason}" for reason, count in counts) or "nothing was left out"


def training_batches(
    store: AudioStore, recipe: Recipe, epoch: int, batch: int
) -> Iterator[tuple[int, int, Batch]]:
    """Endless (epoch, batches done of it, batch), from any position, without unusable clips."""
    while True:
        order = batch_order(store, recipe, epoch)[batch:]
        ahead = batches_ahead(store, order, recipe.data.num_workers)
        for done, item in enumerate(ahead, start=batch + 1):
            if item is not None:
                yield epoch, done, item
        if store.n_unusable == len(store.utterances):
            raise ValueError("no training clip can be read; see dropped.jsonl in the run folder")
        epoch, batch = epoch + 1, 0


def batch_order(store: AudioStore, recipe: Recipe, epoch: int) -> list[list[int]]:
    durations = [max(u.duration_s, recipe.data.pad_to_s) for u in store.utterances]
    data = recipe.data
    return epoch_batches(
        durations, data.batch_size, data.batch_duration_s, recipe.trainer.seed, epoch
    )


# --- evaluation ---------------------------------------------------------------------------------


@torch.no_grad()
def predict(model, store, heads, recipe: Recipe, check_stop) -> tuple[list[str], dict]:
    """Greedy texts of a validation set: (references, {head: hypotheses}); model in eval mode."""
    durations = [u.duration_s for u in store.utterances]
    waiting = sorted(range(len(durations)), key=lambda i: (-durations[i], i))
    batches = []
    while waiting:
        count = recipe.data.batch_size or len(waiting)
        if recipe.data.batch_duration_s is not None:
            longest_s = max(durations[waiting[0]], recipe.data.pad_to_s)
            count = min(count, max(1, int(recipe.data.batch_duration_s / longest_s)))
        batches.append(waiting[:count])
        waiting = waiting[count:]
    device = model_device(model)
    bf16 = recipe.trainer.precision == "bf16"
    texts = {}  # line -> (reference, text of each head)
    for batch in batches_ahead(store, batches, recipe.data.num_workers):
        check_stop()
        if batch is None:
            continue
        batch = batch.to(device)
        features, lengths = model.featurize(batch.audio, batch.audio_lengths)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            encoded, lengths = model.encode(features, lengths)
            found = [model.decode_greedy(encoded, lengths, head) for head in heads]
        for utterance, *hypotheses in zip(batch.utterances, *found, strict=True):
            decoded = [model.tokenizer.decode(hypothesis.tokens) for hypothesis in hypotheses]
            texts[utterance.line] = (utterance.text, *decoded)
    if not texts:
        raise ValueError("no clip of a validation set can be read; see dropped.jsonl")
    # In the manifest's order, so that the samples shown stay the same from run to run.
    references, *by_head = zip(*(texts[line] for line in sorted(texts)), strict=True)
    return list(references), {h: list(t) for h, t in zip(heads, by_head, strict=True)}


def evaluate(model, validation: dict[str, AudioStore], heads, recipe, check_stop) -> dict:
    """{"sets": {name: {head: {"wer", "cer"}}}, "all": {head: {...}}}; prints a few predictions."""
    model.eval()
    sets, all_references, all_hypotheses = {}, [], {head: [] for head in heads}
    for name, store in validation.items():
        references, hypotheses = predict(model, store, heads, recipe, check_stop)
        sets[name] = {head: _rates(references, hypotheses[head]) for head in heads}
        for head in heads:
            all_hypotheses[head] += hypotheses[head]
        all_references += references
        for i in range(0, len(references), -(-len(references) // SAMPLES_SHOWN)):
            log.info("  %s  said: %s", name, references[i])
            for head in heads:
                log.info("  %s  %4s: %s", " " * len(name), head, hypotheses[head][i])
        for head in heads:
            rates = sets[name][head]
            log.info("  %s  %s  WER %.2f %%  CER %.2f %%", name, head, *_percent(rates))
    return {"sets": sets, "all": {h: _rates(all_references, all_hypotheses[h]) for h in heads}}


def _rates(references: list[str], hypotheses: list[str]) -> dict[str, float]:
    return {
        "wer": word_errors(references, hypotheses).rate,
        "cer": char_errors(references, hypotheses).rate,
    }


def _percent(rates: dict[str, float]) -> tuple[float, float]:
    return 100 * rates["wer"], 100 * rates["cer"]


# --- files --------------------------------------------------------------------------------------


def checkpoint_paths(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob("step_*.pt"), key=lambda path: int(path.stem.removeprefix("step_")))


def save_checkpoint(folder: Path, model, optimizer, progress: Progress, recipe: Recipe) -> Path:
    """Everything that resuming needs, in one file; older ones beyond `keep_last` go."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{progress.step:08d}.pt"
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": dataclasses.asdict(progress),
        "recipe": dataclasses.asdict(recipe),
    }
    with atomic_file(path) as temporary:
        torch.save(state, temporary)
    for old in checkpoint_paths(folder)[: -recipe.trainer.keep_last]:
        old.unlink()
    return path


def resume(path: Path, model, optimizer, recipe: Recipe) -> Progress:
    """Load `save_checkpoint`'s file into model and optimizer.

    Raises:
        ValueError: the file is damaged or belongs to another model.
    """
    try:
        state = torch.load(path, map_location=model_device(model), weights_only=True)
        old = recipe_from_dict(_lists(state["recipe"]), f"recipe in {path}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
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


def _json_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def append_line(path: Path, record: dict) -> None:
    """One more JSON line, on disk when this returns to the operating system."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(_json_line(record))


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


def model_device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# --- the run ------------------------------------------------------------------------------------


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
    model = build_model(recipe.model, recipe.loss, trainer.seed)
    heads = {
        "all": model.heads,
        "ctc": tuple(head for head in model.heads if head == "ctc"),
        "transducer": tuple(head for head in model.heads if head != "ctc"),
    }[recipe.loss.heads]
    if not heads:
        raise ValueError(f"loss.heads is {recipe.loss.heads}, this model has {model.heads[0]} only")
    augment = augmentation(recipe.spec_augment, model.config.nemo)
    frozen = freeze(model, recipe.freeze)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "recipe.yaml") as temporary:
        temporary.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    log.info("recipe, as resolved:\n%s", recipe_to_yaml(recipe))

    train, validation = load_data(recipe, model, heads, out / "dropped.jsonl")
    model.to(device)
    optimizer = build_optimizer(model, recipe.optim)
    first_epoch = len(batch_order(train, recipe, 0))
    if trainer.max_steps is not None:
        max_steps = trainer.max_steps
    else:
        batches = sum(len(batch_order(train, recipe, e)) for e in range(trainer.epochs))
        max_steps = max(1, batches // trainer.accumulate)
    val_every = trainer.val_every_steps or max(1, first_epoch // trainer.accumulate)
    save_every = trainer.save_every_steps or val_every
    lr_at = schedule_of(recipe.schedule, recipe.optim.lr, max_steps)

    progress = Progress()
    if checkpoints:
        progress = resume(checkpoints[-1], model, optimizer, recipe)
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
        return save_checkpoint(out / "checkpoints", model, optimizer, progress, recipe)

    started = time.monotonic() - progress.seconds
    stream = training_batches(train, recipe, progress.epoch, progress.batch)
    board = _tensorboard(out / "tensorboard", progress.step)
    with stop_signals() as check_stop, progress_bar(max_steps, progress.step) as show, board:
        try:
            while True:
                # Evaluate: the untouched model first, so that all numbers stand beside it.
                due = progress.step % val_every == 0 or progress.step == max_steps
                if validation and due and progress.evaluated < progress.step:
                    log.info("step %d: evaluating", progress.step)
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
                        model.save(out / "best")
                        progress.best, progress.best_step = wer_cer, progress.step
                    progress.baseline = progress.baseline or wer_cer
                    log.info(
                        "step %d: %s WER %.2f %%, CER %.2f %%; best WER %.2f %%",
                        *(progress.step, heads[0], *_percent(rates), 100 * progress.best[0]),
                    )
                    progress.evaluated, progress.losses = progress.step, []
                if progress.step >= max_steps:
                    break

                # One optimizer step over `accumulate` batches.
                check_stop()
                train_mode(model, frozen)
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
                    grad_norm = update(optimizer, lr, trainer.clip_grad_norm)
                progress.step += 1
                progress.seconds = time.monotonic() - started

                if math.isfinite(grad_norm):
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
    model.eval()
    model.save(out / "last")
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


def _tensorboard(folder: Path, step: int):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step or None)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], None]]:
    """Gives a function that raises Stopped once SIGINT or SIGTERM has come."""
    received = []

    def note(number, frame):
        if received:  # the second one does not wait
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}

    def check_stop():
        if received:
            raise Stopped(f"stopped by {received[0]}")

    try:
        yield check_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress_bar(max_steps: int, step: int) -> Iterator[Callable[[int, float], None]]:
    """A rich bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda step, loss: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns,
        TextColumn("{task.fields[loss]}"),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),
    )
    with bar:
        task = bar.add_task("training", total=max_steps, completed=step, loss="")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"loss {loss:.3f}")


class Lines(logging.Handler):
    """Prints; unlike a StreamHandler it follows sys.stdout, which rich replaces above its bar."""

    def emit(self, record: logging.LogRecord):
        print(self.format(record), flush=True)


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
