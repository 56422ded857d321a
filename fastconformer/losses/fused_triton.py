"""The tiles of the fused loss on a GPU: Triton kernels, and cuBLAS for the gradient's products.

The functions are those of fused_vectorised.py. Two of them are more than their arithmetic:

`scores` never writes logits to memory: each program multiplies its rows of hidden with the output
layer, some columns at a time, and folds each block of logits into a running maximum and sum of
exponentials (online softmax; Milakov and Gimelshein 2018, arXiv:1805.02867). The columns beyond the
tokens (blank, durations) are one narrow block, so that the wide ones are full: 1024 or 8192.

`lattice` is one launch for both directions: program (clip, 0) walks the anti-diagonals n = t + u
upwards for a, program (clip, 1) downwards for b, all rows of a diagonal at once, with the next
diagonal's scores on their way. All arcs end at most 1 + max(durations) diagonals away, so what is
read is what was just written. a and b are float64, of which exponentials see float32 differences:
with sums in the thousands, as of long clips, float32 would leave three digits of each occupancy.
A second launch turns scores into occupancies.

Everything is summed in a fixed order, without atomics.

Importing this module needs triton. With TRITON_INTERPRET=1 set before, the kernels run on CPU
tensors, which is how the tests check them without a GPU.
"""

import bisect
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import fused_vectorised
from .fused_vectorised import dropout_threshold

_ACTIVATIONS = {"relu": 0, "tanh": 1, "sigmoid": 2}


def hidden(job, tile, dtype=None) -> Tensor:
    n, width = len(tile.index), job.enc.shape[1]
    out = job.weight.new_empty((n, width), dtype=dtype or job.weight.dtype)
    block_m, block_h = 32, min(128, triton.next_power_of_2(width))
    _hidden_kernel[(triton.cdiv(n, block_m), triton.cdiv(width, block_h))](
        job.enc, job.pred, out, tile.index, n, width, job.n_frames, job.n_rows, *_clips(job),
        *_dropout(job), _ACTIVATIONS[job.activation], _clip_block(job),
        block_m, block_h,
    )  # fmt: skip
    return out


def scores(job, tile, cells):
    if job.weight.dtype == torch.float64:  # for gradcheck; tensor cores have no such product
        return fused_vectorised.scores(job, tile, cells)
    rows, weight, bias = hidden(job, tile), job.weight, job.bias
    n, width = rows.shape
    n_outputs = len(job.weight)
    assert max(n, n_outputs) * width < 1 << 31, "a tile's offsets are 32 bits wide"
    # Blank and durations are the tail; blank in front is one of the wide blocks' columns.
    n_main = job.n_classes - 1 if job.blank == job.n_classes - 1 else job.n_classes
    half = rows.dtype != torch.float32
    block_m, block_v, block_k = (128, 128, 64) if half else (64, 64, 32)
    if not rows.is_cuda:  # the interpreter: small, to see the loops turn; no bfloat16 products
        block_m, block_v, block_k = 16, 16, 16
        rows, weight, bias = rows.float(), weight.float(), bias.float()
    precision = "tf32" if _allows_tf32() else "ieee"
    _scores_kernel[(triton.cdiv(n, block_m),)](
        rows, weight, bias, job.targets, *cells, n, tile.first, width, job.n_rows,
        n_main, job.n_classes, n_outputs, job.blank, job.sigma, *_clips(job),
        precision, width % block_k == 0, _clip_block(job), block_m, block_v,
        max(16, triton.next_power_of_2(n_outputs - n_main)), block_k,
        num_warps=8 if half else 4, num_stages=3 if _has_much_shared_memory(rows.device) else 2,
    )  # fmt: skip


def lattice(job, cells, needs_grad) -> Tensor:
    device, n_clips = job.enc.device, len(job.frames)
    rnnt = job.durations is None
    # One that leads out of any clip is as good as any other, and has no sum beyond 32 bits.
    durations = (0, 1) if rnnt else [min(d, job.n_frames + 1) for d in job.durations]
    durations = torch.tensor(durations, dtype=torch.int32, device=device)
    n_diagonals = job.n_frames + job.n_rows
    # By diagonal and row: neighbouring rows of a diagonal lie side by side.
    a, b = torch.empty(2, n_clips, n_diagonals, job.n_rows, dtype=torch.float64, device=device)
    n_durations = cells.duration.shape[1]
    block_u = triton.next_power_of_2(job.n_rows)
    exact = cells.top.dtype == torch.float64
    shared = (
        cells.blank, cells.label, cells.duration, a, b, durations, len(durations), n_durations,
        job.n_frames, job.n_rows,
    )  # fmt: skip
    _lattice_kernel[(n_clips, 2 if needs_grad else 1)](
        *shared, job.frames, job.rows, job.offsets, rnnt, exact,
        triton.next_power_of_2(len(durations)), block_u, num_warps=min(8, max(1, block_u // 32)),
        num_stages=1,  # a load may not pass the barrier before it
    )  # fmt: skip
    if needs_grad:
        block = 128
        _occupancy_kernel[(triton.cdiv(job.n_cells, block),)](
            *shared, job.frames, *_clips(job), job.n_cells, rnnt, exact, _clip_block(job), block
        )
    return b[:, 0, 0].clone()


def gradient(job, tile, cells, weights, fastemit_lambda, clamp, logits):
    n, n_outputs = logits.shape
    block = min(4096, triton.next_power_of_2(job.n_classes))
    _gradient_kernel[(n,)](
        logits, tile.index, job.targets, cells.blank, cells.label, cells.duration, weights,
        n_outputs, job.n_classes, job.blank, cells.duration.shape[1], job.n_rows, *_clips(job),
        n_outputs - job.n_classes, 1.0 + fastemit_lambda, clamp, weights.dtype == torch.float64,
        _clip_block(job), block, triton.next_power_of_2(max(1, n_outputs - job.n_classes)),
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
        tile.last, lowest, width, job.n_frames, job.frames, job.rows, job.offsets, *_dropout(job),
        _ACTIVATIONS[job.activation], dense, 32, block_h,
    )  # fmt: skip
    _pred_kernel[((last_clip - first_clip + 1) * job.n_rows, n_blocks)](
        d_hidden, d_pred, before, tile.start, tile.first, tile.last, first_clip, width, job.n_rows,
        job.frames, job.rows, job.offsets, dense, 32, block_h,
    )  # fmt: skip


def _clips(job):
    return job.offsets, job.rows, len(job.rows)


def _clip_block(job) -> int:
    return triton.next_power_of_2(len(job.rows))


def _dropout(job):
    threshold = dropout_threshold(job.dropout)
    return job.seed & 0xFFFFFFFF, job.seed >> 32, threshold, 1.0 / (1.0 - job.dropout)


def _clip_and_frame(job, cell: int) -> tuple[int, int]:
    starts = list(itertools.accumulate((t * r for t, r in job.shapes), initial=0))
    clip = bisect.bisect_right(starts, cell) - 1
    return clip, (cell - starts[clip]) // job.shapes[clip][1]


def _allows_tf32() -> bool:
    settings = torch.backends.cuda.matmul
    if hasattr(settings, "fp32_precision"):  # torch 2.9; then asking for the old name may raise
        return settings.fp32_precision == "tf32"
    return settings.allow_tf32


def _has_much_shared_memory(device) -> bool:
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) > 200_000


@triton.jit
def _clip_of(cell, offsets_ptr, n_clips, CLIPS: tl.constexpr):
    """Clip of cells (M,), as the number of clips that start at or before each."""
    clip = tl.arange(0, CLIPS)
    offsets = tl.load(offsets_ptr + clip, mask=clip < n_clips, other=1 << 62)
    return tl.sum((cell[:, None] >= offsets[None, :]).to(tl.int32), 1) - 1


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _kept(cell, channel, seed_low, seed_high, threshold):
    """Dropout's mask (M, H) of cells (M,) and channels (H,); `keep` in fused_vectorised.py."""
    key = _mix(cell.to(tl.uint32) ^ tl.cast(seed_low, tl.uint32)) ^ tl.cast(seed_high, tl.uint32)
    bits = _mix(key[:, None] + (channel.to(tl.uint32) * 0x9E3779B9)[None, :])
    return bits.to(tl.int64) >= threshold


@triton.jit
def _wide(x):
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
def _hidden_kernel(
    enc_ptr, pred_ptr, out_ptr, index_ptr, n, width, n_frames, n_rows, offsets_ptr, rows_ptr,
    n_clips, seed_low, seed_high, threshold, SCALE: tl.constexpr, ACTIVATION: tl.constexpr,
    CLIPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    cell = tl.load(index_ptr + i, mask=i < n, other=0)
    clip = _clip_of(cell, offsets_ptr, n_clips, CLIPS)
    place = (cell - tl.load(offsets_ptr + clip)).to(tl.int32)
    rows = tl.load(rows_ptr + clip).to(tl.int32)
    frame, state = clip * n_frames + place // rows, clip * n_rows + place % rows
    inside = (i < n)[:, None] & (h < width)[None, :]
    x = _wide(tl.load(enc_ptr + frame.to(tl.int64)[:, None] * width + h[None, :], mask=inside))
    x += _wide(tl.load(pred_ptr + state.to(tl.int64)[:, None] * width + h[None, :], mask=inside))
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
        y = tl.where(_kept(cell, h, seed_low, seed_high, threshold), y * SCALE, 0.0)
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
def _fold(z, top, total):
    """Running maximum and sum of exponentials with these columns added."""
    new = tl.maximum(top, tl.max(z, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp(top - safe) + tl.sum(tl.exp(z - safe[:, None]), 1)
    return new, total


@triton.jit
def _pick(z, column, wanted):
    """The logit of each row's wanted column, 0 where it is not among these."""
    return tl.sum(tl.where(column[None, :] == wanted[:, None], z, 0.0), 1)


@triton.jit
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
    clip = _clip_of(cell, offsets_ptr, n_clips, CLIPS)
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
        top, total = _fold(z, top, total)
        of_label += _pick(z, column, target)
        of_blank += _pick(z, column, early)
    if n_main < n_outputs:
        column = n_main + tl.arange(0, BLOCK_TAIL)
        z = _logits(
            hidden_ptr, weight_ptr, bias_ptr, row, column, n_outputs - 1, width, PRECISION, EVEN_K,
            BLOCK_M, BLOCK_TAIL, BLOCK_K,
        )  # fmt: skip
        is_token = (column < n_classes)[None, :]
        top, total = _fold(tl.where(is_token, z, float("-inf")), top, total)
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


@triton.jit
def _arc(k, durations_ptr, n_classes, RNNT: tl.constexpr):
    """Arc k is class k // 2 of duration with a blank (k even) or a token (k odd): its class,
    frames, tokens and whether there is one. RNNT: a token of 0 frames, a blank of 1."""
    of_class, tokens = k // 2, k % 2
    frames = tl.load(durations_ptr + of_class, mask=of_class < n_classes, other=0)
    if RNNT:
        exists = tokens + frames == 1
    else:
        exists = tokens + frames > 0
    return of_class, frames, tokens, exists & (of_class < n_classes)


@triton.jit
def _arc_scores(
    t, u, tokens, of_class, allowed, first, n_rows, blank_ptr, label_ptr, duration_ptr,
    n_durations, RNNT: tl.constexpr,
):  # fmt: skip
    """Scores of arcs from cells (t, u), -inf where they are not allowed."""
    cell = first + t * n_rows + u
    score = tl.load(label_ptr + cell, mask=allowed & (tokens == 1), other=0.0)
    score += tl.load(blank_ptr + cell, mask=allowed & (tokens == 0), other=0.0)
    if not RNNT:
        score += tl.load(duration_ptr + cell * n_durations + of_class, mask=allowed, other=0.0)
    return tl.where(allowed, score, float("-inf"))


@triton.jit
def _log_sum_exp(x, EXACT: tl.constexpr):
    """Over the arcs (K, U), float64; exponentials in float32 unless EXACT."""
    best = tl.max(x, 0)
    safe = tl.where(best == float("-inf"), 0.0, best)
    y = x - safe[None, :]
    if EXACT:
        return safe + tl.log(tl.sum(tl.exp(y), 0))
    return safe + tl.log(tl.sum(tl.exp(y.to(tl.float32)), 0)).to(tl.float64)


@triton.jit
def _upward(
    n, u, k, n_frames, n_rows, first, blank_ptr, label_ptr, duration_ptr, durations_ptr, n_classes,
    n_durations, RNNT: tl.constexpr,
):  # fmt: skip
    """Scores of the arcs into diagonal n, and where they come from: diagonal and row."""
    of_class, frames, tokens, exists = _arc(k, durations_ptr, n_classes, RNNT)
    row = u - tokens
    t = n - u - frames
    inside = (n - u >= 0) & (n - u < n_frames) & (u < n_rows)
    allowed = exists & inside & (t >= 0) & (row >= 0)
    score = _arc_scores(
        t, row, tokens, of_class, allowed, first, n_rows, blank_ptr, label_ptr, duration_ptr,
        n_durations, RNNT,
    )  # fmt: skip
    return score, t + row, row, allowed


@triton.jit
def _downward(
    n, u, k, n_frames, n_rows, first, blank_ptr, label_ptr, duration_ptr, durations_ptr, n_classes,
    n_durations, RNNT: tl.constexpr,
):  # fmt: skip
    """Scores of the arcs out of diagonal n, where they go, and whether that is inside."""
    of_class, frames, tokens, exists = _arc(k, durations_ptr, n_classes, RNNT)
    t = n - u
    end, row = t + frames, u + tokens
    onwards = (end < n_frames) & (row < n_rows)
    last = (end == n_frames) & (u == n_rows - 1) & (tokens == 0)  # the blank that lands on T'
    allowed = exists & (t >= 0) & (t < n_frames) & (u < n_rows) & (onwards | last)
    score = _arc_scores(
        t, u, tokens, of_class, allowed, first, n_rows, blank_ptr, label_ptr, duration_ptr,
        n_durations, RNNT,
    )  # fmt: skip
    return score, end + row, row, allowed & onwards


@triton.jit
def _lattice_kernel(
    blank_ptr, label_ptr, duration_ptr, a_ptr, b_ptr, durations_ptr, n_classes, n_durations,
    max_frames, max_rows, frames_ptr, rows_ptr, offsets_ptr,
    RNNT: tl.constexpr, EXACT: tl.constexpr, CLASSES: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    clip = tl.program_id(0)
    n_frames = tl.load(frames_ptr + clip).to(tl.int32)
    n_rows = tl.load(rows_ptr + clip).to(tl.int32)
    first = tl.load(offsets_ptr + clip)
    plane = clip.to(tl.int64) * (max_frames + max_rows) * max_rows
    one = tl.arange(0, BLOCK_U)
    u = one[None, :]
    k = tl.arange(0, 2 * CLASSES)[:, None]
    n_diagonals = n_frames + n_rows - 1
    if tl.program_id(1) == 0:
        score, diagonal, row, inside = _downward(
            n_diagonals - 1, u, k, n_frames, n_rows, first, blank_ptr, label_ptr, duration_ptr,
            durations_ptr, n_classes, n_durations, RNNT,
        )  # fmt: skip
        for step in range(0, n_diagonals):
            n = n_diagonals - 1 - step
            before = tl.load(b_ptr + plane + diagonal * max_rows + row, mask=inside, other=0.0)
            value = _log_sum_exp(score.to(tl.float64) + before, EXACT)
            valid = (n - one >= 0) & (n - one < n_frames) & (one < n_rows)
            # The next diagonal's scores do not wait for this one.
            score, diagonal, row, inside = _downward(
                n - 1, u, k, n_frames, n_rows, first, blank_ptr, label_ptr, duration_ptr,
                durations_ptr, n_classes, n_durations, RNNT,
            )  # fmt: skip
            tl.store(b_ptr + plane + n * max_rows + one, value, mask=valid)
            tl.debug_barrier()
    else:
        tl.store(a_ptr + plane + one, tl.zeros((BLOCK_U,), tl.float64), mask=one == 0)
        tl.debug_barrier()
        score, diagonal, row, inside = _upward(
            1, u, k, n_frames, n_rows, first, blank_ptr, label_ptr, duration_ptr, durations_ptr,
            n_classes, n_durations, RNNT,
        )  # fmt: skip
        for n in range(1, n_diagonals):
            before = tl.load(a_ptr + plane + diagonal * max_rows + row, mask=inside, other=0.0)
            value = _log_sum_exp(score.to(tl.float64) + before, EXACT)
            valid = (n - one >= 0) & (n - one < n_frames) & (one < n_rows)
            score, diagonal, row, inside = _upward(
                n + 1, u, k, n_frames, n_rows, first, blank_ptr, label_ptr, duration_ptr,
                durations_ptr, n_classes, n_durations, RNNT,
            )  # fmt: skip
            tl.store(a_ptr + plane + n * max_rows + one, value, mask=valid)
            tl.debug_barrier()


@triton.jit
def _occupancy_kernel(
    blank_ptr, label_ptr, duration_ptr, a_ptr, b_ptr, durations_ptr, n_classes, n_durations,
    max_frames, max_rows, frames_ptr, offsets_ptr, rows_ptr, n_clips, n_cells,
    RNNT: tl.constexpr, EXACT: tl.constexpr, CLIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cell = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    valid = cell < n_cells
    cell = tl.minimum(cell, n_cells - 1)
    clip = _clip_of(cell, offsets_ptr, n_clips, CLIPS)
    n_frames = tl.load(frames_ptr + clip).to(tl.int32)
    n_rows = tl.load(rows_ptr + clip).to(tl.int32)
    place = (cell - tl.load(offsets_ptr + clip)).to(tl.int32)
    t, u = place // n_rows, place % n_rows
    plane = clip.to(tl.int64) * (max_frames + max_rows) * max_rows
    whole = tl.load(b_ptr + plane)
    arriving = tl.load(a_ptr + plane + (t + u) * max_rows + u) - whole
    label = tl.load(label_ptr + cell).to(tl.float64)
    blank = tl.load(blank_ptr + cell).to(tl.float64)
    of_blank = tl.zeros((BLOCK,), tl.float64)
    of_label = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, n_classes):
        frames = tl.load(durations_ptr + i + 0 * u)
        score = arriving
        if not RNNT:
            score += tl.load(duration_ptr + cell * n_durations + i).to(tl.float64)
        end = b_ptr + plane + (t + frames + u) * max_rows + u
        onwards = t + frames < n_frames
        last = (t + frames == n_frames) & (u == n_rows - 1)
        exists = (frames > 0) & (whole != float("-inf"))
        rest = tl.load(end, mask=onwards & exists, other=0.0)
        x = tl.where((onwards | last) & exists, score + blank + rest, float("-inf"))
        p_blank = _exp(x, EXACT)
        exists = onwards & (u < n_rows - 1) & (whole != float("-inf"))
        if RNNT:
            exists = exists & (frames == 0)
        rest = tl.load(end + max_rows + 1, mask=exists, other=0.0)
        p_label = _exp(tl.where(exists, score + label + rest, float("-inf")), EXACT)
        of_blank += p_blank
        of_label += p_label
        if not RNNT:
            p = (p_blank + p_label).to(duration_ptr.dtype.element_ty)
            tl.store(duration_ptr + cell * n_durations + i, p, mask=valid)
    tl.store(blank_ptr + cell, of_blank.to(blank_ptr.dtype.element_ty), mask=valid)
    tl.store(label_ptr + cell, of_label.to(label_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    return tl.exp(x) if EXACT else tl.exp(x.to(tl.float32)).to(tl.float64)


@triton.jit
def _gradient_kernel(
    logits_ptr, index_ptr, targets_ptr, blank_ptr, label_ptr, duration_ptr, weights_ptr,
    n_outputs, n_classes, blank, stride_d, n_rows, offsets_ptr, rows_ptr, n_clips,
    n_durations, EMPHASIS: tl.constexpr, CLAMP: tl.constexpr, EXACT: tl.constexpr,
    CLIPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if EXACT else tl.float32
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
    row = logits_ptr + i.to(tl.int64) * n_outputs
    # The row's own normaliser: that of `scores` is of logits that were not rounded to bfloat16.
    top = tl.full((1,), float("-inf"), wide)
    total = tl.zeros((1,), wide)
    for start in range(0, n_classes, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(row + v, mask=v < n_classes, other=float("-inf")).to(wide)
        top, total = _fold(z[None, :], top, total)
    top, total = tl.max(top, 0), tl.max(total, 0)
    factor = (of_blank + of_label) / total
    for start in range(0, n_classes, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(row + v, mask=v < n_classes, other=float("-inf")).to(wide)
        y = factor * tl.exp(z - top)
        y -= tl.where(v == blank, of_blank, 0.0) + tl.where(v == target, of_label, 0.0)
        y = tl.where(y > CLAMP, CLAMP, tl.where(y < -CLAMP, -CLAMP, y))
        y = tl.where(counts, y * scale, 0.0)
        tl.store(row + v, y.to(logits_ptr.dtype.element_ty), mask=v < n_classes)
    if n_durations > 0:
        d = tl.arange(0, BLOCK_D)
        inside = d < n_durations
        z = tl.load(row + n_classes + d, mask=inside, other=float("-inf")).to(wide)
        y = tl.exp(z - tl.max(z, 0))
        y = passing * y / tl.sum(y, 0) - tl.load(duration_ptr + cell * stride_d + d, mask=inside)
        y = tl.where(counts, y * scale, 0.0)
        tl.store(row + n_classes + d, y.to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _row_of(cell, before_ptr, start, first, DENSE: tl.constexpr, inside):
    """A cell's row in the tile, and whether it is there."""
    if DENSE:
        return (cell - first).to(tl.int32), inside
    row = tl.load(before_ptr + cell, mask=inside, other=0)
    after = tl.load(before_ptr + cell + 1, mask=inside, other=0)
    return row - start, inside & (after > row)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
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
                grad = tl.where(_kept(cell, h, seed_low, seed_high, threshold), grad, 0.0)
            tl.store(d_hidden_ptr + place, grad.to(d_hidden_ptr.dtype.element_ty), mask=inside)
            total += tl.sum(grad, 0)
        out = d_enc_ptr + frame.to(tl.int64) * width + h
        tl.store(out, tl.load(out, mask=h < width) + total, mask=h < width)


@triton.jit
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
