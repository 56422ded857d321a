"""The recipe's `data` section: manifests to a mixture of clips, and the endless stream of batches.

`load_data` reads the manifests, leaves out what cannot be trained on, and says what and why.
`training_batches` gives the batches, from any place of any epoch, to one of any number of
processes.
"""

import dataclasses
import itertools
import logging
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fastconformer import ASRModel
from fastconformer.checkpoint.files import atomic_file
from fastconformer.networks.subsampling import encoded_length
from training.augment.waveform import WaveAugment
from training.data.batching import Draw, Epoch, Source, mixture_shares, plan_epoch
from training.data.store import (
    AudioStore,
    Batch,
    Dropped,
    Limits,
    Utterance,
    batches_ahead,
    check_for_training,
    read_manifest,
)
from training.data.tarred import expand_braces, tar_shards
from training.loop.run_folder import append_line, json_line
from training.recipe.data_sections import DataRecipe, SourceRecipe
from training.recipe.recipe import Recipe

log = logging.getLogger("finetune")


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """The training clips, and the parts of the mixture that they came in."""

    store: AudioStore
    sources: tuple[Source, ...]
    durations_s: np.ndarray  # of each clip

    @property
    def utterances(self) -> list[Utterance]:
        return self.store.utterances


def load_data(
    recipe: Recipe, model: ASRModel, heads, dropped_path: Path | None, is_main: bool = True
):
    """(TrainingSet, {name: validation store}); what is left out goes to `dropped_path`, if any.

    Of several processes the main one writes the lines that all of them leave out; the others add
    the clips that only they read, and cannot.
    """
    data, augment = recipe.data, recipe.augment
    fastest = max(augment.speeds, default=1.0)

    def encoder_frames(seconds: float) -> int:
        shortest_s = max(seconds / max(fastest, 1.0), data.pad_to_s)
        samples = torch.tensor([int(shortest_s * model.sample_rate)])
        frames = int(model.preprocessor.featurizer.feature_lengths(samples))
        return encoded_length(model.config.encoder, frames)

    limits = training_limits(data, heads)
    utterances, sources, dropped, n_lines = [], [], [], 0
    for number, entry in enumerate(data.train):
        found, bad = read_source(entry, data.lang)
        usable, unusable = check_for_training(found, model.tokenizer, limits, encoder_frames)
        n_lines += len(found) + len(bad)
        source = entry if isinstance(entry, SourceRecipe) else SourceRecipe(entry)
        usable, over = cap(usable, source, recipe.trainer.seed, number)
        dropped += bad + unusable + over
        name = source.name or source.manifest
        if usable:
            clips = np.arange(len(utterances), len(utterances) + len(usable))
            sources.append(Source(name, clips, source.weight, _shards_of(usable)))
        elif source.weight is not None:
            raise ValueError(f"data.train: no usable clip in {name}; {_why(bad + unusable)}")
        utterances += usable
    validation = {}
    for name, manifest in data.validation.items():
        validation[name], bad = read_manifest(manifest, data.lang)
        dropped += bad
        if not validation[name]:
            raise ValueError(f"validation set {name}: no usable line in {manifest}; {_why(bad)}")

    if dropped_path is not None and is_main:
        with atomic_file(dropped_path) as temporary:
            lines = [json_line(dataclasses.asdict(item)) for item in dropped]
            temporary.write_text("".join(lines), encoding="utf-8")
    if dropped and dropped_path is not None:
        log.warning("left out %d manifest lines: %s", len(dropped), _why(dropped))
        log.warning("each is listed with its reason in %s", dropped_path)
    if not utterances:
        names = ", ".join(e.manifest if isinstance(e, SourceRecipe) else e for e in data.train)
        raise ValueError(
            f"no usable training clip among {n_lines} lines of {names}; "
            f"{_why(dropped)}" + (f"; see {dropped_path}" if dropped_path else "")
        )

    def on_dropped(item: Dropped):
        log.warning("left out %s, line %d: %s", item.manifest, item.line, item.detail)
        if dropped_path is not None:
            append_line(dropped_path, dataclasses.asdict(item))

    def store(clips, max_duration_s=None, pad_to_s=data.pad_to_s):
        return AudioStore(
            clips, model.sample_rate, data.cache_gb, max_duration_s, pad_to_s, on_dropped
        )

    durations_s = np.array([utterance.duration_s for utterance in utterances])
    train = TrainingSet(store(utterances, data.max_duration_s), tuple(sources), durations_s)
    noises, responses = (
        store(_sounds(section.manifests), pad_to_s=0.0) for section in (augment.noise, augment.rir)
    )
    train.store.augment = WaveAugment(
        augment,
        model.sample_rate,
        recipe.trainer.seed,
        *((len(s.utterances), s.samples) for s in (noises, responses, train.store)),
    )
    if len(sources) > 1:
        log.info("%s", mixture_table(train, data.temperature))
    return train, {name: store(clips) for name, clips in validation.items()}


def training_limits(data: DataRecipe, heads) -> Limits:
    """The recipe's filters, those of the heads that are trained included."""
    names = {field.name for field in dataclasses.fields(Limits)} & vars(data).keys()
    values = {name: getattr(data, name) for name in names}
    if tuple(heads) == ("ctc",):
        values["max_tokens_per_frame"] = None
    return Limits(**values, ctc="ctc" in heads)


def read_source(
    entry: str | SourceRecipe, lang: str | None = None
) -> tuple[list[Utterance], list[Dropped]]:
    """All lines of one entry of data.train: those that can be used, and those that cannot."""
    source = entry if isinstance(entry, SourceRecipe) else SourceRecipe(entry)
    tars = tar_shards(source.tarred_audio_filepaths) if source.tarred_audio_filepaths else None
    found, bad = [], []
    paths = [source.manifest]
    if not Path(source.manifest).is_file():  # a name with brackets in it is a name
        paths = expand_braces(source.manifest)
    for path in paths:
        some_found, some_bad = read_manifest(path, source.lang or lang, tars)
        found += some_found
        bad += some_bad
    return found, bad


def cap(
    utterances: list[Utterance], source: SourceRecipe, seed: int, number: int
) -> tuple[list[Utterance], list[Dropped]]:
    """At most max_clips and max_hours of a source: the same random part in every epoch."""
    if source.max_clips is None and source.max_hours is None:
        return utterances, []
    order = np.random.default_rng([seed, number]).permutation(len(utterances))
    hours = np.cumsum([utterances[i].duration_s for i in order]) / 3600
    count = len(order) if source.max_clips is None else source.max_clips
    if source.max_hours is not None:
        count = min(count, int(np.searchsorted(hours, source.max_hours, side="right")))
    kept = set(order[:count].tolist())
    over = [
        Dropped(
            u.manifest,
            u.line,
            "over_cap",
            f"{source.name or source.manifest} is capped",
            u.audio_name,
        )
        for i, u in enumerate(utterances)
        if i not in kept
    ]
    return [utterances[i] for i in sorted(kept)], over


def _shards_of(utterances: list[Utterance]) -> np.ndarray | None:
    if utterances[0].tar_member is None:
        return None
    return np.unique([u.audio_path for u in utterances], return_inverse=True)[1]


def _sounds(manifests: tuple[str, ...]) -> list[Utterance]:
    """Noises or room responses: manifests whose texts do not matter."""
    sounds = []
    for manifest in manifests:
        found, bad = read_manifest(manifest)
        if not found:
            raise ValueError(f"augment: no usable line in {manifest}; {_why(bad)}")
        sounds += found
    return sounds


def mixture_table(train: TrainingSet, temperature: float) -> str:
    """Each source: its clips, hours, share of the draws, and how often an epoch hears it."""
    shares = mixture_shares(train.sources, temperature)
    total = len(train.utterances)
    rows = ["  clips    hours   share  times an epoch  source"]
    for source, share in zip(train.sources, shares, strict=True):
        count, hours = len(source.clips), train.durations_s[source.clips].sum() / 3600
        rows.append(
            f"{count:7d} {hours:8.2f} {share:7.1%} {share * total / count:15.2f}  {source.name}"
        )
    return "\n".join(rows)


def _why(dropped: list[Dropped]) -> str:
    counts = Counter(item.reason for item in dropped).most_common()
    return ", ".join(f"{count} {reason}" for reason, count in counts) or "nothing was left out"


def epoch_plan(train: TrainingSet, recipe: Recipe, epoch: int) -> Epoch:
    """An epoch of a recipe.

    Raises:
        ValueError: data.batch_duration_s is still "auto": `find_batch.settled` gives the number.
    """
    data = recipe.data
    if data.batch_duration_s == "auto":
        raise ValueError(
            "data.batch_duration_s is auto, and only a run finds its number when it starts; write "
            "it into the recipe with: python -m training.find_batch RECIPE --write"
        )
    return plan_epoch(
        train.sources,
        train.durations_s,
        recipe.trainer.seed,
        epoch,
        data.batch_size,
        data.batch_duration_s,
        data.quadratic_duration_s,
        data.temperature,
        recipe.augment.speeds,
        data.pad_to_s,
    )


def batch_order(train: TrainingSet, recipe: Recipe, epoch: int) -> list[list[int]]:
    """Clips of each batch of an epoch, over all processes."""
    plan = epoch_plan(train, recipe, epoch)
    return [plan.clips[batch].tolist() for batch in plan.batches]


def _endless(
    train: TrainingSet, recipe: Recipe, epoch: int, batch: int
) -> Iterator[tuple[int, int, list[Draw]]]:
    """(epoch, batches done of it, draws) of every batch from a position on."""
    while True:
        plan = epoch_plan(train, recipe, epoch)
        for index in range(batch, len(plan.batches)):
            yield epoch, index + 1, plan.draws(index)
        epoch, batch = epoch + 1, 0


def training_batches(
    train: TrainingSet,
    recipe: Recipe,
    epoch: int,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[int, int, Batch]]:
    """Endless (epoch, batches done of it, batch), from any position.

    Processes take the batches in turns: of every `world_size` batches of the one order that all of
    them know, each gets one. So nothing is read twice, all get the same number, and together they
    see in a step what one process sees with `accumulate` that many times as large. The position is
    that after the whole turn, the same for every process; it may be resumed by another number of
    them.

    A batch of which no clip can be read is replaced by the next one that can, so that every process
    keeps its place.

    Raises:
        ValueError: no clip can be read.
    """
    places: deque[tuple[int, int, int, int]] = deque()

    def mine() -> Iterator[list[Draw]]:
        stream = _endless(train, recipe, epoch, batch)
        while True:
            turn = list(itertools.islice(stream, world_size))
            places.append((*turn[-1][:2], *turn[rank][:2]))
            yield turn[rank][2]

    for found in batches_ahead(train.store, mine(), recipe.data.num_workers):
        epoch_done, done, own_epoch, own_done = places.popleft()
        if found is None:
            found = _next_readable(train, recipe, own_epoch, own_done)
        yield epoch_done, done, found


def _next_readable(train: TrainingSet, recipe: Recipe, epoch: int, batch: int) -> Batch:
    for at_epoch, _, draws in _endless(train, recipe, epoch, batch):
        found = train.store.batch(draws)
        if found is not None:
            return found
        if at_epoch > epoch + 1:  # a whole epoch, at least
            raise ValueError("no training clip can be read; see dropped.jsonl in the run folder")
    raise AssertionError
