"""Which clips an epoch draws, and in which batches: a function of (seed, epoch) only.

Not of the workers, not of the processes, not of what was read before: so a run that is resumed in
the middle of an epoch goes on with the batch that came next, and two processes that take turns see
together what one would.

    sources with shares -> draws (each with its speed) -> windows -> batches of like duration
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Draws that are sorted by duration together. Small enough that a mixture's shares hold all through
# an epoch and that tarred shards are read one after the other; large enough to waste no padding.
WINDOW_DRAWS = 4096
BLUR = 0.15  # of durations before they are sorted, so that batches differ from epoch to epoch
ORDER, MIX, SPEED, BATCH, UNSAID = range(5)  # one stream of random numbers for each purpose


class Draw(NamedTuple):
    """One clip of a batch: which, when it was drawn, and how fast it is played."""

    clip: int
    epoch: int
    number: int  # within the epoch
    speed: float


@dataclasses.dataclass(frozen=True)
class Source:
    """One part of the mixture.

    clips: indices of its clips, (n,); shards: the tar of each clip, (n,), or None; weight: its
    part of the draws relative to the others', None: as many as it has clips.
    """

    name: str
    clips: np.ndarray
    weight: float | None = None
    shards: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Epoch:
    """All that is random in an epoch's order. `batches` holds numbers of draws."""

    number: int
    clips: np.ndarray  # (N,) the clip of each draw
    speeds: np.ndarray  # (N,)
    batches: list[list[int]]

    def draws(self, batch: int) -> list[Draw]:
        return [
            Draw(int(self.clips[n]), self.number, n, float(self.speeds[n]))
            for n in self.batches[batch]
        ]


@dataclasses.dataclass(frozen=True)
class BatchRules:
    """How an epoch is cut into batches.

    batch_size: most clips in a batch; None: no limit. batch_duration_s: most seconds in a batch,
    padding included; None: no limit; "auto": not known yet. quadratic_duration_s: see
    `effective_s`. temperature: see `mixture_shares`. speeds: each draw gets one of these at random;
    none: 1. pad_to_s: shorter clips are padded to it, after their speed was changed. shuffle:
    False: clips as they are listed, source after source, and neighbours in a batch.
    """

    seed: int
    batch_size: int | None
    batch_duration_s: float | str | None = None
    quadratic_duration_s: float | None = None
    temperature: float = 1.0
    speeds: Sequence[float] = ()
    pad_to_s: float = 0.0
    shuffle: bool = True


def mixture_shares(sources: Sequence[Source], temperature: float = 1.0) -> np.ndarray:
    """Each source's share of the draws, (n,), summing to 1: `weight ** temperature`, normalised.

    A source without a weight has its number of clips for one. NeMo's reweight_temperature: 1 keeps
    the weights, 0 makes all shares equal.
    """
    weights = [len(s.clips) if s.weight is None else s.weight for s in sources]
    scaled = np.asarray(weights, dtype=np.float64) ** temperature
    return scaled / scaled.sum()


def epoch_draws(
    sources: Sequence[Source], shares: Sequence[float], seed: int, epoch: int
) -> np.ndarray:
    """Clips in the order in which an epoch draws them, (N,) int64.

    An epoch has as many draws as there are clips, and of each source its share of them, spread
    evenly over the epoch. A source goes through all its clips in random order before it starts
    again, across the ends of epochs too: with natural shares every clip comes once an epoch.
    """
    total = sum(len(source.clips) for source in sources)
    drawn, places = [], []
    for number, (source, share) in enumerate(zip(sources, shares, strict=True)):
        # Rounding the running total, not each epoch's part, keeps the share exact in the long run.
        first, last = (round(share * total * e) for e in (epoch, epoch + 1))
        drawn.append(_draws_of(source, number, first, last, seed))
        rng = np.random.default_rng([seed, epoch, MIX, number])
        places.append((np.arange(last - first) + rng.random(last - first)) / max(1, last - first))
    return np.concatenate(drawn)[np.argsort(np.concatenate(places), kind="stable")]


def _draws_of(source: Source, number: int, first: int, last: int, seed: int) -> np.ndarray:
    """Draws first..last of a source, counted from the run's beginning."""
    size, parts = len(source.clips), [np.empty(0, dtype=np.int64)]
    for turn in range(first // size, -(-last // size)):
        rng = np.random.default_rng([seed, turn, ORDER, number])
        order = _shard_order(source.shards, rng) if source.shards is not None else None
        order = rng.permutation(size) if order is None else order
        begin, end = max(first, turn * size), min(last, (turn + 1) * size)
        parts.append(source.clips[order[begin - turn * size : end - turn * size]])
    return np.concatenate(parts)


def _shard_order(shards: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All positions, shard after shard in random order; clips of neighbouring shards are mixed as
    long as together they fill a window, so that few tar files are read at a time."""
    by_shard = np.argsort(shards, kind="stable")
    groups = np.split(by_shard, np.flatnonzero(np.diff(shards[by_shard])) + 1)
    parts, waiting, count = [], [], 0
    for index in rng.permutation(len(groups)).tolist():
        waiting.append(groups[index])
        count += len(groups[index])
        if count >= WINDOW_DRAWS:
            parts.append(rng.permutation(np.concatenate(waiting)))
            waiting, count = [], 0
    if waiting:
        parts.append(rng.permutation(np.concatenate(waiting)))
    return np.concatenate(parts)


def leaves_unsaid(share: float, draw: Draw, seed: int) -> bool:
    """Whether this draw is among the `share` of draws that do not tell their language."""
    return (
        bool(share)
        and np.random.default_rng([seed, draw.epoch, UNSAID, draw.number]).random() < share
    )


def plan_epoch(
    sources: Sequence[Source], durations_s: np.ndarray, rules: BatchRules, epoch: int
) -> Epoch:
    """An epoch's draws and batches, of clips of these durations at speed 1.

    Raises:
        ValueError: rules.batch_duration_s is still "auto"; `setup.batch_search.settled` finds it.
    """
    if rules.batch_duration_s == "auto":
        raise ValueError(
            "data.batch_duration_s is auto, and only a run finds its number when it starts; write "
            "it into the recipe with: python -m training.find_batch RECIPE --write"
        )
    if rules.shuffle:
        shares = mixture_shares(sources, rules.temperature)
        clips = epoch_draws(sources, shares, rules.seed, epoch)
    else:
        clips = np.concatenate([source.clips for source in sources])
    rates = np.ones(len(clips))
    if rules.speeds:
        rng = np.random.default_rng([rules.seed, epoch, SPEED])
        speeds = np.asarray(rules.speeds, dtype=np.float64)
        rates = speeds[rng.integers(len(speeds), size=len(clips))]
    drawn_s = np.maximum(np.asarray(durations_s)[clips] / rates, rules.pad_to_s)
    if not rules.shuffle:
        costs = effective_s(drawn_s, rules.quadratic_duration_s)
        batches = _cut(range(len(clips)), costs, rules.batch_size, rules.batch_duration_s)
        return Epoch(epoch, clips, rates, batches)
    batches = epoch_batches(
        drawn_s,
        rules.batch_size,
        rules.batch_duration_s,
        rules.seed,
        epoch,
        rules.quadratic_duration_s,
    )
    return Epoch(epoch, clips, rates, batches)


def effective_s(duration_s, quadratic_duration_s: float | None):
    """What a clip counts in a batch: d, or d + d^2 / q, as attention's cost grows (lhotse)."""
    if quadratic_duration_s is None:
        return duration_s
    return duration_s + duration_s**2 / quadratic_duration_s


def epoch_batches(
    durations_s: Sequence[float],
    batch_size: int | None,
    batch_duration_s: float | None,
    seed: int,
    epoch: int,
    quadratic_duration_s: float | None = None,
) -> list[list[int]]:
    """Every draw once, in batches of similar length, in random order.

    Draws are taken in windows of about 4,096; within a window, batches are of neighbours by
    duration, and in random order. The longest batch is put first in epoch 0, so that a lack of
    memory shows at once.

    Args:
        durations_s: of each draw, in their order.
        batch_size: most clips in a batch; None: no limit.
        batch_duration_s: most seconds in a batch, padding included; None: no limit. A clip that is
            longer makes a batch of its own.
        quadratic_duration_s: q: each clip counts d + d^2 / q seconds; None: d.
    """
    rng = np.random.default_rng([seed, epoch, BATCH])
    durations = np.asarray(durations_s, dtype=np.float64)
    costs = effective_s(durations, quadratic_duration_s)
    batches = []
    windows = max(1, round(len(durations) / WINDOW_DRAWS))
    for window in np.array_split(np.arange(len(durations)), windows):
        blurred = durations[window] * rng.uniform(1 - BLUR, 1 + BLUR, len(window))
        order = window[np.argsort(blurred, kind="stable")]
        cut = _cut(order.tolist(), costs, batch_size, batch_duration_s)
        batches += [cut[i] for i in rng.permutation(len(cut)).tolist()]
    if epoch == 0 and batches:
        padded_s = [costs[batch].max() * len(batch) for batch in batches]
        batches.insert(0, batches.pop(int(np.argmax(padded_s))))
    return batches


def _cut(order, costs, batch_size, batch_duration_s) -> list[list[int]]:
    batches, current, longest = [], [], 0.0
    for index in order:
        longest_with = max(longest, costs[index])
        is_full = batch_size is not None and len(current) == batch_size
        if batch_duration_s is not None:
            is_full = is_full or longest_with * (len(current) + 1) > batch_duration_s
        if current and is_full:
            batches.append(current)
            current, longest_with = [], costs[index]
        current.append(index)
        longest = longest_with
    if current:
        batches.append(current)
    return batches
