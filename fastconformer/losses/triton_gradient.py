"""Gradients on a GPU: of the logits in place, of hidden summed over rows and over frames."""

import bisect
import itertools

import torch
import triton
import triton.language as tl

from .triton_cells import ACTIVATIONS, SEEDS, SIZES, clip_block, clips_of, dropout_of, fold, kept


def gradient(job, tile, cells, weights, fastemit_lambda, clamp, logits):
    n, stride = logits.shape
    block = min(4096, triton.next_power_of_2(job.n_classes))
    _gradient_kernel[(n,)](
        logits, tile.index, job.targets, cells.blank, cells.label, cells.duration, weights,
        stride, job.n_classes, job.blank, cells.duration.shape[1], job.n_rows, *clips_of(job),
        job.n_outputs - job.n_classes, 1.0 + fastemit_lambda, clamp, weights.dtype == torch.float64,
        clip_block(job), block, triton.next_power_of_2(max(1, job.n_outputs - job.n_classes)),
        num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip


def scatter(job, tile, hidden, d_hidden, d_enc, d_pred):
    width = hidden.shape[1]
    (first_clip, first_frame), (last_clip, last_frame) = (
        _clip_and_frame(job, cell) for cell in (tile.first, tile.last)
    )
    lowest = first_clip * job.n_frames + first_frame
    n_frames = last_clip * job.n_frames + last_frame + 1 - lowest
    block_h = min(64, triton.next_power_of_2(width))
    n_blocks = triton.cdiv(width, block_h)
    dense = tile.before is None
    before = tile.index if dense else tile.before  # any tensor where it is not read
    _enc_kernel[(n_frames, n_blocks)](
        hidden, d_hidden, d_enc, tile.index, before, tile.start, len(tile.index), tile.first,
        tile.last, lowest, width, job.n_frames, job.frames, job.rows, job.offsets, *dropout_of(job),
        ACTIVATIONS[job.activation], dense, 32, block_h,
    )  # fmt: skip
    _pred_kernel[((last_clip - first_clip + 1) * job.n_rows, n_blocks)](
        d_hidden, d_pred, before, tile.start, tile.first, tile.last, first_clip, width, job.n_rows,
        job.frames, job.rows, job.offsets, dense, 32, block_h,
    )  # fmt: skip


def _clip_and_frame(job, cell: int) -> tuple[int, int]:
    starts = list(itertools.accumulate((t * r for t, r in job.shapes), initial=0))
    clip = bisect.bisect_right(starts, cell) - 1
    return clip, (cell - starts[clip]) // job.shapes[clip][1]


@triton.jit(do_not_specialize=SIZES)
def _gradient_kernel(
    logits_ptr, index_ptr, targets_ptr, blank_ptr, label_ptr, duration_ptr, weights_ptr,
    stride, n_classes, blank, stride_d, n_rows, offsets_ptr, rows_ptr, n_clips,
    n_durations, EMPHASIS: tl.constexpr, CLAMP: tl.constexpr, EXACT: tl.constexpr,
    CLIPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    i = tl.program_id(0)
    cell = tl.load(index_ptr + i)
    every = tl.arange(0, CLIPS)
    offsets = tl.load(offsets_ptr + every, mask=every < n_clips, other=1 << 62)
    clip = tl.sum((cell >= offsets).to(tl.int32)) - 1
    u = ((cell - tl.load(offsets_ptr + clip)) % tl.load(rows_ptr + clip)).to(tl.int32)
    target = tl.load(targets_ptr + clip * n_rows + u)
    of_blank = tl.load(blank_ptr + cell)
    of_label = tl.load(label_ptr + cell)
    passing = of_blank + of_label
    of_label *= EMPHASIS
    scale = tl.load(weights_ptr + clip)
    # A clip that does not count or has no alignment: not even NaN may come through.
    counts = (scale != 0.0) & (passing != 0.0)
    row = logits_ptr + i.to(tl.int64) * stride
    # The row's own normaliser: that of `scores` is of logits that were not rounded to bfloat16.
    top = tl.full((1,), float("-inf"), kind)
    total = tl.zeros((1,), kind)
    for start in range(0, n_classes, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(row + v, mask=v < n_classes, other=float("-inf")).to(kind)
        top, total = fold(z[None, :], top, total)
    top, total = tl.max(top, 0), tl.max(total, 0)
    factor = (of_blank + of_label) / total
    for start in range(0, n_classes, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(row + v, mask=v < n_classes, other=float("-inf")).to(kind)
        y = factor * tl.exp(z - top)
        y -= tl.where(v == blank, of_blank, 0.0) + tl.where(v == target, of_label, 0.0)
        y = tl.where(y > CLAMP, CLAMP, tl.where(y < -CLAMP, -CLAMP, y))
        y = tl.where(counts, y * scale, 0.0)
        tl.store(row + v, y.to(logits_ptr.dtype.element_ty), mask=v < n_classes)
    if n_durations > 0:
        d = tl.arange(0, BLOCK_D)
        inside = d < n_durations
        z = tl.load(row + n_classes + d, mask=inside, other=float("-inf")).to(kind)
        y = tl.exp(z - tl.max(z, 0))
        y = passing * y / tl.sum(y, 0) - tl.load(duration_ptr + cell * stride_d + d, mask=inside)
        y = tl.where(counts, y * scale, 0.0)
        tl.store(row + n_classes + d, y.to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _row_of(cell, before_ptr, start, first, DENSE: tl.constexpr, inside):
    """A cell's row in the tile, int32 (of both: Triton gives a function one type), and whether it
    is there."""
    if DENSE:
        return (cell - first).to(tl.int32), inside
    row = tl.load(before_ptr + cell, mask=inside, other=0)
    after = tl.load(before_ptr + cell + 1, mask=inside, other=0)
    return (row - start).to(tl.int32), inside & (after > row)


@triton.jit(do_not_specialize=[*SIZES, *SEEDS])
def _enc_kernel(
    hidden_ptr, d_hidden_ptr, d_enc_ptr, index_ptr, before_ptr, start, n, first, last, lowest,
    width, max_frames, frames_ptr, rows_ptr, offsets_ptr, seed_low, seed_high, threshold,
    SCALE: tl.constexpr, ACTIVATION: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Through dropout and activation, in place, and the sum over a frame's rows of the tile."""
    frame = lowest + tl.program_id(0)
    clip, t = frame // max_frames, frame % max_frames
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    n_rows = tl.load(rows_ptr + clip)
    lo = tl.load(offsets_ptr + clip) + t * n_rows
    hi = tl.minimum(lo + n_rows, last + 1)
    lo = tl.maximum(lo, first)
    wide = d_enc_ptr.dtype.element_ty
    if (t < tl.load(frames_ptr + clip)) & (lo < hi):
        if DENSE:
            row_lo, row_hi = (lo - first).to(tl.int32), (hi - first).to(tl.int32)
        else:
            row_lo = tl.load(before_ptr + lo) - start
            row_hi = tl.load(before_ptr + hi) - start
        total = tl.zeros((BLOCK_H,), wide)
        for chunk in range(row_lo, row_hi, BLOCK):
            i = chunk + tl.arange(0, BLOCK)
            inside = (i < row_hi)[:, None] & (h < width)[None, :]
            place = i.to(tl.int64)[:, None] * width + h[None, :]
            y = tl.load(hidden_ptr + place, mask=inside, other=0.0).to(wide)
            grad = tl.load(d_hidden_ptr + place, mask=inside, other=0.0).to(wide) * SCALE
            if ACTIVATION == 0:
                grad = tl.where(y > 0, grad, 0.0)
            elif ACTIVATION == 1:
                grad *= 1 - (y / SCALE) * (y / SCALE)
            else:
                grad *= y / SCALE - (y / SCALE) * (y / SCALE)
            if SCALE != 1.0:
                cell = tl.load(index_ptr + i, mask=i < row_hi, other=0)
                grad = tl.where(kept(cell, h, seed_low, seed_high, threshold), grad, 0.0)
            tl.store(d_hidden_ptr + place, grad.to(d_hidden_ptr.dtype.element_ty), mask=inside)
            total += tl.sum(grad, 0)
        out = d_enc_ptr + frame.to(tl.int64) * width + h
        tl.store(out, tl.load(out, mask=h < width) + total, mask=h < width)


@triton.jit(do_not_specialize=SIZES)
def _pred_kernel(
    d_hidden_ptr, d_pred_ptr, before_ptr, start, first, last, first_clip, width, max_rows,
    frames_ptr, rows_ptr, offsets_ptr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The sum over a prediction state's frames of the tile."""
    clip = first_clip + tl.program_id(0) // max_rows
    u = tl.program_id(0) % max_rows
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    n_rows = tl.load(rows_ptr + clip)
    n_frames = tl.load(frames_ptr + clip)
    offset = tl.load(offsets_ptr + clip)
    lo = ((tl.maximum(first, offset) - offset) // n_rows).to(tl.int32)
    hi = (tl.minimum((last - offset) // n_rows + 1, n_frames)).to(tl.int32)
    wide = d_pred_ptr.dtype.element_ty
    if u < n_rows:
        total = tl.zeros((BLOCK_H,), wide)
        for chunk in range(lo, hi, BLOCK):
            t = chunk + tl.arange(0, BLOCK)
            cell = offset + t * n_rows + u
            there = (t < hi) & (cell >= first) & (cell <= last)
            i, there = _row_of(cell, before_ptr, start, first, DENSE, there)
            inside = there[:, None] & (h < width)[None, :]
            place = i.to(tl.int64)[:, None] * width + h[None, :]
            total += tl.sum(tl.load(d_hidden_ptr + place, mask=inside, other=0.0).to(wide), 0)
        out = d_pred_ptr + (clip * max_rows + u).to(tl.int64) * width + h
        tl.store(out, tl.load(out, mask=h < width) + total, mask=h < width)
