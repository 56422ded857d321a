"""The transducer lattice on CPU: numba kernels, parallel over rows of logits and over clips.

Three passes, which compute what vectorised.py says: statistics of each row of logits (read once);
the lattice of each clip, backwards for beta and the probability of each arc at its node, forwards
for the occupancies; and the gradient of each row (logits read and gradient written once). The
passes over logits are loops that LLVM vectorises, with an exponential of our own in float32, as
libm's would be a call for each number. The lattice is float64, being small beside the logits.

Importing this module needs numba. Kernels compile at their first call, for some seconds, and are
cached on disk where that is possible. They use at most as many threads as torch.

Letters besides the style guide's: R = U+1 rows of a frame, K arcs.
"""

import contextlib
import math
import threading
from typing import NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload
from torch import Tensor

# Two Python threads inside parallel kernels at once abort the process under numba's own pool.
_one_at_a_time = threading.Lock()

# About 0.1 ms of work; waking a second thread for less costs more than it saves.
_LOGITS_OF_A_THREAD = 100_000

# Not "nnan" and "ninf": a NaN has to come through to the loss, and -inf is a legal logit.
_REORDER = {"reassoc", "nsz", "contract"}


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
    with _threads(logits.numel()) as n_threads:
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
    with _threads(logits.numel()) as n_threads:
        _gradient(
            flat, strides, *state, grad_losses.contiguous().numpy(), fastemit_lambda, clamp,
            grad, n_threads,
        )  # fmt: skip
    return torch.from_numpy(grad).to(logits.dtype)


def arcs_of(durations) -> np.ndarray:
    """Each arc's class of duration, frames and tokens, (K, 3)."""
    if durations is None:
        return np.array([(0, 0, 1), (0, 1, 0)], np.int64)
    arcs = [(i, d, 1) for i, d in enumerate(durations)]
    arcs += [(i, d, 0) for i, d in enumerate(durations) if d > 0]
    return np.array(arcs, np.int64)


def _flat(logits) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The numbers as one line of memory, and the steps in it of the first three dimensions."""
    logits = logits.detach()
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    if logits.stride(3) != 1:
        logits = logits.contiguous()
    extent = 1 + sum((n - 1) * s for n, s in zip(logits.shape, logits.stride(), strict=True))
    return logits.as_strided((extent,), (1,)).numpy(), logits.stride()[:3]


@contextlib.contextmanager
def _threads(n_logits):
    """Exclusive use of numba's pool, with at most torch's number of threads; gives their number."""
    of_torch = torch.get_num_threads()
    wanted = min(of_torch, numba.config.NUMBA_NUM_THREADS, 1 + n_logits // _LOGITS_OF_A_THREAD)
    with _one_at_a_time:
        of_numba = numba.get_num_threads()
        try:
            numba.set_num_threads(wanted)
            yield wanted
        finally:
            numba.set_num_threads(of_numba)
            # Starting its OpenMP pool, numba sets the number of threads for torch's OpenMP as well.
            if torch.get_num_threads() != of_torch:
                torch.set_num_threads(of_torch)


def _kernel(function):
    try:
        return njit(parallel=True, nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written
        return njit(parallel=True, nogil=True, error_model="numpy")(function)


@intrinsic
def _float32_of_bits(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693145751953125)  # 16 bits: times an exponent it is exact
_LN2_LOW = np.float32(1.4286068203094172e-06)
_C7, _C6, _C5, _C4 = (np.float32(1 / math.factorial(n)) for n in (7, 6, 5, 4))
_C3, _C2 = np.float32(1 / 6), np.float32(0.5)
_ONE, _HALF, _ZERO = np.float32(1.0), np.float32(0.5), np.float32(0.0)
_LEAST = np.float32(-87.0)  # exp of it is just above the least normal number
_BIAS, _MANTISSA_BITS = np.int32(127), np.int32(23)


@njit(fastmath={"contract"})
def _exp_float32(x):
    """exp(x) for x <= 0, within 2e-7 of it; 0 below -87, NaN for NaN. No calls, no branches."""
    bounded = max(x, _LEAST)  # NaN stays NaN, in this order
    exponent = np.int32(bounded * _LOG2_E - _HALF)  # to nearest, as the argument is not positive
    r = bounded - np.float32(exponent) * _LN2_HIGH - np.float32(exponent) * _LN2_LOW
    y = _C4 + r * (_C5 + r * (_C6 + r * _C7))
    y = _ONE + r * (_ONE + r * (_C2 + r * (_C3 + r * y)))
    y = y * _float32_of_bits(np.int32((exponent + _BIAS) << _MANTISSA_BITS))
    return _ZERO if x < _LEAST else y


def _exp(x):
    """exp for x <= 0 of either type, inside kernels."""
    raise NotImplementedError


@overload(_exp)
def _exp_of_type(x):
    if x == types.float32:
        return lambda x: _exp_float32(x)
    return lambda x: math.exp(x)


@njit
def _maximum(row):
    """The largest number; a NaN may be passed over, and shows in the sum that follows."""
    # LLVM keeps the order of comparisons of floats; four chains of them run side by side.
    n = row.shape[0] // 4
    a = b = c = d = row[0]
    for v in range(n):
        a = max(a, row[v])
        b = max(b, row[v + n])
        c = max(c, row[v + 2 * n])
        d = max(d, row[v + 3 * n])
    for v in range(4 * n, row.shape[0]):
        a = max(a, row[v])
    return max(max(a, b), max(c, d))


@njit(fastmath=_REORDER)
def _sum_exp(row, top):
    total = 0.0  # float64: sums over the classes err less than their terms
    for v in range(row.shape[0]):
        total += _exp(row[v] - top)
    return total


@njit(fastmath=_REORDER)
def _write_scaled_exp(row, top, weight, limit, scale, out):
    for v in range(row.shape[0]):
        y = weight * _exp(row[v] - top)
        out[v] = scale * min(y, limit)


@_kernel
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
                row_top = _maximum(row)
                row_total = np.float64(_sum_exp(row, row_top))
                top[b, t, u] = row_top
                total[b, t, u] = row_total
                offset = np.float64(row_top) + math.log(row_total) + sigma
                blank_scores[b, t, u] = row[blank] - offset
                if u < target_lengths[b]:
                    label_scores[b, t, u] = row[targets[b, u]] - offset
                if n_durations > 0:
                    row = flat[start + n_classes : start + n_classes + n_durations]
                    row_top = _maximum(row)
                    duration_total = 0.0
                    for i in range(n_durations):
                        duration_total += math.exp(np.float64(row[i] - row_top))
                    offset = np.float64(row_top) + math.log(duration_total)
                    for i in range(n_durations):
                        duration_scores[b, t, u, i] = row[i] - offset


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


@_kernel
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


@_kernel
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
                y = weight * _exp(row[blank] - row_top) - of_blank
                out[blank] = scale * min(max(y, -clamp), clamp)
                if u < target_lengths[b]:
                    v = targets[b, u]
                    y = weight * _exp(row[v] - row_top) - of_label
                    out[v] = scale * min(max(y, -clamp), clamp)
                passing = of_blank + label_occupancy[b, t, u]
                for i in range(n_durations):
                    y = passing * math.exp(duration_scores[b, t, u, i])
                    out[n_classes + i] = scale * (y - duration_occupancy[b, t, u, i])
                out[n_classes + n_durations :] = 0
