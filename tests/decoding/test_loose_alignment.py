"""The loose alignment of long texts: the best of all paths, whatever frames and words there are."""

import itertools

import numpy as np

from fastconformer.decoding import loose_alignment as loose
from fastconformer.decoding.loose_alignment import loose_align


def graph(losses, words, pauses, ends):
    """Start, moves, frames' scores and end of every state by the page's rules, fillers last."""
    tokens = [token for word in words for token in word]
    firsts = np.cumsum([0, *map(len, words)])
    n_states, n_words = 2 * len(tokens) + 1, len(words)
    gate_of = {2 * first: w for w, first in enumerate(firsts)}
    size = n_states + n_words + 1
    moves = np.full((size, size), -np.inf)
    for s in range(n_states):
        moves[s, s : s + 2] = 0
        if s % 2 and s + 2 < n_states:
            moves[s, s + 2] = 0 if tokens[s // 2] != tokens[s // 2 + 1] else -np.inf
    moves[n_states - 1, n_states] = -np.inf
    start, end = np.full(size, -np.inf), np.full(size, -np.inf)
    start[0], end[n_states - 2 : n_states] = 0, 0
    for w in range(n_words + 1):
        filler, gate = n_states + w, 2 * firsts[w]
        moves[filler, filler], moves[filler, gate] = 0, 0
        moves[gate, filler] = -loose.OPENING
        if w:
            moves[gate - 1, filler] = -loose.OPENING
        if w < n_words:
            moves[filler, gate + 1] = 0
        for v in range(w + 1, n_words + 1):
            jump = loose.OPENING + loose.SKIP * (firsts[v] - firsts[w])
            moves[filler, n_states + v] = -jump
        jump = loose.OPENING + loose.SKIP * firsts[w]
        start[filler] = -loose.OPENING - (jump if w else 0)
        jump = loose.OPENING + loose.SKIP * (firsts[-1] - firsts[w])
        end[filler] = -jump if w < n_words else 0
    scores = np.full((len(losses), size), -loose.FILLER)
    for t, row in enumerate(losses):
        for s in range(n_states):
            cost = loose.TOKEN_IN_PAUSE if s % 2 else loose.BLANK_IN_PAUSE
            if s in gate_of:
                w = gate_of[s]
                cost = loose.GAP_IN_PAUSE if w and not ends[w - 1] else 0
            scores[t, s] = row[tokens[s // 2] if s % 2 else -1] - (cost if pauses[t] else 0)
    return start, moves, scores, end


def test_the_path_is_the_best_of_all():
    rng = np.random.default_rng(0)
    fillers = jumps = 0
    for _ in range(50):
        n_frames = int(rng.integers(1, 60))
        words = [list(rng.integers(0, 5, rng.integers(1, 4))) for _ in range(rng.integers(1, 6))]
        losses = np.log(rng.dirichlet(np.full(6, 0.15), n_frames) + 1e-6).astype(np.float32)
        losses -= losses.max(1, keepdims=True)
        pauses, ends = rng.random(n_frames) < 0.3, rng.random(len(words)) < 0.4
        path = loose_align(losses, words, pauses, ends)
        start, moves, scores, end = graph(losses.astype(np.float64), words, pauses, ends)
        best = start
        for row in scores:
            best = (best[:, None] + moves).max(0) + row
        n_states = scores.shape[1] - len(words) - 1
        states = [n_states - 1 - s if s < 0 else s for s in path]
        mine = (start + moves[:, states[0]]).max() + end[states[-1]]
        mine += sum(moves[a, b] for a, b in itertools.pairwise(states))
        mine += scores[np.arange(n_frames), states].sum()
        assert abs(mine - (best + end).max()) < 1e-3
        fillers += (path < 0).any()
        jumps += len({s for s in path if s >= 0 and s % 2}) < sum(map(len, words))
    assert fillers > 10 and jumps > 4


def test_a_long_path_is_followed_block_by_block():
    """Many blocks of frames: a text, noise in the middle, a passage that nobody reads."""
    rng = np.random.default_rng(1)
    said = rng.integers(0, 20, 400)
    frames = np.full((3000, 31), -8.0, dtype=np.float32)
    frames[:, -1] = 0
    at = np.concatenate((np.arange(200) * 5 + 20, np.arange(200) * 5 + 1900))
    frames[at, said], frames[at, -1] = 0, -8
    noise = np.arange(1100, 1800, 4)
    frames[noise, rng.integers(20, 30, len(noise))], frames[noise, -1] = 0, -8
    unread = rng.integers(0, 20, 60)
    text = np.concatenate((said[:200], unread, said[200:]))
    path = loose_align(frames, text[:, None].tolist(), np.zeros(3000, bool), np.zeros(460, bool))
    found = {int(s) // 2: t for t, s in enumerate(path) if s >= 0 and s % 2}
    places = [*range(200), *range(260, 460)]
    assert [found[place] for place in places] == at.tolist()
    assert len(found) == 400 and (path[1150:1750] < 0).all()
