"""Shares, buckets, order: what an epoch draws and how it is put into batches."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.batching import (
    WINDOW_DRAWS,
    BatchRules,
    Source,
    effective_s,
    epoch_batches,
    epoch_draws,
    mixture_shares,
    plan_epoch,
)


def sources_of(sizes, weights=None):
    ends = np.cumsum(sizes)
    weights = weights or [None] * len(sizes)
    return [
        Source(f"s{i}", np.arange(end - size, end), weight)
        for i, (size, end, weight) in enumerate(zip(sizes, ends, weights))
    ]


def owner(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


def test_without_shuffling_clips_come_as_they_are_listed():
    sources, seconds = sources_of([3, 4]), np.array([5.0, 1.0, 3.0, 2.0, 9.0, 1.0, 1.0])
    rules = BatchRules(7, 2, None, shuffle=False)
    for epoch in range(2):
        plan = plan_epoch(sources, seconds, rules, epoch)
        drawn = [plan.clips[batch].tolist() for batch in plan.batches]
        assert drawn == [[0, 1], [2, 3], [4, 5], [6]]


def first_draws(sources, durations, count, temperature=1.0, **options):
    """Clips in the order of the batches that training gets them in."""
    clips, epoch = [], 0
    while len(clips) < count:
        rules = BatchRules(7, None, 60.0, temperature=temperature)
        plan = plan_epoch(sources, durations, rules, epoch)
        clips += [plan.clips[n] for batch in plan.batches for n in batch]
        epoch += 1
    return np.array(clips[:count])


@pytest.mark.parametrize(
    ("sizes", "weights", "temperature", "expected"),
    [
        ((3000, 1000, 500), (1, 1, 2), 1.0, (0.25, 0.25, 0.5)),
        ((30000, 100, 5000), (7, 1, 2), 1.0, (0.7, 0.1, 0.2)),
        ((9000, 1000), (9, 1), 0.5, (0.75, 0.25)),
        ((9000, 1000), None, 0.0, (0.5, 0.5)),
        ((9000, 1000), None, 1.0, (0.9, 0.1)),
        ((40, 10), (0.2, 0.8), 1.0, (0.2, 0.8)),
    ],
)
def test_shares_hold_over_10000_draws(sizes, weights, temperature, expected):
    """Within 2 %, though clips of the sources are of different length, in any part of an epoch."""
    sources = sources_of(sizes, weights)
    seconds = np.random.default_rng(0).uniform(1, 4, sum(sizes)) * (1 + owner(sizes))
    assert mixture_shares(sources, temperature) == pytest.approx(expected)
    clips = first_draws(sources, seconds, 10_000, temperature)
    counts = np.bincount(owner(sizes)[clips], minlength=len(sizes))
    assert np.abs(counts / 10_000 - expected).max() < 0.02
    # each source in full before one of its clips comes again
    for number, source in enumerate(sources):
        epochs = [epoch_draws(sources, expected, 7, epoch) for epoch in range(4)]
        times = Counter(np.concatenate(epochs)[np.isin(np.concatenate(epochs), source.clips)])
        assert max(times.values()) - min(times.get(c, 0) for c in source.clips.tolist()) <= 1, (
            number
        )


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 20),
)
def test_without_weights_every_clip_comes_once_an_epoch(sizes, seed, epoch):
    sources = sources_of(sizes)
    draws = epoch_draws(sources, mixture_shares(sources), seed, epoch)
    assert sorted(draws.tolist()) == list(range(sum(sizes)))
    assert np.array_equal(draws, epoch_draws(sources, mixture_shares(sources), seed, epoch))


@settings(max_examples=60, deadline=None)
@given(
    durations=st.lists(st.floats(0.1, 40.0), max_size=60),
    batch_duration_s=st.floats(1.0, 90.0),
    quadratic=st.none() | st.floats(1.0, 60.0),
    seed=st.integers(0, 5),
)
def test_buckets_keep_lhotses_constraint(durations, batch_duration_s, quadratic, seed):
    """clips * (d + d^2 / q) of the longest is at most the limit, and no two batches that are
    neighbours by length could have been one."""
    batches = epoch_batches(durations, None, batch_duration_s, seed, 1, quadratic)
    assert sorted(i for batch in batches for i in batch) == list(range(len(durations)))
    for batch in batches:
        d = max(durations[i] for i in batch)
        cost = len(batch) * (d + d * d / quadratic if quadratic else d)
        assert len(batch) == 1 or cost <= batch_duration_s * (1 + 1e-12)


def test_the_quadratic_term_makes_batches_of_long_clips_smaller():
    durations = [5.0] * 400 + [30.0] * 400
    assert effective_s(30.0, 15.0) == 90.0
    plain, curved = (
        {durations[b[0]]: len(b) for b in epoch_batches(durations, None, 180.0, 0, 1, q)}
        for q in (None, 15.0)
    )
    assert max(plain.values()) == 36
    sizes = Counter(len(b) for b in epoch_batches(durations, None, 180.0, 0, 1, 15.0))
    assert sizes[2] > 190 and max(sizes) == 27  # 180 / 90 and 180 / 6.67
    assert curved


def test_windows_are_small_and_padding_too():
    seconds = np.random.default_rng(1).uniform(0.5, 20, 20_000)
    batches = epoch_batches(seconds, None, 120.0, 3, 0)
    padded = sum(len(b) * seconds[b].max() for b in batches)
    assert padded < 1.2 * seconds.sum()
    # draws are used near to where they were drawn
    place, spread = 0, []
    for batch in batches:
        spread.append(max(abs(place - n) for n in batch))
        place += len(batch)
    assert np.percentile(spread, 99) < 1.6 * WINDOW_DRAWS


def test_speed_changes_durations_before_they_are_bucketed():
    seconds = np.full(3000, 10.0)
    rules = BatchRules(0, None, 120.0, speeds=(0.5, 1.0, 2.0))
    plan = plan_epoch(sources_of([3000]), seconds, rules, 0)
    counts = Counter(plan.speeds.tolist())
    assert counts.keys() == {0.5, 1.0, 2.0} and min(counts.values()) > 900
    for number, batch in enumerate(plan.batches):
        played = seconds[plan.clips[batch]] / plan.speeds[batch]
        assert len(batch) == 1 or played.max() * len(batch) <= 120.0
        assert [d.speed for d in plan.draws(number)] == plan.speeds[batch].tolist()
    other = plan_epoch(sources_of([3000]), seconds, rules, 1)
    assert not np.array_equal(plan.speeds, other.speeds)


def test_tarred_shards_are_read_one_after_the_other_and_mixed():
    shards = np.repeat(np.arange(40), 500)
    source = [Source("tarred", np.arange(20_000), None, shards)]
    draws = epoch_draws(source, [1.0], 0, 0)
    assert sorted(draws.tolist()) == list(range(20_000))
    near = [len(set(shards[draws[i : i + 1000]])) for i in range(0, 20_000, 1000)]
    assert max(near) <= 20 and min(near) >= 2
    orders = [list(dict.fromkeys(shards[epoch_draws(source, [1.0], 0, e)])) for e in (0, 1)]
    assert orders[0] != orders[1]
