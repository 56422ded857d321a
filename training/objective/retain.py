"""Keeping what a model knows while it learns something else: the recipe's `retain` section.

- Distillation from the frozen original on clips of the old language: CTC posteriors and encoder
  states.
- A pull of the weights to where they started (L2-SP, Li et al. 2018, arXiv:1802.01483).
- A first stage that trains the rows of new tokens only.

Letters of shapes: B clips, T' encoder frames, D model width, V old and W new tokens.
"""

import dataclasses
import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from fastconformer import ASRModel
from fastconformer.surgery.vocabulary import Change
from fastconformer.transfers import sent
from training.data.store import Batch
from training.objective.objective import Objective
from training.recipe.sections import RetainRecipe

log = logging.getLogger("finetune")


def ctc_distillation(teacher: Tensor, student: Tensor, lengths: Tensor, change: Change) -> Tensor:
    """(B,): each clip's mean over its frames of KL(teacher || student), in nats.

    The student's new tokens have no teacher: what they take is lost to the old ones, and that is
    the penalty. Old tokens that the student lacks are left out of the teacher's distribution.

    Args:
        teacher: log-probabilities (B, T', V+1), blank last.
        student: log-probabilities (B, T', W+1).
        lengths: valid frames of each clip, (B,).
    """
    old, new = (ids.to(student.device) for ids in change.old_outputs())
    target = teacher[..., old].log_softmax(-1)
    divergence = F.kl_div(student[..., new], target, reduction="none", log_target=True).sum(-1)
    return _mean_over_frames(divergence, lengths)


def encoder_distillation(teacher: Tensor, student: Tensor, lengths: Tensor) -> Tensor:
    """(B,): each clip's mean over its frames of |student - teacher|^2 / |teacher - its mean|^2,
    encoder outputs (B, T', D) both: by what share of the teacher's variance the student moved."""
    teacher, student = teacher.float(), student.float()
    valid = _valid(lengths, teacher.shape[1])[..., None]
    centre = (teacher * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
    spread = _mean_over_frames((teacher - centre).square().sum(-1), lengths)
    distance = _mean_over_frames((student - teacher).square().sum(-1), lengths)
    return distance / spread.clamp_min(1e-6)


def _valid(lengths: Tensor, n_frames: int) -> Tensor:
    return torch.arange(n_frames, device=lengths.device) < lengths[:, None]


def _mean_over_frames(values: Tensor, lengths: Tensor) -> Tensor:
    valid = _valid(lengths, values.shape[1])
    return values.masked_fill(~valid, 0.0).sum(1) / valid.sum(1)


def row_tensors(model: ASRModel) -> list[str]:
    """Names of the parameters that hold a row for each token, the tokens' rows first."""
    names = []
    for head in map(model.head, model.heads):
        for path, layer in head.token_layers().items():
            names += [f"{path}.{name}" for name, _ in layer.named_parameters()]
    own = dict(model.named_parameters())  # a tensor that two names share has one of them
    return [name for name in dict.fromkeys(names) if name in own]


class Retain:
    """What the recipe's `retain` section adds to a step.

    Args:
        model: as it is trained, on its device, before the first step of the run.
        original: the model as it was, on the same device; None without distillation.
        change: of the vocabulary; None: it stayed.
    """

    def __init__(
        self,
        model: ASRModel,
        original: ASRModel | None,
        change: Change | None,
        recipe: RetainRecipe,
    ):
        n_tokens = model.config.vocab_size
        self.model, self.recipe = model, recipe
        self.change = change or Change(tuple(range(n_tokens)), n_tokens)
        self.original = None
        if original is not None and (recipe.distill_ctc or recipe.distill_encoder):
            self.original = original.eval().requires_grad_(False)
        parameters = dict(model.named_parameters())
        self.rows = [parameters[name] for name in row_tensors(model)]
        is_new = torch.zeros(n_tokens, dtype=torch.bool)
        is_new[self.change.new] = True
        self.is_new = is_new.to(self.rows[0].device)
        self.start: dict[str, Tensor] = {}
        if recipe.l2_to_start:
            self.start = {name: p.detach().clone() for name, p in parameters.items()}
        self.kept: list[Tensor] = []

    def objective(self, objective: Objective) -> Objective:
        """The objective with this recipe's distillation in it."""
        weights = {"distill_ctc": self.recipe.distill_ctc}
        weights |= {"distill_encoder": self.recipe.distill_encoder}
        weights = {name: weight for name, weight in weights.items() if weight}
        if self.original is None or not weights:
            return objective
        return dataclasses.replace(objective, kept=self.distances, kept_weights=weights)

    def distances(
        self, features: Tensor, feature_lengths: Tensor, encoded: Tensor, batch: Batch
    ) -> dict[str, Tensor]:
        """{"distill_ctc": (N * B,), ...} of N views of each clip, 0 for other languages; `features`
        (N * B, M, T) are the ones that `encoded` (N * B, T', D) was made from."""
        names = [name for name in ("distill_ctc", "distill_encoder") if getattr(self.recipe, name)]
        found = {name: encoded.new_zeros(len(encoded), dtype=torch.float32) for name in names}
        lang = self.recipe.lang
        utterances = batch.utterances * (len(encoded) // max(1, len(batch.utterances)))
        chosen = torch.tensor(
            [lang is None or u.lang == lang for u in utterances], dtype=torch.bool
        )
        if not chosen.any():
            return found
        chosen = chosen.nonzero()[:, 0]
        asked = self.original.encoder_inputs([utterances[i] for i in chosen.tolist()])
        feature_lengths = feature_lengths[chosen]
        chosen = sent(chosen, encoded.device)
        with torch.no_grad():
            teacher, lengths = self.original.encode(features[chosen], feature_lengths, **asked)
        lengths = sent(lengths, encoded.device)
        student = encoded[chosen]
        if "distill_encoder" in found:
            values = encoder_distillation(teacher, student, lengths)
            found["distill_encoder"] = found["distill_encoder"].index_put((chosen,), values)
        if "distill_ctc" in found:
            with torch.no_grad():
                target = self.original.frame_head.log_probs(teacher)
            guess = self.model.frame_head.log_probs(student)
            values = ctc_distillation(target, guess, lengths, self.change)
            found["distill_ctc"] = found["distill_ctc"].index_put((chosen,), values)
        return found

    def before_update(self, step: int) -> None:
        """To be called after the backward pass of optimizer step `step`, counted from 0."""
        if step < self.recipe.new_rows_steps:
            for parameter in self.rows:
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(~self._new_rows_of(parameter), 0.0)
            self.kept = [parameter.detach().clone() for parameter in self.rows]
        rows = {id(parameter) for parameter in self.rows}
        for name, parameter in self.model.named_parameters() if self.start else ():
            if parameter.grad is None:
                continue
            pull = parameter.detach() - self.start[name]
            if id(parameter) in rows:
                pull.masked_fill_(self._new_rows_of(parameter), 0.0)
            parameter.grad.add_(pull, alpha=self.recipe.l2_to_start)

    def after_update(self) -> None:
        """To be called after the optimizer: weight decay has moved old rows too."""
        for parameter, before in zip(self.rows, self.kept):
            new = self._new_rows_of(parameter)
            parameter.data.copy_(torch.where(new, parameter.data, before))
        self.kept = []

    def _new_rows_of(self, parameter: Tensor) -> Tensor:
        """True on the rows of new tokens, in a shape that the parameter broadcasts with."""
        n_others = len(parameter) - len(self.is_new)  # blank, padding, durations
        mask = F.pad(self.is_new, (0, n_others))
        return mask.view(-1, *[1] * (parameter.ndim - 1))
