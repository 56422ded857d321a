"""The golden training case without files of recipes: its model, its batches, and steps as
`training.finetune` takes them."""

import torch
from conftest import golden
from safetensors.torch import load_file

from fastconformer import ASRModel
from training.data.store import Batch
from training.loop.batch_norm import StepStatistics
from training.loop.ranks import ONE, batch_share
from training.loop.step import gradients, update
from training.objective.objective import objective_of
from training.optim.optim import build_optimizer, schedule_of, set_learning_rates
from training.recipe.recipe import Recipe, recipe_from_dict
from training.setup.freeze import Freezing, train_mode
from training.setup.start import build_model, ready_to_train


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
        self.objective = objective_of(
            self.model, recipe.loss, recipe.spec_augment, recipe.trainer.precision == "bf16"
        )
        self.freezing: Freezing = ready_to_train(
            self.model, self.objective, recipe.freeze, recipe.lora, recipe.trainer
        )
        self.optimizer = build_optimizer(self.model, recipe.optim, recipe.trainer.seed)
        self.step, self.batches, self.losses = 0, batches(), []

    def gradients(self) -> dict[str, float]:
        train_mode(self.model, self.freezing, self.step)
        self.optimizer.zero_grad()
        batch = self.batches[self.step % len(self.batches)]
        seed, share = self.recipe.trainer.seed, batch_share(ONE, 1, False)
        statistics = StepStatistics(self.model)
        return gradients(
            self.model, [batch], self.objective, seed, self.step, share, statistics
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
