"""The lattice of one clip for numba kernels, float64: it is small beside the logits."""

import math

import numpy as np
from numba import njit


def arcs_of(durations) -> np.ndarray:
    """Each arc's class of duration, frames and tokens, (K, 3)."""
    if durations is None:
        return np.array([(0, 0, 1), (0, 1, 0)], np.int64)
    arcs = [(i, d, 1) for i, d in enumerate(durations)]
    arcs += [(i, d, 0) for i, d in enumerate(durations) if d > 0]
    return np.array(arcs, np.int64)


@njit(error_model="numpy")
def occupancies_of_clip(
    arcs, blank_scores, label_scores, duration_scores, needs_grad,
    blank_occupancy, label_occupancy, duration_occupancy,
):  # fmt: skip
    """Log-likelihood of one clip of (T', R) nodes and, if needed, the occupancies of its arcs,
    which may be written over the scores."""
    n_frames, n_rows = blank_scores.shape
    n_arcs = len(arcs)
    beta = np.empty((n_frames, n_rows))
    reach = np.empty(n_arcs)
    for t in range(n_frames - 1, -1, -1):
        for u in range(n_rows - 1, -1, -1):
            best = _reach(t, u, arcs, blank_scores, label_scores, duration_scores, beta, reach)
            if best == -np.inf:
                beta[t, u] = -np.inf
                continue
            sum_exp = 0.0
            for k in range(n_arcs):
                sum_exp += math.exp(reach[k] - best)
            beta[t, u] = best + math.log(sum_exp)
    log_likelihood = beta[0, 0]
    if not needs_grad:
        return log_likelihood

    passing = np.zeros((n_frames, n_rows))
    passing[0, 0] = 1.0
    for t in range(n_frames):
        for u in range(n_rows):
            of_blank = 0.0
            of_label = 0.0
            best = -np.inf
            if beta[t, u] != -np.inf and passing[t, u] != 0.0:
                best = _reach(t, u, arcs, blank_scores, label_scores, duration_scores, beta, reach)
            duration_occupancy[t, u] = 0.0
            if best != -np.inf:
                for k in range(n_arcs):
                    flow = passing[t, u] * math.exp(reach[k] - beta[t, u])
                    if arcs[k, 2]:
                        of_label += flow
                    else:
                        of_blank += flow
                    duration_occupancy[t, u, arcs[k, 0]] += flow
                    end_t, end_u = t + arcs[k, 1], u + arcs[k, 2]
                    if end_t < n_frames and end_u < n_rows:
                        passing[end_t, end_u] += flow
            blank_occupancy[t, u] = of_blank
            label_occupancy[t, u] = of_label
    return log_likelihood


@njit(error_model="numpy")
def _reach(t, u, arcs, blank_scores, label_scores, duration_scores, beta, reach):
    """Score of each arc of a node with all that follows, into `reach`; returns the best."""
    n_frames, n_rows = beta.shape
    best = -np.inf
    for k in range(len(arcs)):
        end_t, end_u = t + arcs[k, 1], u + arcs[k, 2]
        if end_t < n_frames and end_u < n_rows:
            score = beta[end_t, end_u]
        elif end_t > n_frames or u < n_rows - 1 or arcs[k, 2]:
            score = -np.inf  # only the last blank lands on T'
        else:
            score = 0.0
        if score != -np.inf:
            score += label_scores[t, u] if arcs[k, 2] else blank_scores[t, u]
            score += duration_scores[t, u, arcs[k, 0]]
        reach[k] = score
        if score > best or math.isnan(score):
            best = score
    return best
