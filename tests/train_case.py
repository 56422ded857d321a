"""The golden training case without files of recipes: its model, its batches, and steps as
`training.finetune` takes them."""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from conftest import golden
from safetensors.torch import load_file

from fastconformer import ASRModel, load_model
from training.data import Batch
from training.freeze import Freezing, train_mode
from training.objective import objective_of
from training.optim import build_optimizer, schedule_of, set_learning_rates
from training.ranks import ONE, StepStatistics, deal_of
from training.recipe import Recipe, recipe_from_dict
from training.start import build_model, prepare
from training.step import gradients, update


def recipe_of(**sections) -> Recipe:
    """A recipe for the case's model; dropout-free, at a constant rate, unless told otherwise."""
    base = {
        "output": "unused",
        "model": {"init_from": str(golden("train_parity") / "model.nemo")},
        "data": {"train": ["unused"]},
        "schedule": {"name": "constant"},
        "spec_augment": {"freq_masks": 0, "time_masks": 0},
        "trainer": {"max_steps": 100},
    }
    return recipe_from_dict({**base, **{k: base.get(k, {}) | v for k, v in sections.items()}})


def batches() -> list[Batch]:
    tensors = load_file(golden("train_parity") / "golden.safetensors")
    names = ("audio", "audio_len", "targets", "targets_len")
    return [Batch((), *(tensors[f"batch{i}/{name}"] for name in names)) for i in range(3)]


class Run:
    """A model with its optimizer; `steps` takes optimizer steps on the case's batches."""

    def __init__(self, recipe: Recipe):
        torch.set_num_threads(1)
        self.recipe = recipe
        seed = recipe.trainer.seed
        self.model: ASRModel = build_model(recipe.model, recipe.loss, seed, recipe.encoder)
        self.objective = objective_of(recipe, self.model)
        self.freezing: Freezing = prepare(self.model, recipe, self.objective)
        self.optimizer = build_optimizer(self.model, recipe.optim, recipe.trainer.seed)
        self.step, self.batches, self.losses = 0, batches(), []

    def gradients(self) -> dict[str, float]:
        train_mode(self.model, self.freezing, self.step)
        self.optimizer.zero_grad()
        batch = self.batches[self.step % len(self.batches)]
        seed, deal = self.recipe.trainer.seed, deal_of(ONE, 1, False)
        statistics = StepStatistics(self.model)
        return gradients(
            self.model, [batch], self.objective, seed, self.step, deal, statistics
        ).losses

    def steps(self, count: int) -> "Run":
        schedule, trainer = self.recipe.schedule, self.recipe.trainer
        rate = schedule_of(schedule, self.recipe.optim.lr, trainer.max_steps)
        for _ in range(count):
            self.losses.append(self.gradients()["loss"])
            set_learning_rates(self.optimizer, rate, self.step)
            update(self.optimizer, trainer.clip_grad_norm)
            self.step += 1
        return self

    def state(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def changed(before: dict, after: dict) -> set[str]:
    """Names of the tensors that are not bit-equal."""
    return {name for name in after if not torch.equal(before[name], after[name])}


def write_corpus(folder: Path) -> Path:
    """The case's eight clips as files, with a recipe; gives the recipe's path. The run folder is
    `run` beside it."""
    tokenizer = load_model(golden("train_parity") / "model.nemo").tokenizer
    lines = []
    for batch in batches():
        columns = (batch.audio, batch.audio_lengths, batch.targets, batch.target_lengths)
        for audio, length, targets, n_targets in zip(*columns, strict=True):
            path = folder / f"clip{len(lines)}.wav"
            samples = (audio[:length].numpy() * 32768).astype(np.int16)
            soundfile.write(path, samples, 16000)
            text = tokenizer.decode(targets[:n_targets].tolist()).split()[0]  # CTC: few frames
            entry = {"audio_filepath": path.name, "duration": len(samples) / 16000, "text": text}
            lines.append(json.dumps(entry) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "dev.jsonl").write_text("".join(lines[:2]))
    recipe = {
        "output": str(folder / "run"),
        "model": {"init_from": str(golden("train_parity") / "model.nemo")},
        "data": {
            "train": [str(folder / "train.jsonl")],
            "validation": {"dev": str(folder / "dev.jsonl")},
            "batch_size": 2,
            "num_workers": 1,
        },
        "optim": {"lr": 1e-3},
        "trainer": {"max_steps": 4, "threads": 1, "val_every_steps": 100, "device": "cpu"},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path
