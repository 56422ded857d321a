"""From a recipe to what its first step needs: the one walk that a run, its comparison and the
search for its batch take.

    model -> objective -> data -> frozen model -> distillation from the original
"""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from fastconformer import ASRModel
from fastconformer.load import is_slow_in_bfloat16
from fastconformer.surgery.vocabulary import MARGINS, Change, check_transfer, match_pieces
from training.data.batching import BatchRules
from training.data.old_language import OldLanguage, old_language
from training.data.sources import TrainingSet, load_data
from training.data.store import AudioStore, Batch
from training.data.stream import batch_order, batch_rules
from training.loop.batch_norm import sync_batchnorm
from training.loop.keep import check_metric
from training.loop.ranks import ONE, BatchShare, Ranks, batch_share
from training.objective.objective import Objective, objective_of
from training.objective.retain import Retain, row_tensors
from training.recipe.recipe import Recipe, idle_keys
from training.recipe.sections import RetainRecipe
from training.setup.device import choose_device
from training.setup.freeze import Freezing, new_rows_first
from training.setup.start import build_model, ready_to_train, tokenizer_at

log = logging.getLogger("finetune")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A recipe with its model and data in memory, as the run's first step finds them."""

    recipe: Recipe
    device: torch.device
    share: BatchShare
    model: ASRModel  # on the device
    objective: Objective
    freezing: Freezing
    retain: Retain | None
    train: TrainingSet
    validation: dict[str, AudioStore]

    @property
    def rules(self) -> BatchRules:
        """How an epoch of it is cut into batches."""
        recipe = self.recipe
        return batch_rules(recipe.data, recipe.augment.speeds, recipe.trainer.seed)


@dataclasses.dataclass(frozen=True)
class RunLength:
    batches_an_epoch: int  # of the first
    max_steps: int
    val_every: int


def run_length(prepared: Prepared) -> RunLength:
    """How long a run is; its `data.batch_duration_s` is a number.

    Raises:
        ValueError: it is still "auto".
    """
    trainer, train, rules = prepared.recipe.trainer, prepared.train, prepared.rules
    first_epoch = len(batch_order(train, rules, 0))
    steps = trainer.max_steps
    if steps is None:
        batches = sum(len(batch_order(train, rules, e)) for e in range(trainer.epochs))
        steps = max(1, batches // trainer.accumulate)
    share = int(first_epoch * (trainer.val_every_epochs or 1))  # as Lightning rounds
    val_every = trainer.val_every_steps or max(1, share // trainer.accumulate)
    return RunLength(first_epoch, steps, val_every)


def prepare_run(
    recipe: Recipe,
    ranks: Ranks = ONE,
    dropped_path: Path | None = None,
    is_new_run: bool = False,
) -> Prepared:
    """Everything up to the optimizer.

    Args:
        dropped_path: a file for the data that is left out; None: it is not written down.
        is_new_run: a change of the vocabulary is proven before it is trained.
    Raises:
        ValueError, FileNotFoundError: the recipe's model or data cannot be used.
    """
    trainer = recipe.trainer
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    if idle := idle_keys(recipe):
        told = (f"{key} (it needs {what})" for key, what in idle.items())
        log.warning("without effect: %s", ", ".join(told))
    device = choose_device(trainer.device)
    if trainer.precision != "fp32" and is_slow_in_bfloat16(device):
        log.warning(
            "trainer.precision is %s, but %s has no bfloat16, and is slow in it: use fp32",
            *(trainer.precision, device),
        )
    model = build_model(recipe.model, recipe.loss, trainer.seed, recipe.encoder, recipe.prompt)
    objective = objective_of(model, recipe.loss, recipe.spec_augment, trainer.precision == "bf16")
    share = batch_share(ranks, trainer.accumulate, trainer.sync_batchnorm)
    if share.synced:
        sync_batchnorm(model)
    check_metric(recipe.keep.metric, recipe.data.validation, objective.heads)
    # Where processes read the same clips, one of them says which cannot be read.
    if share.by_clips and not ranks.is_main:
        dropped_path = None
    original = read_original(recipe)
    old = known_before(recipe, model, original)
    train, validation = load_data(
        recipe.data,
        recipe.augment,
        trainer.seed,
        model,
        objective.heads,
        dropped_path,
        ranks.is_main,
        old,
    )
    change = None
    if recipe.model.changes_vocabulary:
        change = change_of(recipe, model, original, train, validation, is_new_run)
    freezing = ready_to_train(model, objective, recipe.freeze, recipe.lora, trainer)
    if recipe.retain.new_rows_steps:
        freezing = new_rows_first(freezing, row_tensors(model), recipe.retain.new_rows_steps)
    model.to(device)
    retain = make_retain(model, original, change, recipe.retain, trainer.parallel)
    if retain:
        objective = retain.objective(objective)
    return Prepared(recipe, device, share, model, objective, freezing, retain, train, validation)


def read_original(recipe: Recipe) -> ASRModel | None:
    """The model before its vocabulary changed; None where the recipe has no use for it."""
    if not recipe.model.changes_vocabulary and not recipe.retain.distills:
        return None
    unchanged = dataclasses.replace(recipe.model, tokenizer=None, labels=())
    return build_model(unchanged, recipe.loss, recipe.trainer.seed, recipe.encoder, recipe.prompt)


def known_before(recipe: Recipe, model: ASRModel, original: ASRModel | None) -> OldLanguage | None:
    """What writes the old language's lines; None where the vocabulary has not grown.

    Raises:
        ValueError, FileNotFoundError: retain.tokenizer is none, or not the model's first pieces.
    """
    retain, path = recipe.retain, recipe.retain.tokenizer
    if path is None:
        changes = original is not None and recipe.model.changes_vocabulary
        return old_language(original.tokenizer, model.tokenizer, retain.lang) if changes else None
    found = old_language(tokenizer_at(path), model.tokenizer, retain.lang)
    if found is None:
        raise ValueError(
            f"retain.tokenizer {path}: the model's vocabulary is not that one with pieces behind it"
        )
    return found


def change_of(
    recipe: Recipe,
    model: ASRModel,
    original: ASRModel,
    train: TrainingSet,
    validation: dict[str, AudioStore],
    is_new_run: bool,
) -> Change:
    """What changed of the vocabulary. A new run's change is proven here, on clips of the old
    language.

    Raises:
        ValueError: the changed model does not give what the original gives.
    """
    retain = recipe.retain
    sources = match_pieces(original.tokenizer, model.tokenizer)
    if recipe.model.transfer == "none":
        sources = [None] * len(sources)
    change = Change(tuple(sources), original.tokenizer.vocab_size)
    if is_new_run and recipe.model.transfer != "none" and retain.check_clips:
        stores = [*validation.values(), train.store]
        margin = MARGINS[recipe.model.new_rows]
        said = check_transfer(original, model, change, _check_clips(stores, retain), margin)
        log.info("vocabulary: %s", said)
    return change


def _check_clips(stores: list[AudioStore], recipe: RetainRecipe) -> Iterator[Batch]:
    """One clip at a time, those of the old language, evenly from the first store that has any."""
    for store in stores:
        languages = [utterance.lang for utterance in store.utterances]
        found = [i for i, lang in enumerate(languages) if recipe.lang in (None, lang)]
        if found:
            step = max(1, len(found) // recipe.check_clips)
            batches = (store.batch([i]) for i in found[::step][: recipe.check_clips])
            yield from (batch for batch in batches if batch is not None)
            return
    log.warning("no clip has lang %s: the vocabulary change is not proven on audio", recipe.lang)


def make_retain(
    model: ASRModel,
    original: ASRModel | None,
    change: Change | None,
    recipe: RetainRecipe,
    parallel: str,
) -> Retain | None:
    """See Retain; None where the recipe asks for nothing of it.

    Raises:
        ValueError: CTC posteriors are to be kept, but there is no CTC head; or weights are to be
            held that lie in shards.
    """
    if parallel == "fsdp" and (recipe.l2_to_start or recipe.new_rows_steps):
        raise ValueError(
            "retain.l2_to_start and retain.new_rows_steps need whole weights; "
            "set trainer.parallel to ddp"
        )
    if recipe.distill_ctc and model.frame_head is None:
        raise ValueError(f"retain.distill_ctc: this model has {model.heads[0]} only")
    if not (recipe.distills or recipe.l2_to_start or recipe.new_rows_steps):
        return None
    if original is not None:
        original.to(next(model.parameters()).device)
    return Retain(model, original, change, recipe)
