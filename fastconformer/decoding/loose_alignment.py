"""Where the words of a long text were said, in a recording that may hold more or less than it.

A Viterbi alignment of CTC posteriors as in `ctc_alignment`, with two ways around what does not fit.
Between two words a filler may hear any frames (music, another speaker, words that nobody wrote),
and from one filler the path may jump to a later word (a passage that nobody read), at the start
and the end too. A frame's log-probabilities count relative to its best class: a path's score is
what the text costs against what the model hears by itself, and the filler's price is a bound on it.

Pauses are where sentences end: a token costs more in one, a blank within a word too, and a blank
between words a little, unless a sentence ends there. It is this that puts the words of which a weak
model hears little on the right side of a pause.

All states of the text advance together. For T frames and S states time is T x S, and memory about
sqrt(T) x S: scores are kept at the first frame of each block, and a block's moves are computed
again on the way back.

Source of the idea: Kürzinger et al. 2020, CTC-Segmentation of Large Corpora (arXiv:2007.09127),
which aligns a whole text with a free start and end, and judges utterances by their worst window.
"""

import math
from collections.abc import Sequence

import numpy as np

FILLER = 0.7  # nats for each frame of the filler
OPENING = 10.0  # nats to begin one, and to jump
SKIP = 4.0  # nats for each token that is jumped over: less than a token costs that is not there
TOKEN_IN_PAUSE, BLANK_IN_PAUSE, GAP_IN_PAUSE = 8.0, 1.0, 0.5  # nats a frame
_STAY, _STEP, _SKIP, _LEAVE = range(4)


def loose_align(
    losses: np.ndarray,
    words: Sequence[Sequence[int]],
    pauses: np.ndarray,
    ends: np.ndarray,
) -> np.ndarray:
    """The best path of a text through the frames.

    Args:
        losses: (T', V+1) float32, log-probabilities minus each frame's largest, blank last.
        words: ids of each word, one at least; the path may leave the text between words only.
        pauses: (T',) bool, frames in which nobody speaks.
        ends: (N,) bool, words that end a sentence.
    Returns:
        (T',) int64, the state of each frame. 2u + 1: token u of the text; 2u: the blank before it;
        -1 - w: the filler before word w. A word in no frame was jumped over.
    """
    n_frames, blank = len(losses), losses.shape[1] - 1
    tokens = np.array([token for word in words for token in word], dtype=np.int64)
    firsts = np.concatenate(([0], np.cumsum([len(word) for word in words])))
    gates = 2 * firsts  # the blanks around words: there the path goes to a filler, and comes back
    opens, number = gates[:-1] + 1, np.arange(len(gates))  # first token of each word
    n_states = 2 * len(tokens) + 1
    labels = np.full(n_states, blank)
    labels[1::2] = tokens
    no_skip = np.full(n_states, -np.inf, dtype=np.float32)  # a blank between equal tokens stays
    no_skip[3::2][tokens[1:] != tokens[:-1]] = 0.0
    in_pause = np.full(n_states, BLANK_IN_PAUSE, dtype=np.float32)
    in_pause[1::2] = TOKEN_IN_PAUSE
    in_pause[gates] = GAP_IN_PAUSE
    in_pause[gates[np.concatenate(([True], ends))]] = 0.0
    passed = (SKIP * firsts).astype(np.float32)  # what it costs to jump over all words before

    def advance(scores, fillers, first, last, moves=None, origins=None):
        """Frames first..last-1. scores: (S+2,), two of -inf in front; fillers: (N+1,)."""
        for t in range(first, last):
            stay, step = scores[2:], scores[1:-1]
            best = np.maximum(stay, step)
            skip = scores[:-2] + no_skip
            new = np.maximum(best, skip)
            said = np.maximum(stay[gates], step[gates]) - OPENING
            reached = fillers + passed
            furthest = np.maximum.accumulate(reached)
            jumped = np.concatenate(([-np.inf], furthest[:-1])) - passed - OPENING
            filled = np.maximum(np.maximum(fillers, said), jumped)
            if moves is not None:
                move = moves[t - first]
                np.greater(step, stay, out=move, casting="unsafe")
                move[skip > best] = _SKIP
                move[gates[fillers > new[gates]]] = _LEAVE
                move[opens[fillers[:-1] > new[opens]]] = _LEAVE
                # of a filler: another one by its number, or the blank (-1), the token (-2) before
                jump = np.maximum.accumulate(np.where(reached >= furthest, number, 0))
                origin = np.where(filled > said, np.roll(jump, 1), -1 - (step > stay)[gates])
                origins[t - first] = np.where(filled == fillers, number, origin)
            new[gates] = np.maximum(new[gates], fillers)
            new[opens] = np.maximum(new[opens], fillers[:-1])
            new += losses[t][labels]
            if pauses[t]:
                new -= in_pause
            fillers = filled - FILLER
            top = max(new.max(), fillers.max())  # sums stay small, and exact
            scores[2:] = new - top
            fillers -= top
        return scores, fillers

    scores = np.full(n_states + 2, -np.inf, dtype=np.float32)
    scores[2] = 0.0
    fillers = -passed - 2 * OPENING
    fillers[0] = -OPENING
    block = max(64, math.isqrt(n_frames))
    blocks, before = range(0, n_frames, block), []
    for first in blocks:
        before.append((scores.copy(), fillers.copy()))
        scores, fillers = advance(scores, fillers, first, min(first + block, n_frames))
    closing = fillers - (passed[-1] - passed) - np.where(number < len(words), OPENING, 0.0)
    state, best = -1 - int(closing.argmax()), closing.max()
    for last in (n_states - 1, n_states - 2):
        if scores[2 + last] >= best:
            state, best = last, scores[2 + last]
    path = np.zeros(n_frames, dtype=np.int64)
    for first in reversed(blocks):
        count = min(block, n_frames - first)
        moves = np.empty((count, n_states), dtype=np.uint8)
        origins = np.empty((count, len(gates)), dtype=np.int32)
        advance(*before.pop(), first, first + count, moves, origins)
        for t in reversed(range(count)):
            path[first + t] = state
            if state < 0:
                origin = int(origins[t, -1 - state])
                state = -1 - origin if origin >= 0 else int(gates[-1 - state]) + 1 + origin
            elif moves[t, state] == _LEAVE:
                state = -1 - int(np.searchsorted(gates, state - state % 2))
            else:
                state -= int(moves[t, state])
    return path
