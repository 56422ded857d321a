"""Pieces that share a second: cut and joined as NeMo does."""

import itertools
import json

import numpy as np
import pytest
from conftest import TESTS

from fastconformer.recordings.overlaps import by_times, cut_with_overlap, matched, seam
from fastconformer.recordings.timestamps import Span

RATE = 100


@pytest.mark.parametrize("seconds", [1, 39.99, 40, 40.01, 59, 61.5, 75, 600, 3599, 3601, 7500.5])
def test_pieces_cover_the_recording(seconds):
    n = int(seconds * RATE)
    pieces = cut_with_overlap(n, RATE)
    assert pieces[0][0] == 0 and pieces[-1][1] == n
    if n < 40 * RATE:
        assert pieces == [(0, n)]
    for (_, end), (start, _) in itertools.pairwise(pieces):
        assert end - start == (0 if start % (3600 * RATE) == 0 else RATE)
    lengths = [end - start for start, end in pieces]
    assert max(lengths) <= 40 * RATE
    long_ones = [length >= 30 * RATE for length in lengths]
    assert sum(long_ones) >= len(lengths) - (n // (3600 * RATE) + 1)  # but the last of each hour


def test_the_last_piece_is_as_long_as_may_be():
    # NeMo counts pieces by their steps, so that a length that just fits counts one too many
    assert cut_with_overlap(59 * RATE, RATE) == [(0, 31 * RATE), (30 * RATE, 59 * RATE)]
    assert cut_with_overlap(75 * RATE, RATE) == [(0, 39 * RATE), (38 * RATE, 75 * RATE)]


def test_tokens_join_as_in_nemo():
    cases = json.loads((TESTS / "golden" / "canary_seams.json").read_text())["cases"]
    for left, right, expected in cases:
        stay, go = seam(left, right, 12)
        assert left[:stay] + right[go:] == expected
    assert sum(len(left) + len(right) > len(joined) for left, right, joined in cases) > 50


def test_a_seam_loses_nothing_that_only_one_piece_heard():
    left, right = list(range(100)), list(range(95, 150))
    stay, go = seam(left, right, 12)
    assert left[:stay] + right[go:] == list(range(150))
    assert seam([1, 2, 3], [7, 8, 9], 12) == (3, 0)
    assert seam([1, 2, 3], [3, 4], 0) == (3, 0)  # nothing is shared


def test_words_are_taken_from_their_side_of_the_seam():
    def spans(*words):
        return [Span(text, start, end) for text, start, end in words]

    pieces = [
        spans(("a", 0, 1), ("b", 28.6, 29.2), ("half", 29.4, 30.0)),
        spans(("lf", 29.0, 29.3), ("half", 29.4, 30.1), ("c", 31, 32)),
    ]
    found = [(w.text, w.start) for w in by_times(pieces, [29.5])]
    assert found == [("a", 0), ("b", 28.6), ("half", 29.4), ("c", 31)]


def test_matched_tokens_follow_one_another():
    spans = [[Span("a", 0, 1), Span("b", 1, 2)], [Span("b", 1.5, 2), Span("c", 1.8, 3)]]
    kept = matched(spans, [[1, 2], [2, 3]], [1, 2, 3])
    assert [(s.text, s.start, s.end) for s in kept] == [("a", 0, 1), ("b", 1, 2), ("c", 2, 2)]
    times = np.array([(s.start, s.end) for s in kept]).ravel()
    assert (np.diff(times) >= 0).all()
