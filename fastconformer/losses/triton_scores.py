"""Hidden rows and the cells' scores on a GPU, without logits in memory.

Each program multiplies its rows of hidden with the output layer, some columns at a time, and folds
each block of logits into a running maximum and sum of exponentials (online softmax; Milakov and
Gimelshein 2018, arXiv:1805.02867). The columns beyond the tokens (blank, durations) are one narrow
block, so that the wide ones are full: 1024 or 8192.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..networks.triton_attention import precision
from . import fused_vectorised
from .triton_cells import (
    ACTIVATIONS,
    SEEDS,
    SIZES,
    clip_block,
    clip_of,
    clips_of,
    dropout_of,
    fold,
    kept,
    wide,
)


def hidden(job, tile, dtype=None) -> Tensor:
    n, width = len(tile.index), job.enc.shape[1]
    out = job.weight.new_empty((n, width), dtype=dtype or job.weight.dtype)
    block_m, block_h = 32, min(128, triton.next_power_of_2(width))
    _hidden_kernel[(triton.cdiv(n, block_m), triton.cdiv(width, block_h))](
        job.enc, job.pred, out, tile.index, n, width, job.n_frames, job.n_rows, *clips_of(job),
        *dropout_of(job), ACTIVATIONS[job.activation], clip_block(job),
        block_m, block_h,
    )  # fmt: skip
    return out


def scores_write_logits(job) -> bool:
    return job.weight.dtype == torch.float64


def scores(job, tile, cells):
    if scores_write_logits(job):  # for gradcheck; tensor cores have no such product
        return fused_vectorised.scores(job, tile, cells)
    rows, weight, bias = hidden(job, tile), job.weight, job.bias
    n, width = rows.shape
    n_outputs = job.n_outputs
    assert max(n, n_outputs) * width < 1 << 31, "a tile's offsets are 32 bits wide"
    # Blank and durations are the tail; blank in front is one of the wide blocks' columns.
    n_main = job.n_classes - 1 if job.blank == job.n_classes - 1 else job.n_classes
    half = rows.dtype != torch.float32
    block_m, block_v, block_k = (128, 128, 64) if half else (64, 64, 32)
    interpreted = not isinstance(_scores_kernel, triton.JITFunction)
    if interpreted:  # small, to see the loops turn; no bfloat16 products
        block_m, block_v, block_k = 16, 16, 16
        rows, weight, bias = rows.float(), weight.float(), bias.float()
    _scores_kernel[(triton.cdiv(n, block_m),)](
        rows, weight, bias, job.targets, *cells, n, tile.first, width, job.n_rows,
        n_main, job.n_classes, n_outputs, job.blank, job.sigma, *clips_of(job),
        precision(), width % block_k == 0, clip_block(job), block_m, block_v,
        max(16, triton.next_power_of_2(n_outputs - n_main)), block_k,
        num_warps=8 if half else 4, num_stages=2 if interpreted else _stages(),
    )  # fmt: skip


def _stages() -> int:
    """Blocks that a loop has on their way: three where shared memory holds them."""
    active = triton.runtime.driver.active
    properties = active.utils.get_device_properties(active.get_current_device())
    return 3 if properties["max_shared_mem"] > 200_000 else 2


@triton.jit(do_not_specialize=[*SIZES, *SEEDS])
def _hidden_kernel(
    enc_ptr, pred_ptr, out_ptr, index_ptr, n, width, n_frames, n_rows, offsets_ptr, rows_ptr,
    n_clips, seed_low, seed_high, threshold, SCALE: tl.constexpr, ACTIVATION: tl.constexpr,
    CLIPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    cell = tl.load(index_ptr + i, mask=i < n, other=0)
    clip = clip_of(cell, offsets_ptr, n_clips, CLIPS)
    place = (cell - tl.load(offsets_ptr + clip)).to(tl.int32)
    rows = tl.load(rows_ptr + clip).to(tl.int32)
    frame, state = clip * n_frames + place // rows, clip * n_rows + place % rows
    inside = (i < n)[:, None] & (h < width)[None, :]
    x = wide(tl.load(enc_ptr + frame.to(tl.int64)[:, None] * width + h[None, :], mask=inside))
    x += wide(tl.load(pred_ptr + state.to(tl.int64)[:, None] * width + h[None, :], mask=inside))
    if ACTIVATION == 0:
        y = tl.where(x < 0, 0.0, x)  # NaN stays
    elif ACTIVATION == 1:
        e = tl.exp(-2 * tl.abs(x))
        y = (1 - e) / (1 + e)
        y = tl.where(x < 0, -y, y)
    else:
        e = tl.exp(-tl.abs(x))
        y = tl.where(x < 0, e, 1.0) / (1 + e)
    if SCALE != 1.0:
        y = tl.where(kept(cell, h, seed_low, seed_high, threshold), y * SCALE, 0.0)
    out = out_ptr + i.to(tl.int64)[:, None] * width + h[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, bias_ptr, row, column, last_column, width, PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(M, V) logits of rows and columns; columns past the last repeat it."""
    column = tl.minimum(column, last_column)
    k = tl.arange(0, BLOCK_K)
    x_at = row[:, None] * width + k[None, :]  # 32 bits: half the registers
    w_at = column[None, :] * width + k[:, None]
    z = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            x = tl.load(hidden_ptr + start + x_at)
            w = tl.load(weight_ptr + start + w_at)
        else:
            x = tl.load(hidden_ptr + start + x_at, mask=(k + start < width)[None, :], other=0.0)
            w = tl.load(weight_ptr + start + w_at, mask=(k + start < width)[:, None], other=0.0)
        z = tl.dot(x, w, z, input_precision=PRECISION)
    return z + tl.load(bias_ptr + column).to(tl.float32)[None, :]


@triton.jit
def _pick(z, column, wanted):
    """The logit of each row's wanted column, 0 where it is not among these."""
    return tl.sum(tl.where(column[None, :] == wanted[:, None], z, 0.0), 1)


@triton.jit(do_not_specialize=SIZES)
def _scores_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr,
    top_ptr, total_ptr, blank_ptr, label_ptr, duration_ptr,
    n, first, width, n_rows, n_main, n_classes, n_outputs, blank, sigma,
    offsets_ptr, rows_ptr, n_clips,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, CLIPS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_TAIL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(i, n - 1)
    cell = (first + row).to(tl.int64)
    clip = clip_of(cell, offsets_ptr, n_clips, CLIPS)
    place = (cell - tl.load(offsets_ptr + clip)).to(tl.int32)
    u = place % tl.load(rows_ptr + clip).to(tl.int32)
    target = tl.load(targets_ptr + clip * n_rows + u).to(tl.int32)
    blanks = tl.zeros((BLOCK_M,), tl.int32) + blank
    early = tl.where(blanks < n_main, blanks, -1)  # -1: not among the wide blocks' columns

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    of_label = tl.zeros((BLOCK_M,), tl.float32)
    of_blank = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, n_main, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        z = _logits(
            hidden_ptr, weight_ptr, bias_ptr, row, column, n_main - 1, width, PRECISION, EVEN_K,
            BLOCK_M, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        z = tl.where((column < n_main)[None, :], z, float("-inf"))
        top, total = fold(z, top, total)
        of_label += _pick(z, column, target)
        of_blank += _pick(z, column, early)
    if n_main < n_outputs:
        column = n_main + tl.arange(0, BLOCK_TAIL)
        z = _logits(
            hidden_ptr, weight_ptr, bias_ptr, row, column, n_outputs - 1, width, PRECISION, EVEN_K,
            BLOCK_M, BLOCK_TAIL, BLOCK_K,
        )  # fmt: skip
        is_token = (column < n_classes)[None, :]
        top, total = fold(tl.where(is_token, z, float("-inf")), top, total)
        of_label += _pick(z, column, target)
        of_blank += _pick(z, column, blanks)
        is_duration = ((column >= n_classes) & (column < n_outputs))[None, :]
        z = tl.where(is_duration, z, float("-inf"))
        z -= tl.max(z, 1)[:, None]
        z -= tl.log(tl.sum(tl.exp(z), 1))[:, None]
        n_durations = n_outputs - n_classes
        out = duration_ptr + cell[:, None] * n_durations + (column - n_classes)[None, :]
        tl.store(out, z, mask=(i < n)[:, None] & is_duration)

    offset = tl.log(total) + sigma
    tl.store(top_ptr + cell, top, mask=i < n)
    tl.store(total_ptr + cell, total, mask=i < n)
    tl.store(blank_ptr + cell, of_blank - top - offset, mask=i < n)
    tl.store(label_ptr + cell, of_label - top - offset, mask=i < n)
