"""Where each token of a known text was said: the best CTC alignment (Viterbi).

States are the text's tokens with blanks around and between them, S = 2U + 1; all of them advance
together, one frame at a time. Memory for T frames is about sqrt(T) x S: alignment scores are kept
at the first frame of each block, and a block's back-pointers (one byte) are computed again when the
best path is followed back through it.
"""

import math

import numpy as np
import torch

from .confidence import Confidence
from .hypothesis import Hypothesis

_ONE_BLOCK = 1 << 27  # bytes of back-pointers up to which nothing is computed twice


@torch.no_grad()
def ctc_align(
    log_probs: torch.Tensor,
    lengths: torch.Tensor,
    tokens: list[list[int]],
    confidence: Confidence | None = None,
) -> list[Hypothesis]:
    """The most probable alignment of `tokens` to each clip.

    Args:
        log_probs: (B, T', V+1), blank last; lengths: (B,) in frames; tokens: ids of each clip.
    Returns:
        Hypotheses: frames are where each token's run begins, durations how long it is, the score
        is the path's, blanks included; -inf where the tokens do not fit into the frames.
    """
    batch, n_classes = len(tokens), log_probs.shape[-1]
    blank, device = n_classes - 1, log_probs.device
    lengths_list = lengths.tolist()
    n_frames = max(lengths_list, default=0)
    n_states = 2 * max(map(len, tokens), default=0) + 1
    labels = np.full((batch, n_states), blank, dtype=np.int64)
    for row, ids in zip(labels, tokens):
        row[1 : 2 * len(ids) : 2] = ids
    skips = np.zeros(
        (batch, n_states), dtype=bool
    )  # a blank between different tokens may be left out
    skips[:, 3::2] = labels[:, 3::2] != labels[:, 1:-2:2]
    last_states = np.array([2 * len(ids) for ids in tokens], dtype=np.int64)
    # a path at state s of frame t must still reach the end: one clip's states below this cannot
    behind = min((s + 1 - 2 * t for s, t in zip(last_states, lengths_list)), default=0)

    labels = torch.from_numpy(labels).to(device)
    skip_cost = torch.zeros(batch, n_states, dtype=torch.float32, device=device)
    skip_cost.masked_fill_(~torch.from_numpy(skips).to(device), -torch.inf)
    lengths = lengths.to(device)

    def advance(scores, first, last, moves=None):
        """Frames first..last-1 from the scores before them, (B, S+2), in place. Two columns of
        -inf on the left stand for states that are none."""
        for t in range(first, last):
            low, high = max(0, behind + 2 * t - 1), min(n_states, 2 * t + 2)
            if low >= high:
                low = high - 1
            stay = scores[:, low + 2 : high + 2]
            best = torch.maximum(stay, step := scores[:, low + 1 : high + 1])
            skip = scores[:, low:high] + skip_cost[:, low:high]
            new = torch.maximum(best, skip) + log_probs[:, t].float().gather(1, labels[:, low:high])
            active = (t < lengths)[:, None]
            if moves is not None:
                move = torch.where(skip > best, 2, (step > stay).byte()).byte()
                moves[t - first, :, low:high] = torch.where(active, move, 0)
            stay.copy_(torch.where(active, new, stay))
        return scores

    start = torch.full((batch, n_states + 2), -torch.inf, dtype=torch.float32, device=device)
    start[:, 2] = 0.0  # before the first frame: state 0, from which frame 0 stays or steps
    block = n_frames
    if batch * n_frames * n_states > _ONE_BLOCK:
        block = max(256, math.isqrt(n_frames))
    firsts = list(range(0, n_frames, max(block, 1)))
    checkpoints, scores = [], start
    for first in firsts:
        checkpoints.append(scores.clone())
        if len(firsts) > 1:
            scores = advance(scores, first, min(first + block, n_frames))
    path = np.zeros((n_frames, batch), dtype=np.int64)
    rows, state, totals = (
        np.arange(batch),
        last_states,
        [-math.inf if ids else 0.0 for ids in tokens],
    )
    for first in reversed(firsts):
        last = min(first + block, n_frames)
        moves = torch.zeros(last - first, batch, n_states, dtype=torch.uint8, device=device)
        scores = advance(checkpoints.pop(), first, last, moves)
        if last == n_frames:
            ends = scores[:, 2:].cpu().numpy()
            on_token = np.maximum(last_states - 1, 0)
            state = np.where(ends[rows, on_token] > ends[rows, last_states], on_token, last_states)
            totals = ends[rows, state].tolist()
        moves = moves.cpu().numpy()
        for t in range(last - 1, first - 1, -1):
            path[t] = state
            state = state - moves[t - first, rows, state]
    return [
        _hypothesis(ids, path[:n, b], totals[b], log_probs[b, :n], confidence)
        for b, (ids, n) in enumerate(zip(tokens, lengths_list))
    ]


def _hypothesis(ids, path, score, log_probs, confidence) -> Hypothesis:
    if score == -math.inf:
        return Hypothesis(list(ids), [], [], score)
    spoken = path % 2 == 1
    which = path[spoken] // 2
    durations = np.bincount(which, minlength=len(ids))
    frames = spoken.nonzero()[0][np.cumsum(durations) - durations] if len(which) else which
    sure = None
    if confidence is not None:
        of_frame = confidence.of(log_probs[torch.from_numpy(spoken).to(log_probs.device)],
                                 log_probs.shape[-1]).tolist()  # fmt: skip
        ends = np.cumsum(durations)
        sure = [
            confidence.aggregate(of_frame[end - n : end]) for end, n in zip(ends, durations) if n
        ]
    return Hypothesis(list(ids), frames.tolist(), durations.tolist(), score, sure)
