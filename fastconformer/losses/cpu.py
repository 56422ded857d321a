"""The transducer lattice on CPU: numba kernels, parallel over rows of logits and over clips.

Three passes, which compute what vectorised.py says: statistics of each row of logits (read once);
the lattice of each clip, backwards for beta and the probability of each arc at its node, forwards
for the occupancies; and the gradient of each row (logits read and gradient written once). The
pieces that these kernels share with the fused loss, and their notes, stand in ../compiled.py.

Importing this module needs numba.

Letters besides the style guide's: R = U+1 rows of a frame, K arcs.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from ..compiled import REORDER, exp_of, kernel, maximum, sum_exp, threads
from .compiled_lattice import arcs_of, occupancies_of_clip


class State(NamedTuple):
    """What the gradient needs beyond the logits; numpy arrays, undefined past a clip's lengths."""

    targets: np.ndarray  # (B, >= U)
    logit_lengths: np.ndarray  # (B,)
    target_lengths: np.ndarray  # (B,)
    blank: int
    n_classes: int  # V + 1
    n_durations: int  # 0 for RNNT
    top: np.ndarray  # (B, T', R), maximum of a row's token logits, of their type
    total: np.ndarray  # (B, T', R), sum of exp(logit - top)
    duration_scores: np.ndarray  # (B, T', R, N), log-probabilities
    blank_occupancy: np.ndarray  # (B, T', R)
    label_occupancy: np.ndarray  # (B, T', R)
    duration_occupancy: np.ndarray  # (B, T', R, N)


def lattice(
    logits, targets, logit_lengths, target_lengths, blank, n_classes, durations, sigma, needs_grad
) -> tuple[Tensor, State | None]:
    """Log-likelihood of each clip; arguments and result as in vectorised.py."""
    flat, strides = _flat(logits)
    shape = tuple(logits.shape[:3])
    n_durations = len(durations or ())
    targets, logit_lengths, target_lengths = (
        x.contiguous().numpy() for x in (targets, logit_lengths, target_lengths)
    )
    top, total = np.empty(shape, flat.dtype), np.empty(shape)
    blank_scores, label_scores = np.empty(shape), np.empty(shape)
    duration_scores = np.zeros((*shape, max(n_durations, 1)))
    log_likelihood = np.empty(shape[0])
    # Without a gradient the kernel leaves these alone, and their size is of no matter.
    small = shape if needs_grad else (1, 1, 1)
    blank_occupancy, label_occupancy = np.empty(small), np.empty(small)
    duration_occupancy = np.zeros((*small, max(n_durations, 1)))
    with threads(logits.numel()) as n_threads:
        _statistics(
            flat, strides, targets, logit_lengths, target_lengths, blank, n_classes, n_durations,
            sigma, top, total, blank_scores, label_scores, duration_scores, n_threads,
        )  # fmt: skip
        _occupancies(
            arcs_of(durations), blank_scores, label_scores, duration_scores,
            logit_lengths, target_lengths, needs_grad, log_likelihood,
            blank_occupancy, label_occupancy, duration_occupancy, n_threads,
        )  # fmt: skip
    state = State(
        targets, logit_lengths, target_lengths, blank, n_classes, n_durations, top, total,
        duration_scores, blank_occupancy, label_occupancy, duration_occupancy,
    )  # fmt: skip
    return torch.from_numpy(log_likelihood), state if needs_grad else None


def gradient(logits, state, grad_losses, fastemit_lambda, clamp) -> Tensor:
    """Gradient of the logits; arguments and result as in vectorised.py."""
    flat, strides = _flat(logits)
    # numpy asks the kernel for huge pages and torch does not: 8 ms instead of 36 for 135 MB.
    grad = np.empty(tuple(logits.shape), flat.dtype)
    with threads(logits.numel()) as n_threads:
        _gradient(
            flat, strides, *state, grad_losses.contiguous().numpy(), fastemit_lambda, clamp,
            grad, n_threads,
        )  # fmt: skip
    return torch.from_numpy(grad).to(logits.dtype)


def _flat(logits) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The numbers as one line of memory, and the steps in it of the first three dimensions."""
    logits = logits.detach()
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    if logits.stride(3) != 1:
        logits = logits.contiguous()
    extent = 1 + sum((n - 1) * s for n, s in zip(logits.shape, logits.stride(), strict=True))
    return logits.as_strided((extent,), (1,)).numpy(), logits.stride()[:3]


@njit(fastmath=REORDER)
def _write_scaled_exp(row, top, weight, limit, scale, out):
    for v in range(row.shape[0]):
        y = weight * exp_of(row[v] - top)
        out[v] = scale * min(y, limit)


@kernel
def _statistics(
    flat, strides, targets, logit_lengths, target_lengths, blank, n_classes, n_durations, sigma,
    top, total, blank_scores, label_scores, duration_scores, n_threads,
):  # fmt: skip
    n_clips, n_frames, _ = top.shape
    # Every n-th frame to one thread: the load is even, however the lengths are sorted.
    for thread in prange(n_threads):
        for job in range(thread, n_clips * n_frames, n_threads):
            b, t = job // n_frames, job % n_frames
            if t >= logit_lengths[b]:
                continue
            for u in range(target_lengths[b] + 1):
                start = b * strides[0] + t * strides[1] + u * strides[2]
                row = flat[start : start + n_classes]
                row_top = maximum(row)
                row_total = np.float64(sum_exp(row, row_top))
                top[b, t, u] = row_top
                total[b, t, u] = row_total
                offset = np.float64(row_top) + math.log(row_total) + sigma
                blank_scores[b, t, u] = row[blank] - offset
                if u < target_lengths[b]:
                    label_scores[b, t, u] = row[targets[b, u]] - offset
                if n_durations > 0:
                    row = flat[start + n_classes : start + n_classes + n_durations]
                    row_top = maximum(row)
                    duration_total = 0.0
                    for i in range(n_durations):
                        duration_total += math.exp(np.float64(row[i] - row_top))
                    offset = np.float64(row_top) + math.log(duration_total)
                    for i in range(n_durations):
                        duration_scores[b, t, u, i] = row[i] - offset


@kernel
def _occupancies(
    arcs, blank_scores, label_scores, duration_scores, logit_lengths, target_lengths, needs_grad,
    log_likelihood, blank_occupancy, label_occupancy, duration_occupancy, n_threads,
):  # fmt: skip
    for thread in prange(n_threads):
        for b in range(thread, len(logit_lengths), n_threads):
            n_frames, n_rows = logit_lengths[b], target_lengths[b] + 1
            of = b if needs_grad else 0  # else all are dummies
            log_likelihood[b] = occupancies_of_clip(
                arcs, blank_scores[b, :n_frames, :n_rows], label_scores[b, :n_frames, :n_rows],
                duration_scores[b, :n_frames, :n_rows], needs_grad,
                blank_occupancy[of, :n_frames, :n_rows], label_occupancy[of, :n_frames, :n_rows],
                duration_occupancy[of, :n_frames, :n_rows],
            )  # fmt: skip


@kernel
def _gradient(
    flat, strides, targets, logit_lengths, target_lengths, blank, n_classes, n_durations,
    top, total, duration_scores, blank_occupancy, label_occupancy, duration_occupancy,
    grad_losses, fastemit_lambda, clamp, grad, n_threads,
):  # fmt: skip
    n_clips, n_frames, n_rows, _ = grad.shape
    number = grad.dtype.type
    for thread in prange(n_threads):
        for job in range(thread, n_clips * n_frames, n_threads):
            b, t = job // n_frames, job % n_frames
            scale = grad_losses[b]
            for u in range(n_rows):
                out = grad[b, t, u]
                if t >= logit_lengths[b] or u > target_lengths[b] or scale == 0.0:
                    out[:] = 0
                    continue
                of_blank = blank_occupancy[b, t, u]
                of_label = label_occupancy[b, t, u] * (1.0 + fastemit_lambda)
                weight = (of_blank + of_label) / total[b, t, u]
                if weight == 0.0:
                    out[:] = 0
                    continue
                start = b * strides[0] + t * strides[1] + u * strides[2]
                row = flat[start : start + n_classes]
                row_top = top[b, t, u]
                _write_scaled_exp(
                    row, row_top, number(weight), number(clamp), number(scale), out[:n_classes]
                )
                y = weight * exp_of(row[blank] - row_top) - of_blank
                out[blank] = scale * min(max(y, -clamp), clamp)
                if u < target_lengths[b]:
                    v = targets[b, u]
                    y = weight * exp_of(row[v] - row_top) - of_label
                    out[v] = scale * min(max(y, -clamp), clamp)
                passing = of_blank + label_occupancy[b, t, u]
                for i in range(n_durations):
                    y = passing * math.exp(duration_scores[b, t, u, i])
                    out[n_classes + i] = scale * (y - duration_occupancy[b, t, u, i])
                out[n_classes + n_durations :] = 0
