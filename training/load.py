"""The recipe's `data` section: manifests to stores of clips, and the endless stream of batches."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from fastconformer import ASRModel
from fastconformer.files import atomic_file
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
from training.recipe import Recipe
from training.run_folder import append_line, json_line

log = logging.getLogger("finetune")


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
        lines = [json_line(dataclasses.asdict(item)) for item in dropped]
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
