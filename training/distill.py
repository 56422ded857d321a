"""Attention to BiRWKV7 without text: the new time mixing learns from the attention it replaces.

    python -m training.distill recipes/birwkv7.yaml
    python -m training.finetune recipes/birwkv7.yaml model.init_from=runs/birwkv7_distilled/model

The teacher is the recipe's `model.init_from`, and stays as it is. Stage 1 (`distill.block_steps`):
each block, fed with what the teacher's attention is fed with, learns that attention's output.
Stage 2 (`distill.model_steps`): the student's encoder as a whole learns the teacher's encoder
output and, where there is a CTC head, its distributions; the heads stay. Both need audio only: the
manifests of `data.train`, with or without `text`. Then comes normal fine-tuning.

The run folder, `distill.output` or `<output>_distilled`, holds `recipe.yaml`, `log.jsonl` (every
step), `ledger.jsonl` (error rates of teacher and student, where `data.validation` has text),
`checkpoint.pt` (for resuming: the same command goes on) and `model/` (the student). What is random
in a step follows from (seed, step).

Source: RADLADS (arXiv:2505.03005) and LoLCATs (arXiv:2410.10254) do so for language models.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastconformer import ASRModel, cli, load_model
from fastconformer.audio.files import load_audio
from fastconformer.checkpoint.files import atomic_file
from fastconformer.checkpoint.folder import write_folder
from fastconformer.formats.manifest import Clip, read_manifest
from fastconformer.load import model_of
from fastconformer.surgery.birwkv7 import to_birwkv7
from fastconformer.text.metrics import word_errors
from training.loop.console import Lines, Stopped, stop_signals
from training.loop.run_folder import append_line, keep_lines_until
from training.optim.optim import learning_rate
from training.recipe.recipe import Recipe, load_recipe, recipe_to_yaml

log = logging.getLogger("distill")

STAGES = ("blocks", "model")


# --- audio --------------------------------------------------------------------------------------


def read_clips(recipe: Recipe, manifests) -> list[Clip]:
    """Clips of these manifests between the recipe's shortest and longest duration, text or not.

    Raises:
        ValueError: none is left.
    """
    clips, n_bad, data = [], 0, recipe.data
    for source in manifests:
        path = source if isinstance(source, str) else source.manifest
        found, bad = read_manifest(path, data.lang)
        n_bad += len(bad)
        for line in bad:
            log.warning("left out %s: %s", line.place, line.detail)
        for clip in found:
            if clip.duration_s is None:
                clip = dataclasses.replace(clip, duration_s=_file_seconds(clip))
            if data.min_duration_s <= clip.duration_s <= data.max_duration_s:
                clips.append(clip)
            else:
                n_bad += 1
    if not clips:
        raise ValueError(f"no usable clip in {', '.join(map(str, manifests))}; {n_bad} left out")
    if n_bad:
        log.warning("left out %d lines: unreadable, too short or too long", n_bad)
    return clips


def _file_seconds(clip: Clip) -> float:
    import soundfile

    try:
        seconds = soundfile.info(clip.path).duration
    except (OSError, RuntimeError):
        return 0.0  # counts as too short
    return max(0.0, seconds - (clip.offset_s or 0.0))


def batch_indices(durations_s: list[float], recipe: Recipe, first: int) -> Iterator[list[int]]:
    """Endless batches of similar lengths, from the `first`-th on; a function of its arguments."""
    data, epoch = recipe.data, 0
    if data.batch_duration_s == "auto":
        raise ValueError("data.batch_duration_s: auto belongs to training.finetune; give seconds")
    durations = np.maximum(np.asarray(durations_s), data.pad_to_s)
    while True:
        rng = np.random.default_rng([recipe.trainer.seed, epoch])
        order = np.argsort(durations * rng.uniform(0.85, 1.15, len(durations)), kind="stable")
        batches, current = [], []
        for index in order.tolist():
            seconds = durations[[*current, index]].max() * (len(current) + 1)
            full = data.batch_size is not None and len(current) >= data.batch_size
            limit = data.batch_duration_s
            full = full or (limit is not None and seconds > limit)
            if current and full:
                batches.append(current)
                current = []
            current.append(index)
        batches.append(current)
        if first < len(batches):
            for i in rng.permutation(len(batches))[first:].tolist():
                yield batches[i]
        first, epoch = max(0, first - len(batches)), epoch + 1


def audio_batches(
    clips: list[Clip], recipe: Recipe, sample_rate: int, first: int
) -> Iterator[tuple[Tensor, Tensor] | None]:
    """(samples (B, L), lengths (B,)) of each batch, read ahead; None where no clip can be read."""

    unreadable = set()

    def read(index: int) -> np.ndarray | None:
        clip = clips[index]
        try:
            duration_s = None if clip.offset_s is None else clip.duration_s
            return load_audio(clip.path, sample_rate, clip.offset_s or 0.0, duration_s)
        except (OSError, ValueError) as error:
            if index not in unreadable:
                log.warning("left out %s: %s", clip.audio, error)
            unreadable.add(index)
            return None

    def batch(indices: list[int]) -> tuple[Tensor, Tensor] | None:
        samples = [s for s in (read(i) for i in indices) if s is not None and len(s)]
        if not samples:
            return None
        least = round(recipe.data.pad_to_s * sample_rate)
        lengths = torch.tensor([max(len(s), least) for s in samples])
        audio = torch.zeros(len(samples), int(lengths.max()))
        for row, s, length in zip(audio, samples, lengths.tolist()):
            left = (length - len(s)) // 2  # silence on both sides, as `transcribe` adds
            row[left : left + len(s)] = torch.from_numpy(s)
        return audio, lengths

    order = batch_indices([clip.duration_s for clip in clips], recipe, first)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(batch, next(order))
        while True:
            ready, ahead = ahead, pool.submit(batch, next(order))
            yield ready.result()


# --- losses -------------------------------------------------------------------------------------


def relative_error(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Squared error over the valid frames, as a share of the teacher's squares; a scalar.

    student, teacher: (B, T, D); valid: (B, T).
    """
    teacher = teacher.float() * valid[..., None]
    difference = student.float() * valid[..., None] - teacher
    return difference.square().sum() / teacher.square().sum().clamp(min=1e-9)


@contextlib.contextmanager
def attention_taps(model: ASRModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list that a forward pass fills with (input, output) of each layer's attention."""
    taps = []

    def note(module, inputs, output):
        taps.append((inputs[0], output))

    handles = [layer.self_attn.register_forward_hook(note) for layer in model.encoder.layers]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def block_losses(
    teacher: ASRModel, student: ASRModel, features: Tensor, lengths: Tensor
) -> Iterator[Tensor]:
    """Relative error of each block on the teacher's attention, one after another, so that each
    may go backward before the next is made. Blocks do not pull on the first one's values."""
    with torch.no_grad(), attention_taps(teacher) as taps:
        encoded, encoded_lengths = teacher.encode(features, lengths)
    pad_mask = torch.arange(encoded.shape[1], device=encoded.device) >= encoded_lengths[:, None]
    v_first = None
    for layer, (given, expected) in zip(student.encoder.layers, taps, strict=True):
        given = given.to(layer.self_attn.x_r.dtype)
        out, values = layer.self_attn(given, v_first, pad_mask)
        v_first = values.detach()
        yield relative_error(out, expected, ~pad_mask)


def model_losses(
    teacher: ASRModel, student: ASRModel, features: Tensor, lengths: Tensor
) -> dict[str, Tensor]:
    """{"encoder": relative error of the encoder's output, "ctc": mean over the frames of the
    Kullback-Leibler divergence from the teacher's CTC distribution to the student's (nats)}."""
    with torch.no_grad():
        expected, encoded_lengths = teacher.encode(features, lengths)
    encoded, _ = student.encode(features, lengths)
    valid = torch.arange(encoded.shape[1], device=encoded.device) < encoded_lengths[:, None]
    losses = {"encoder": relative_error(encoded, expected, valid)}
    if "ctc" in teacher.heads:
        with torch.no_grad():
            target = teacher.ctc_log_probs(expected)
        guess = student.ctc_log_probs(encoded)
        divergence = F.kl_div(guess, target, reduction="none", log_target=True).sum(-1)
        losses["ctc"] = (divergence * valid).sum() / valid.sum()
    return losses


# --- the run ------------------------------------------------------------------------------------


def distill(recipe: Recipe) -> None:
    """Both stages of a recipe, or on from where its run folder stands.

    Raises:
        ValueError, FileNotFoundError: the recipe's model or data cannot be used, or too many steps
            were not finite.
        Stopped: SIGINT or SIGTERM; a checkpoint is written before.
    """
    trainer, options = recipe.trainer, recipe.distill
    if recipe.model.init_from is None:
        raise ValueError("model.init_from is missing: the teacher is a trained model")
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name if trainer.device == "auto" else trainer.device)
    teacher = load_model(recipe.model.init_from)
    if teacher.config.encoder.self_attention_model == "rwkv7_attn":
        raise ValueError(
            f"{recipe.model.init_from} has BiRWKV7 already; the teacher is a model with attention"
        )
    checkpoint = to_birwkv7(teacher.to_checkpoint(), recipe.encoder.warm_start, seed=trainer.seed)
    checkpoint.state_dict = {name: t.clone() for name, t in checkpoint.state_dict.items()}
    student = model_of(checkpoint)
    for layer in student.encoder.layers:
        layer.self_attn.direction_dropout = recipe.encoder.direction_dropout
    teacher.requires_grad_(False).to(device)
    student.to(device)

    out = Path(options.output or f"{recipe.output}_distilled")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "recipe.yaml") as temporary:
        temporary.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    clips = read_clips(recipe, recipe.data.train)
    hours = sum(clip.duration_s for clip in clips) / 3600
    log.info("%d clips, %.2f h of audio, %s", len(clips), hours, device)
    steps = {"blocks": options.block_steps, "model": options.model_steps}
    state = _resume(out / "checkpoint.pt", student) or {"stage": "blocks", "step": 0}
    done = state["step"] + (steps["blocks"] if state["stage"] == "model" else 0)
    keep_lines_until(out / "log.jsonl", done)
    keep_lines_until(out / "ledger.jsonl", done - 1)
    validate = _validation(recipe, teacher, out / "ledger.jsonl")
    with stop_signals() as check_stop:
        for stage in STAGES[STAGES.index(state["stage"]) :]:
            first = state["step"] if state["stage"] == stage else 0
            before = 0 if stage == "blocks" else steps["blocks"]
            if first == 0:
                validate(student, before)
            optimizer = _optimizer(student, stage, recipe)
            if state.get("optimizer") and state["stage"] == stage:
                optimizer.load_state_dict(state["optimizer"])
            progress = _Run(recipe, out, stage, before, steps[stage])
            progress.train(teacher, student, optimizer, clips, first, check_stop)
    validate(student, sum(steps.values()))
    write_folder(out / "model", student.to_checkpoint())
    log.info("wrote %s; fine-tune it with model.init_from=%s", out / "model", out / "model")


@dataclasses.dataclass
class _Run:
    """One stage's loop."""

    recipe: Recipe
    out: Path
    stage: str
    steps_before: int  # of the stage before
    steps: int

    def train(self, teacher, student, optimizer, clips, first: int, check_stop) -> None:
        trainer, started, skipped = self.recipe.trainer, time.monotonic(), 0
        device = next(student.parameters()).device
        stream = audio_batches(clips, self.recipe, student.sample_rate, self.steps_before + first)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        save_every = trainer.save_every_steps or 500
        step, silent = first, 0
        while step < self.steps:
            batch = next(stream)
            silent = silent + 1 if batch is None else 0
            if silent > len(clips):
                raise ValueError("no clip of data.train can be read")
            entropy = np.random.SeedSequence([trainer.seed, self.steps_before + step])
            torch.manual_seed(int(entropy.generate_state(1)[0]))
            try:
                check_stop()
            except Stopped:
                self.save(student, optimizer, step)
                raise
            losses = {}
            optimizer.zero_grad(set_to_none=True)
            if batch is not None:
                losses = self.backward(teacher, student, *(x.to(device) for x in batch))
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if torch.isfinite(norm):
                if trainer.clip_grad_norm is not None:
                    nn.utils.clip_grads_with_norm_(parameters, trainer.clip_grad_norm, norm)
                for group in optimizer.param_groups:
                    group["lr"] = self.lr(step)
                optimizer.step()
            else:
                skipped += 1
                if skipped > trainer.max_nonfinite_steps:
                    raise ValueError(f"{skipped} steps were not finite; lower optim.lr")
            step += 1
            record = {"step": self.steps_before + step, "stage": self.stage, "lr": self.lr(step)}
            append_line(self.out / "log.jsonl", record | losses)
            if step % trainer.log_every_steps == 0 or step == self.steps:
                shown = "  ".join(f"{key} {value:.4f}" for key, value in losses.items())
                rate = (step - first) / (time.monotonic() - started)
                log.info("%s %d/%d  %s  %.2f steps/s", self.stage, step, self.steps, shown, rate)
            if step % save_every == 0 or step == self.steps:
                self.save(student, optimizer, step)

    def backward(self, teacher, student, audio, lengths) -> dict[str, float]:
        """Gradients of one batch; gives the losses' values."""
        bf16 = self.recipe.trainer.precision == "bf16"
        with torch.no_grad():
            features, lengths = teacher.featurize(audio, lengths)
        with torch.autocast(audio.device.type, dtype=torch.bfloat16, enabled=bf16):
            if self.stage == "blocks":
                values = []
                for loss in block_losses(teacher, student, features, lengths):
                    loss.backward()
                    values.append(float(loss.detach()))
                return {"loss": sum(values) / len(values), "worst_block": max(values)}
            losses = model_losses(teacher, student, features, lengths)
        total = losses["encoder"] + self.recipe.distill.ctc_weight * losses.get("ctc", 0.0)
        total.backward()
        losses = {"loss": total} | losses
        return {key: float(value.detach()) for key, value in losses.items()}

    def lr(self, step: int) -> float:
        recipe = self.recipe
        highest = recipe.optim.lr
        if self.stage == "model" and recipe.distill.model_lr is not None:
            highest = recipe.distill.model_lr
        warmup = min(recipe.schedule.warmup_steps or 0, self.steps // 2)
        least = min(recipe.schedule.min_lr, highest)
        return learning_rate(step, highest, least, warmup, self.steps, recipe.schedule.name)

    def save(self, student, optimizer, step: int) -> None:
        is_last = step == self.steps and self.stage == "blocks"
        state = {
            "model": student.state_dict(),
            "optimizer": None if is_last else optimizer.state_dict(),
            "stage": "model" if is_last else self.stage,
            "step": 0 if is_last else step,
        }
        with atomic_file(self.out / "checkpoint.pt") as temporary:
            torch.save(state, temporary)


def _optimizer(student: ASRModel, stage: str, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over the blocks, or over the encoder's layers. Statistics of norms stay; no dropout
    but that of directions."""
    student.eval().requires_grad_(False)
    layers = student.encoder.layers
    for layer in layers:
        layer.self_attn.train()
        (layer.self_attn if stage == "blocks" else layer).requires_grad_(True)
    moving = [p for p in layers.parameters() if p.requires_grad]
    optim = recipe.optim
    groups = [
        {"params": [p for p in moving if p.squeeze().ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in moving if p.squeeze().ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)


def _resume(path: Path, student: ASRModel) -> dict | None:
    if not path.exists():
        return None
    try:
        device = next(student.parameters()).device
        state = torch.load(path, map_location=device, weights_only=True)
        student.load_state_dict(state["model"])
    except (RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"cannot resume from {path}: {' '.join(str(error).split())[:200]}; remove it to "
            "start anew, or choose another distill.output"
        ) from error
    log.info("resuming stage %s after step %d from %s", state["stage"], state["step"], path)
    return state


def _validation(recipe: Recipe, teacher: ASRModel, ledger: Path):
    """A function (student, step) that adds error rates of the validation sets to the ledger."""
    sets = {}
    for name, manifest in recipe.data.validation.items():
        clips = [c for c in read_clips(recipe, [manifest]) if c.text and c.offset_s is None]
        if clips:
            sets[name] = [str(c.path) for c in clips], [c.text for c in clips]

    def rates(model: ASRModel) -> dict[str, float]:
        size = recipe.data.batch_size or 16
        return {
            name: word_errors(
                texts, [t.text for t in model.transcribe(paths, batch_size=size)]
            ).rate
            for name, (paths, texts) in sets.items()
        }

    def validate(student: ASRModel, step: int) -> None:
        if not sets:
            return
        if not ledger.exists() or not ledger.read_text():
            append_line(ledger, {"step": -1, "model": "teacher", "wer": rates(teacher)})
        record = {"step": step, "model": "student", "wer": rates(student)}
        append_line(ledger, record)
        log.info("step %d: student %s", step, json.dumps(record["wer"]))

    return validate


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser(
        "training.distill",
        "Teach BiRWKV7 what a model's attention does, from audio without text.",
        "recipes/birwkv7.yaml distill.block_steps=2000   "
        "(the same command goes on where a run was stopped)",
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. trainer.seed=7")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[Lines()], force=True)
    return cli.run("error", lambda: run(options))


def run(options) -> None:
    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except (ValueError, FileNotFoundError) as error:
        raise cli.UsageError(str(error)) from None
    try:
        distill(recipe)
    except Stopped as error:
        raise cli.Failed(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
