"""WKV7 on a CPU, frame by frame, in compiled loops: a numba kernel, forward only.

A chunk's matrix products are for machines on which the walk from frame to frame is slow. Here a
head's state of 64 x 64 stays in the first cache, and a frame is one pass over it: each value column
is decayed, corrected and written to, and its products with r_t and with a_{t+1}, the next frame's
correction, are summed on the way. That is a fifth of the chunked form's time, and the definition's
own order of operations, so any decay is as exact as there.

Same arguments and results as `chunked.forward`, saved states included, so `chunked.backward` goes
on from it. Importing this module needs numba; the kernel compiles at its first call and is cached
on disk where that is possible. Letters: B clips, T frames, H heads, N head width.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from rwkv_cuda.chunked import SEGMENT, n_segments

COLUMNS = 32  # values at once: two registers of AVX-512, so that sums need not wait for each other
TILE = 16  # frames copied together: a head's lie far apart, and the next copy's loads overlap
PIECE = 1 << 17  # decays computed at once, half a MiB: still in a cache when they are read
SMALLEST_SHARE = 10_000  # frames of a head, some ms: less is no work for a thread


def forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    reverse: bool = False,
    lengths: Tensor | None = None,
    initial_state: Tensor | None = None,
    save_states: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `chunked.forward`; float32 or bfloat16 on the CPU. Uses torch's number of threads."""
    batch, frames, heads, width = r.shape
    y = torch.zeros_like(r, memory_format=torch.contiguous_format)
    state = torch.zeros(batch, heads, width, width)
    if initial_state is not None:
        state.copy_(initial_state.mT)
    saved = torch.zeros(n_segments(frames) if save_states else 0, *state.shape)
    if lengths is None:
        lengths = torch.full((batch,), frames)
    step = max(SEGMENT, PIECE // max(1, batch * heads * width))
    starts = range(0, frames, step)
    threads = torch.get_num_threads()
    if batch * heads * frames < SMALLEST_SHARE * threads:
        threads = 1
    parts = 1 if batch * heads >= threads else -(-width // COLUMNS)
    # Not numba's own threads, which are shared with all else that uses them.
    with ThreadPoolExecutor(threads) as pool:
        for start in reversed(starts) if reverse else starts:
            stop = min(start + step, frames)
            r_, w_, k_, v_, a_, b_ = (
                x.detach()[:, start:stop].to(torch.float32).contiguous() for x in (r, w, k, v, a, b)
            )
            out = y[:, start:stop]  # itself where its numbers lie as the kernel writes them
            whole = out.dtype == torch.float32 and out.is_contiguous()
            part = out if whole else torch.zeros_like(r_)
            decay = w_.exp().neg_().exp_()
            arrays = (r_, decay, k_, v_, a_, b_, part, lengths.long(), state, saved)
            given = (*(x.numpy() for x in arrays), start, reverse, SEGMENT, parts)
            if threads == 1:
                _walk(*given, 0, 1)
            else:
                jobs = [pool.submit(_walk, *given, first, threads) for first in range(threads)]
                for job in jobs:
                    job.result()
            if not whole:
                out.copy_(part)
    return y, state.mT.contiguous(), saved


@intrinsic
def _frame(typing_context, state, keys, values, sums, out):
    """One frame of COLUMNS value columns.

    state: (N, COLUMNS), moved on. keys: (5, N), rows r, decay, k, b and the next frame's a. values:
    (COLUMNS,). sums: (COLUMNS,), S a of this frame, becomes that of the next. out: (COLUMNS,), S r.

    LLVM is given whole vectors, since it would not keep two sums of many columns in registers.
    """
    vector = ir.VectorType(ir.FloatType(), COLUMNS)
    undefined = ir.Constant(vector, ir.Undefined)
    first_lane = ir.Constant(ir.VectorType(ir.IntType(32), COLUMNS), [0] * COLUMNS)

    def generate(context, builder, signature, arguments):
        state, keys, values, sums, out = (
            context.make_array(kind)(context, builder, x)
            for kind, x in zip(signature.args, arguments)
        )

        def load(pointer):
            x = builder.load(builder.bitcast(pointer, vector.as_pointer()))
            x.align = 4
            return x

        def store(x, pointer):
            builder.store(x, builder.bitcast(pointer, vector.as_pointer())).align = 4

        def times(x, y, plus=None):
            x = builder.fmul(x, y, flags=("contract",))
            return x if plus is None else builder.fadd(x, plus, flags=("contract",))

        count = builder.extract_value(state.shape, 0)
        value, correction = load(values.data), load(sums.data)
        y, following = (
            cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in range(2)
        )
        builder.store(ir.Constant(vector, None), y)  # the slots are shared by all calls in a loop
        builder.store(ir.Constant(vector, None), following)
        with cgutils.for_range(builder, count) as loop:

            def spread(row):
                place = builder.add(builder.mul(count, count.type(row)), loop.index)
                x = builder.load(builder.gep(keys.data, [place]))
                x = builder.insert_element(undefined, x, ir.IntType(32)(0))
                return builder.shuffle_vector(x, undefined, first_lane)

            place = builder.gep(state.data, [builder.mul(loop.index, count.type(COLUMNS))])
            written = times(correction, spread(3), plus=times(value, spread(2)))
            new = times(load(place), spread(1), plus=written)
            store(new, place)
            builder.store(times(new, spread(0), plus=builder.load(y)), y)
            builder.store(times(new, spread(4), plus=builder.load(following)), following)
        store(builder.load(y), out.data)
        store(builder.load(following), sums.data)
        return context.get_dummy_value()

    return types.void(state, keys, values, sums, out), generate


def _kernel(function):
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written
        return njit(nogil=True, error_model="numpy")(function)


@_kernel
def _walk(
    r, decay, k, v, a, b, y, lengths, state, saved, start, reverse, segment, parts, first, count
):
    """The frames from `start` on, (B, frames, H, N), through the tasks `first`, `first + count`,
    ... of clips, heads and `parts` of a head's columns. State and saved states are [key, value]."""
    _, frames, heads, width = r.shape
    blocks = -(-width // COLUMNS)
    mine = -(-blocks // parts)  # blocks of columns of one task: all of a head's, unless shared out
    keys = np.empty((TILE, 5, width), np.float32)
    values = np.zeros((mine, TILE, COLUMNS), np.float32)
    local = np.zeros((mine, width, COLUMNS), np.float32)
    sums, out = np.zeros((mine, COLUMNS), np.float32), np.zeros(COLUMNS, np.float32)
    for task in range(first, len(lengths) * heads * parts, count):
        clip, head, part = task // (heads * parts), task // parts % heads, task % parts
        n = min(frames, lengths[clip] - start)  # valid ones
        if n <= 0:
            continue
        begin, step = (n - 1, -1) if reverse else (0, 1)
        mine_now = min(mine, blocks - part * mine)
        for q in range(mine_now):
            left = (part * mine + q) * COLUMNS
            right = min(left + COLUMNS, width)
            local[q, :, : right - left] = state[clip, head, :, left:right]
            sums[q] = 0
            for j in range(width):
                for i in range(COLUMNS):
                    sums[q, i] += a[clip, begin, head, j] * local[q, j, i]
        for done in range(0, n, TILE):
            size = min(TILE, n - done)
            for i in range(size):
                t = begin + step * (done + i)
                after = t + step if done + i + 1 < n else t
                for j in range(width):
                    keys[i, 0, j] = r[clip, t, head, j]
                    keys[i, 1, j] = decay[clip, t, head, j]
                    keys[i, 2, j] = k[clip, t, head, j]
                    keys[i, 3, j] = b[clip, t, head, j]
                    keys[i, 4, j] = a[clip, after, head, j]
            for q in range(mine_now):
                left = (part * mine + q) * COLUMNS
                right = min(left + COLUMNS, width)
                for i in range(size):
                    t = begin + step * (done + i)
                    for j in range(right - left):
                        values[q, i, j] = v[clip, t, head, left + j]
                for i in range(size):
                    t = begin + step * (done + i)
                    position = lengths[clip] - 1 - start - t if reverse else start + t
                    if len(saved) and position % segment == 0:
                        saved[position // segment, clip, head, :, left:right] = local[
                            q, :, : right - left
                        ]
                    _frame(local[q], keys[i], values[q, i], sums[q], out)
                    for j in range(right - left):
                        y[clip, t, head, left + j] = out[j]
        for q in range(mine_now):
            left = (part * mine + q) * COLUMNS
            right = min(left + COLUMNS, width)
            state[clip, head, :, left:right] = local[q, :, : right - left]
