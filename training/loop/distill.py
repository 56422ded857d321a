"""Distillation of attention into BiRWKV7, stage after stage, or on from where its folder stands."""

import dataclasses
import json
import logging
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastconformer import ASRModel, load_model
from fastconformer.checkpoint.files import atomic_file
from fastconformer.checkpoint.folder import write_folder
from fastconformer.transfers import sent
from training.data.json_lines import append_line, keep_lines_until
from training.data.sources import TrainingSet, load_data
from training.data.store import AudioStore
from training.data.stream import batch_rules, place_of, training_batches
from training.loop.console import Stopped, stop_signals
from training.loop.run_folder import alone_in
from training.loop.validate import validate
from training.objective.distillation import block_losses, model_losses
from training.optim.optim import schedule_of
from training.recipe.recipe import Recipe, recipe_differences, recipe_to_yaml
from training.setup.device import choose_device
from training.setup.start import set_direction_dropout, with_birwkv7

log = logging.getLogger("distill")

STAGES = ("blocks", "model")
# What is read of a recipe, which is one for fine-tuning too: sections and keys. All else is told.
USED = {
    *("output", "model.init_from", "encoder", "data", "augment", "schedule", "distill"),
    *("optim.lr", "optim.betas", "optim.weight_decay", "optim.eps", "trainer.precision"),
    *("trainer.device", "trainer.threads", "trainer.seed", "trainer.clip_grad_norm"),
    *("trainer.max_nonfinite_steps", "trainer.log_every_steps", "trainer.save_every_steps"),
}
UNUSED_DATA = {  # of the section `data`
    *("data.test", "data.prompt", "data.auto_share", "data.max_tokens"),
    *("data.min_tokens_per_s", "data.max_tokens_per_s", "data.max_tokens_per_frame"),
    *("data.min_chars_per_s", "data.max_chars_per_s"),
}


def tell_unused(recipe: Recipe) -> None:
    """A line about the keys that the recipe sets and that nothing reads here."""

    def among(key: str, names: set[str]) -> bool:
        return any(f"{key}.".startswith(f"{name}.") for name in names)

    changed = [*recipe_differences(Recipe(), recipe)]
    unused = [key for key in changed if not among(key, USED) or among(key, UNUSED_DATA)]
    if unused:
        log.warning("without effect on distillation: %s", ", ".join(unused))


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
    if recipe.data.batch_duration_s == "auto":
        raise ValueError("data.batch_duration_s: auto belongs to training.finetune; give seconds")
    if trainer.precision == "bf16_pure":
        raise ValueError("trainer.precision bf16_pure belongs to training.finetune; give bf16")
    tell_unused(recipe)
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    device = choose_device(trainer.device)
    teacher = load_model(recipe.model.init_from)
    if teacher.config.encoder.self_attention_model == "rwkv7_attn":
        raise ValueError(
            f"{recipe.model.init_from} has BiRWKV7 already; the teacher is a model with attention"
        )
    own = load_model(recipe.model.init_from)  # the teacher's tensors stay as they are
    student = with_birwkv7(own, recipe.encoder.warm_start, trainer.seed)
    set_direction_dropout(student, recipe.encoder.direction_dropout)
    teacher.requires_grad_(False).to(device)
    student.to(device)

    out = Path(options.output or f"{recipe.output}_distilled")
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        _distill_in(out, recipe, teacher, student, device)


def _distill_in(
    out: Path, recipe: Recipe, teacher: ASRModel, student: ASRModel, device: torch.device
) -> None:
    options, trainer = recipe.distill, recipe.trainer
    with atomic_file(out / "recipe.yaml") as temporary:
        temporary.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    train, validation = load_data(
        recipe.data, recipe.augment, trainer.seed, student, (), out / "dropped.jsonl"
    )
    hours = float(train.durations_s.sum()) / 3600
    log.info("%d clips, %.2f h of audio, %s", len(train.utterances), hours, device)
    steps = {"blocks": options.block_steps, "model": options.model_steps}
    state = _resume(out / "checkpoint.pt", student) or {"stage": "blocks", "step": 0}
    done = state["step"] + (steps["blocks"] if state["stage"] == "model" else 0)
    keep_lines_until(out / "log.jsonl", done)
    keep_lines_until(out / "ledger.jsonl", done - 1)
    validate_student = _validation(recipe, teacher, validation, out / "ledger.jsonl")
    with stop_signals() as check_stop:
        for stage in STAGES[STAGES.index(state["stage"]) :]:
            first = state["step"] if state["stage"] == stage else 0
            before = 0 if stage == "blocks" else steps["blocks"]
            if first == 0:
                validate_student(student, before)
            optimizer = _optimizer(student, stage, recipe)
            if state.get("optimizer") and state["stage"] == stage:
                optimizer.load_state_dict(state["optimizer"])
            loop = StageLoop(recipe, out, stage, before, steps[stage])
            loop.train(teacher, student, optimizer, train, first, check_stop)
    validate_student(student, sum(steps.values()))
    write_folder(out / "model", student.to_checkpoint())
    log.info("wrote %s; fine-tune it with model.init_from=%s", out / "model", out / "model")


@dataclasses.dataclass
class StageLoop:
    """One stage's loop."""

    recipe: Recipe
    out: Path
    stage: str
    steps_before: int  # of the stage before
    steps: int

    def train(
        self, teacher, student, optimizer, train: TrainingSet, first: int, check_stop
    ) -> None:
        if first >= self.steps:
            return
        trainer, started, skipped = self.recipe.trainer, time.monotonic(), 0
        lr_at = self.schedule(student.config.encoder.d_model)
        device = next(student.parameters()).device
        rules = batch_rules(self.recipe.data, self.recipe.augment.speeds, trainer.seed)
        place = place_of(train, rules, self.steps_before + first)
        stream = training_batches(train, rules, *place, num_workers=self.recipe.data.num_workers)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        save_every = trainer.save_every_steps or 500
        step = first
        while step < self.steps:
            *_, batch = next(stream)
            entropy = np.random.SeedSequence([trainer.seed, self.steps_before + step])
            torch.manual_seed(int(entropy.generate_state(1)[0]))
            try:
                check_stop()
            except Stopped:
                self.save(student, optimizer, step)
                raise
            optimizer.zero_grad(set_to_none=True)
            batch = batch.to(device)
            losses = self.backward(teacher, student, batch.audio, sent(batch.audio_lengths, device))
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if torch.isfinite(norm):
                if trainer.clip_grad_norm is not None:
                    nn.utils.clip_grads_with_norm_(parameters, trainer.clip_grad_norm, norm)
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(step)
                optimizer.step()
            else:
                skipped += 1
                if skipped > trainer.max_nonfinite_steps:
                    raise ValueError(f"{skipped} steps were not finite; lower optim.lr")
            step += 1
            record = {"step": self.steps_before + step, "stage": self.stage, "lr": lr_at(step)}
            append_line(self.out / "log.jsonl", record | losses)
            if step % trainer.log_every_steps == 0 or step == self.steps:
                shown = "  ".join(f"{key} {value:.4f}" for key, value in losses.items())
                rate = (step - first) / (time.monotonic() - started)
                log.info("%s %d/%d  %s  %.2f steps/s", self.stage, step, self.steps, shown, rate)
            if step % save_every == 0 or step == self.steps:
                self.save(student, optimizer, step)
        stream.close()

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
        total = losses["encoder"] + self.recipe.distill.ctc_weight * losses.get("frames", 0.0)
        total.backward()
        losses = {"loss": total} | losses
        return {key: float(value.detach()) for key, value in losses.items()}

    def schedule(self, d_model: int) -> Callable[..., float]:
        """The learning rate of each step; a warm-up takes half of the stage at most."""
        recipe, highest = self.recipe, self.recipe.optim.lr
        if self.stage == "model" and recipe.distill.model_lr is not None:
            highest = recipe.distill.model_lr
        schedule = recipe.schedule
        if schedule.warmup_steps is not None:
            warmup_steps = min(schedule.warmup_steps, self.steps // 2)
            schedule = dataclasses.replace(schedule, warmup_steps=warmup_steps)
        return schedule_of(schedule, highest, self.steps, d_model)

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
        # On the host, where AdamW wants its numbers of steps: a device would be asked for each.
        state = torch.load(path, map_location="cpu", weights_only=True)
        student.load_state_dict(state["model"])
    except (RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"cannot resume from {path}: {' '.join(str(error).split())[:200]}; remove it to "
            "start anew, or choose another distill.output"
        ) from error
    log.info("resuming stage %s after step %d from %s", state["stage"], state["step"], path)
    return state


def _validation(recipe: Recipe, teacher: ASRModel, sets: dict[str, AudioStore], ledger: Path):
    """A function (student, step) that adds error rates of the validation sets to the ledger."""
    head = teacher.heads[0]

    def rates(model: ASRModel) -> dict[str, float]:
        was_training = [module for module in model.modules() if module.training]
        bf16 = recipe.trainer.precision == "bf16"
        found = validate(model, sets, (head,), recipe.data, bf16, lambda: None)["sets"]
        for module in was_training:
            module.training = True
        return {name: by_head[head]["wer"] for name, by_head in found.items()}

    def validate_student(student: ASRModel, step: int) -> None:
        if not sets:
            return
        if not ledger.exists() or not ledger.read_text():
            append_line(ledger, {"step": -1, "model": "teacher", "wer": rates(teacher)})
        record = {"step": step, "model": "student", "wer": rates(student)}
        append_line(ledger, record)
        log.info("step %d: student %s", step, json.dumps(record["wer"]))

    return validate_student
