"""The lattice on a GPU: sums over all alignments in one launch, occupancies in a second.

One launch serves both directions: program (clip, 0) walks the anti-diagonals n = t + u downwards
for b, program (clip, 1) upwards for a, all rows of a diagonal at once, with the next diagonal's
scores on their way. All arcs end at most 1 + max(durations) diagonals away, so what is read is
what was just written. a and b are float64, of which exponentials see float32 differences: with
sums in the thousands, as of long clips, float32 would leave three digits of each occupancy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..transfers import sent
from .triton_cells import SIZES, clip_block, clip_of, clips_of


def lattice(job, cells, needs_grad) -> Tensor:
    device, n_clips = job.enc.device, len(job.frames)
    rnnt = job.durations is None
    # One that leads out of any clip is as good as any other, and has no sum beyond 32 bits.
    durations = (0, 1) if rnnt else [min(d, job.n_frames + 1) for d in job.durations]
    durations = sent(torch.tensor(durations, dtype=torch.int32), device)
    n_diagonals = job.n_frames + job.n_rows
    # By diagonal and row: neighbouring rows of a diagonal lie side by side.
    a, b = torch.empty(2, n_clips, n_diagonals, job.n_rows, dtype=torch.float64, device=device)
    n_durations = cells.duration.shape[1]
    block_u = max(128, triton.next_power_of_2(job.n_rows))  # one kernel for most texts
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
            *shared, job.frames, *clips_of(job), job.n_cells, rnnt, exact, clip_block(job), block
        )
    return b[:, 0, 0].clone()


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
    # (K, U), as the mask: before Triton 3.5 a pointer is not broadcast
    cell = first + t * n_rows + u + tl.zeros_like(tokens)
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


@triton.jit(do_not_specialize=SIZES)
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
        for step in range(n_diagonals):
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


@triton.jit(do_not_specialize=SIZES)
def _occupancy_kernel(
    blank_ptr, label_ptr, duration_ptr, a_ptr, b_ptr, durations_ptr, n_classes, n_durations,
    max_frames, max_rows, frames_ptr, offsets_ptr, rows_ptr, n_clips, n_cells,
    RNNT: tl.constexpr, EXACT: tl.constexpr, CLIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cell = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    valid = cell < n_cells
    cell = tl.minimum(cell, n_cells - 1)
    clip = clip_of(cell, offsets_ptr, n_clips, CLIPS)
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
    for i in range(n_classes):
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
