"""The tiles of the fused loss on CPU: numba kernels between the matrix products.

The functions are those of fused_vectorised.py. Rows of hidden and of logits are read and written
once, in loops that LLVM vectorises; bfloat16, which numba does not know, passes as its 16 bits. The
lattice is that of cpu.py, on packed cells. What is summed over cells is summed in their order
whatever the number of threads, which share the channels and not the cells.

Importing this module needs numba. Kernels compile at their first call and are cached on disk.
"""

import math

import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import overload
from torch import Tensor

from ..compiled import REORDER, array, exp_of, kernel, maximum, narrow, sum_exp, threads, wide
from .compiled_lattice import arcs_of, occupancies_of_clip
from .fused_vectorised import dropout_threshold, scores_write_logits  # noqa: F401
from .products import product

_ACTIVATIONS = {"relu": 0, "tanh": 1, "sigmoid": 2}


def hidden(job, tile, dtype=None) -> Tensor:
    out = torch.empty((len(tile.index), job.enc.shape[1]), dtype=dtype or job.weight.dtype)
    with threads(out.numel()) as n_threads:
        _hidden(
            array(job.enc), array(job.pred), *_place(job, tile), _ACTIVATIONS[job.activation],
            *_dropout(job), array(out), n_threads,
        )  # fmt: skip
    return out


def scores(job, tile, cells) -> Tensor:
    logits = product(hidden(job, tile), job.weight, job.bias)
    with threads(logits.numel()) as n_threads:
        _scores(
            array(logits), *_place(job, tile), job.targets.numpy(), job.blank, job.n_classes,
            job.sigma, *(x.numpy() for x in cells), n_threads,
        )  # fmt: skip
    return logits


def lattice(job, cells, needs_grad) -> Tensor:
    log_likelihood = torch.empty(len(job.frames), dtype=torch.float64)
    # One class of no score where RNNT has none.
    duration = cells.duration if job.durations is not None else cells.top.new_zeros(job.n_cells, 1)
    with threads(100 * job.n_cells) as n_threads:
        _lattice(
            arcs_of(job.durations), job.frames.numpy(), job.rows.numpy(), job.offsets.numpy(),
            cells.blank.numpy(), cells.label.numpy(), duration.numpy(), needs_grad,
            log_likelihood.numpy(), n_threads,
        )  # fmt: skip
    return log_likelihood


def gradient(job, tile, cells, weights, fastemit_lambda, clamp, logits):
    with threads(logits.numel()) as n_threads:
        _gradient(
            array(logits), *_place(job, tile), job.targets.numpy(), job.blank, job.n_classes,
            *(x.numpy() for x in cells), weights.numpy(), fastemit_lambda, clamp, n_threads,
        )  # fmt: skip


def scatter(job, tile, hidden, d_hidden, d_enc, d_pred):
    with threads(hidden.numel()) as n_threads:
        _scatter(
            array(hidden), array(d_hidden.contiguous()), *_place(job, tile),
            _ACTIVATIONS[job.activation], *_dropout(job), d_enc.numpy(), d_pred.numpy(), n_threads,
        )  # fmt: skip


def _place(job, tile):
    return tile.index.numpy(), job.offsets.numpy(), job.rows.numpy(), job.n_frames, job.n_rows


def _dropout(job):
    threshold = dropout_threshold(job.dropout)
    scale = 1.0 / (1.0 - job.dropout)
    return np.uint32(job.seed & 0xFFFFFFFF), np.uint32(job.seed >> 32), threshold, scale


def _floats(row, scratch):
    """The row as floats: itself, or read into scratch."""
    raise NotImplementedError


@overload(_floats)
def _floats_of_type(row, scratch):
    if row.dtype == types.uint16:

        def floats(row, scratch):
            for v in range(row.shape[0]):
                scratch[v] = wide(row[v])
            return scratch[: row.shape[0]]

    else:

        def floats(row, scratch):
            return row

    return floats


def _written(floats, row):
    """Brings what was computed in `_floats(row)` back to the row."""
    raise NotImplementedError


@overload(_written)
def _written_of_type(floats, row):
    if row.dtype == types.uint16:

        def written(floats, row):
            for v in range(row.shape[0]):
                row[v] = narrow(floats[v], row)

    else:

        def written(floats, row):
            pass

    return written


@njit
def _clip_of(cell, offsets):
    b = len(offsets) - 1
    while offsets[b] > cell:
        b -= 1
    return b


@njit
def _mix(x):
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@njit
def _kept(key, channel, threshold):
    channel = np.uint32(np.uint32(channel) * np.uint32(0x9E3779B9))
    return _mix(np.uint32(key + channel)) >= threshold


@njit
def _key(cell, seed_low, seed_high):
    return np.uint32(_mix(np.uint32(np.uint32(cell) ^ seed_low)) ^ seed_high)


@njit(fastmath={"contract"})
def _tanh(x):
    e = exp_of(-2 * abs(x))
    y = (1 - e) / (1 + e)
    return y if x >= 0 else -y


@njit(fastmath={"contract"})
def _sigmoid(x):
    e = exp_of(-abs(x))
    y = 1 / (1 + e)
    return y if x >= 0 else e * y


@kernel
def _hidden(
    enc, pred, index, offsets, rows, n_frames, n_rows, activation, seed_low, seed_high, threshold,
    scale, out, n_threads,
):  # fmt: skip
    width = out.shape[1]
    for thread in prange(n_threads):
        for i in range(thread, len(index), n_threads):
            b = _clip_of(index[i], offsets)
            place = index[i] - offsets[b]
            x = enc[b * n_frames + place // rows[b]]
            y = pred[b * n_rows + place % rows[b]]
            _activate(x, y, activation, out[i])
            if threshold > 0:
                key = _key(index[i], seed_low, seed_high)
                for h in range(width):
                    kept = wide(out[i, h]) * scale if _kept(key, h, threshold) else 0.0
                    out[i, h] = narrow(kept, out)


@njit
def _activate(x, y, activation, out):
    if activation == 0:
        for h in range(len(out)):
            total = wide(x[h]) + wide(y[h])
            out[h] = narrow(total * 0 if total < 0 else total, out)  # NaN stays
    elif activation == 1:
        for h in range(len(out)):
            out[h] = narrow(_tanh(wide(x[h]) + wide(y[h])), out)
    else:
        for h in range(len(out)):
            out[h] = narrow(_sigmoid(wide(x[h]) + wide(y[h])), out)


@kernel
def _scores(
    logits, index, offsets, rows, n_frames, n_rows, targets, blank, n_classes, sigma,
    top, total, blank_scores, label_scores, duration_scores, n_threads,
):  # fmt: skip
    n_durations = logits.shape[1] - n_classes
    for thread in prange(n_threads):
        scratch = np.empty(logits.shape[1], top.dtype)
        for i in range(thread, len(index), n_threads):
            cell = index[i]
            b = _clip_of(cell, offsets)
            u = (cell - offsets[b]) % rows[b]
            row = _floats(logits[i], scratch)
            tokens = row[:n_classes]
            row_top = maximum(tokens)
            row_total = np.float64(sum_exp(tokens, row_top))
            top[cell] = row_top
            total[cell] = row_total
            offset = math.log(row_total) + sigma
            blank_scores[cell] = np.float64(row[blank] - row_top) - offset
            label_scores[cell] = np.float64(row[targets[b, u]] - row_top) - offset
            if n_durations > 0:
                row_top = maximum(row[n_classes:])
                duration_total = 0.0
                for d in range(n_durations):
                    duration_total += math.exp(np.float64(row[n_classes + d] - row_top))
                for d in range(n_durations):
                    score = np.float64(row[n_classes + d] - row_top)
                    duration_scores[cell, d] = score - math.log(duration_total)


@kernel
def _lattice(
    arcs, frames, rows, offsets, blank, label, duration, needs_grad, log_likelihood, n_threads
):
    for thread in prange(n_threads):
        for b in range(thread, len(frames), n_threads):
            first, last = offsets[b], offsets[b] + frames[b] * rows[b]
            of_blank = blank[first:last].reshape((frames[b], rows[b]))
            of_label = label[first:last].reshape((frames[b], rows[b]))
            of_duration = duration[first:last].reshape((frames[b], rows[b], duration.shape[1]))
            log_likelihood[b] = occupancies_of_clip(
                arcs, of_blank, of_label, of_duration, needs_grad, of_blank, of_label, of_duration
            )


@njit(fastmath=REORDER)
def _scale_exp(row, top, weight, limit, scale):
    # In place by one name: LLVM would not vectorise for two that may overlap.
    for v in range(row.shape[0]):
        y = weight * exp_of(row[v] - top)
        row[v] = scale * min(y, limit)


@kernel
def _gradient(
    logits, index, offsets, rows, n_frames, n_rows, targets, blank, n_classes,
    top, total, blank_occupancy, label_occupancy, duration_occupancy, weights, fastemit_lambda,
    clamp, n_threads,
):  # fmt: skip
    n_durations = logits.shape[1] - n_classes
    number = top.dtype.type
    for thread in prange(n_threads):
        scratch = np.empty(logits.shape[1], top.dtype)
        for i in range(thread, len(index), n_threads):
            cell = index[i]
            b = _clip_of(cell, offsets)
            u = (cell - offsets[b]) % rows[b]
            scale = np.float64(weights[b])
            of_blank = np.float64(blank_occupancy[cell])
            passing = of_blank + np.float64(label_occupancy[cell])
            if scale == 0.0 or passing == 0.0:
                logits[i] = 0
                continue
            of_label = np.float64(label_occupancy[cell]) * (1.0 + fastemit_lambda)
            weight = (of_blank + of_label) / np.float64(total[cell])
            row = _floats(logits[i], scratch)
            v = targets[b, u]
            y_blank = weight * exp_of(row[blank] - top[cell]) - of_blank
            y_label = weight * exp_of(row[v] - top[cell]) - of_label
            _scale_exp(row[:n_classes], top[cell], number(weight), number(clamp), number(scale))
            if of_label != 0.0:
                row[v] = scale * min(max(y_label, -clamp), clamp)
            row[blank] = scale * min(max(y_blank, -clamp), clamp)
            if n_durations > 0:
                row_top = maximum(row[n_classes:])
                duration_total = 0.0
                for d in range(n_durations):
                    duration_total += math.exp(np.float64(row[n_classes + d] - row_top))
                for d in range(n_durations):
                    y = math.exp(np.float64(row[n_classes + d] - row_top)) / duration_total
                    y = passing * y - np.float64(duration_occupancy[cell, d])
                    row[n_classes + d] = scale * y
            _written(row, logits[i])


@kernel
def _scatter(
    hidden, d_hidden, index, offsets, rows, n_frames, n_rows, activation, seed_low, seed_high,
    threshold, scale, d_enc, d_pred, n_threads,
):  # fmt: skip
    width = hidden.shape[1]
    for thread in prange(n_threads):
        first, last = width * thread // n_threads, width * (thread + 1) // n_threads
        grad = np.empty(last - first, d_enc.dtype)
        for i in range(len(index)):
            b = _clip_of(index[i], offsets)
            place = index[i] - offsets[b]
            _differentiate(hidden[i, first:last], d_hidden[i, first:last], activation, scale, grad)
            if threshold > 0:
                key = _key(index[i], seed_low, seed_high)
                for h in range(first, last):
                    if not _kept(key, h, threshold):
                        grad[h - first] = 0.0
            _add(grad, d_enc[b * n_frames + place // rows[b], first:last])
            _add(grad, d_pred[b * n_rows + place % rows[b], first:last])


@njit
def _differentiate(value, slope, activation, scale, out):
    """d activation / d input from the activation's value times `scale`, times the slope there."""
    scale = out.dtype.type(scale)
    if activation == 0:
        for h in range(len(out)):
            out[h] = wide(slope[h]) * scale if wide(value[h]) > 0 else wide(slope[h]) * 0
    elif activation == 1:
        for h in range(len(out)):
            y = wide(value[h]) / scale
            out[h] = wide(slope[h]) * scale * (1 - y * y)
    else:
        for h in range(len(out)):
            y = wide(value[h]) / scale
            out[h] = wide(slope[h]) * scale * (y - y * y)


@njit
def _add(x, to):
    for h in range(len(x)):
        to[h] += x[h]
