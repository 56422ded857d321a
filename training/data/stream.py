"""The endless stream of training batches, from any place of any epoch, to one of any number of
processes."""

import itertools
from collections import deque
from collections.abc import Iterator

from training.data.batching import BatchRules, Draw, plan_epoch
from training.data.sources import TrainingSet
from training.data.store import Batch, batches_ahead
from training.recipe.data_sections import DataRecipe


def batch_rules(data: DataRecipe, speeds: tuple[float, ...], seed: int) -> BatchRules:
    """A recipe's sections as rules."""
    return BatchRules(
        seed,
        data.batch_size,
        data.batch_duration_s,
        data.quadratic_duration_s,
        data.temperature,
        speeds,
        data.pad_to_s,
        data.shuffle,
    )


def batch_order(train: TrainingSet, rules: BatchRules, epoch: int) -> list[list[int]]:
    """Clips of each batch of an epoch, over all processes."""
    plan = plan_epoch(train.sources, train.durations_s, rules, epoch)
    return [plan.clips[batch].tolist() for batch in plan.batches]


def place_of(train: TrainingSet, rules: BatchRules, batches: int) -> tuple[int, int]:
    """(epoch, batches done of it) after so many batches of a run."""
    epoch = 0
    while batches >= (count := len(batch_order(train, rules, epoch))):
        epoch, batches = epoch + 1, batches - count
    return epoch, batches


def _endless(
    train: TrainingSet, rules: BatchRules, epoch: int, batch: int
) -> Iterator[tuple[int, int, list[Draw]]]:
    """(epoch, batches done of it, draws) of every batch from a position on."""
    while True:
        plan = plan_epoch(train.sources, train.durations_s, rules, epoch)
        for index in range(batch, len(plan.batches)):
            yield epoch, index + 1, plan.draws(index)
        epoch, batch = epoch + 1, 0


def training_batches(
    train: TrainingSet,
    rules: BatchRules,
    epoch: int,
    batch: int,
    *,
    num_workers: int = 0,
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
        stream = _endless(train, rules, epoch, batch)
        while True:
            turn = list(itertools.islice(stream, world_size))
            places.append((*turn[-1][:2], *turn[rank][:2]))
            yield turn[rank][2]

    for found in batches_ahead(train.store, mine(), num_workers):
        epoch_done, done, own_epoch, own_done = places.popleft()
        if found is None:
            found = _next_readable(train, rules, own_epoch, own_done)
        yield epoch_done, done, found


def _next_readable(train: TrainingSet, rules: BatchRules, epoch: int, batch: int) -> Batch:
    for at_epoch, _, draws in _endless(train, rules, epoch, batch):
        found = train.store.batch(draws)
        if found is not None:
            return found
        if at_epoch > epoch + 1:  # a whole epoch, at least
            raise ValueError("no training clip can be read; see dropped.jsonl in the run folder")
    raise AssertionError
