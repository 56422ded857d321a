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

import math
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
TILE = 16  # frames copied together, all heads of a frame in the order in which they lie in memory
MOST_HEADS = 16  # heads copied together: 0.4 MiB a tile, which the second cache holds
PIECE = 1 << 17  # numbers of an input that are made float32 at once, half a MiB: still in a cache
MOST = np.float32(87)  # exp(-87) is the last one above the denormal numbers
LOG2_E = np.float32(1 / math.log(2))
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
ROUNDING = np.float32(1.5 * 2**23)  # added and taken away, leaves the nearest whole number
INVERSE_FACTORIALS = tuple(np.float32(1 / math.factorial(i)) for i in range(8))
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
    blocks = -(-width // COLUMNS)
    state = torch.zeros(
        batch, heads, width, blocks * COLUMNS, dtype=torch.float32, device="cpu"
    )  # [key, value], padded
    if initial_state is not None:
        state[..., :width] = initial_state.mT
    state = state.unflatten(-1, (blocks, COLUMNS)).transpose(2, 3).contiguous()
    saved = torch.zeros(
        n_segments(frames) if save_states else 0,
        batch,
        heads,
        width,
        width,
        dtype=torch.float32,
        device="cpu",
    )
    lengths = torch.full((batch,), frames, device="cpu") if lengths is None else lengths.long()
    step = max(SEGMENT, PIECE // max(1, batch * heads * width))
    starts = range(0, frames, step)
    threads = torch.get_num_threads()
    if batch * heads * frames < SMALLEST_SHARE * threads:
        threads = 1
    parts = 1 if batch * heads >= threads else blocks
    groups = max(min(heads, threads), -(-heads // MOST_HEADS))
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
            arrays = (r_, w_, k_, v_, a_, b_, part, lengths, state, saved)
            given = (*(x.numpy() for x in arrays), start, reverse, SEGMENT, groups, parts)
            if threads == 1:
                _walk(*given, 0, 1)
            else:
                jobs = [pool.submit(_walk, *given, first, threads) for first in range(threads)]
                for job in jobs:
                    job.result()
            if not whole:
                out.copy_(part)
    state = state.transpose(2, 3).flatten(3)[..., :width]
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


@intrinsic
def _two_to(typing_context, shifted):
    """2^n as float32, n the whole number that lies in the last bits of n + ROUNDING."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], ir.IntType(32))
        bits = builder.add(builder.shl(bits, bits.type(23)), bits.type(127 << 23))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(shifted), generate


@njit(inline="always", error_model="numpy")
def _exp(x):
    """exp for |x| <= 87, within 2 units in the last place, in steps that LLVM makes vectors of."""
    shifted = x * LOG2_E + ROUNDING
    n = shifted - ROUNDING
    x = x - n * LN2_HIGH - n * LN2_LOW  # within ln(2) / 2 of 0, where seven terms suffice
    y = INVERSE_FACTORIALS[7]
    y = y * x + INVERSE_FACTORIALS[6]
    y = y * x + INVERSE_FACTORIALS[5]
    y = y * x + INVERSE_FACTORIALS[4]
    y = y * x + INVERSE_FACTORIALS[3]
    y = y * x + INVERSE_FACTORIALS[2]
    y = y * x + INVERSE_FACTORIALS[1]
    y = y * x + INVERSE_FACTORIALS[0]
    return y * _two_to(shifted)


@njit(inline="always", error_model="numpy")
def _decay(w):
    return _exp(max(-_exp(max(min(w, MOST), -MOST)), -MOST))


def _kernel(function):
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written
        return njit(nogil=True, error_model="numpy")(function)


@_kernel
def _walk(
    r, w, k, v, a, b, y, lengths, state, saved, start, reverse, segment, groups, parts, first, count
):
    """The frames from `start` on, (B, frames, H, N), through the tasks `first`, `first + count`,
    ... of clips, `groups` of heads and `parts` of a head's columns. `state` is (B, H, blocks of
    columns, N keys, COLUMNS), the saved states are [key, value]."""
    _, frames, heads, width = r.shape
    blocks = state.shape[2]
    share = -(-heads // groups)  # heads of one task
    mine = -(-blocks // parts)  # blocks of columns of one task: all of a head's, unless shared out
    keys = np.empty((share, TILE, 5, width), np.float32)
    values = np.zeros((share, blocks, TILE, COLUMNS), np.float32)
    out = np.zeros((share, blocks, TILE, COLUMNS), np.float32)
    sums = np.zeros((share, blocks, COLUMNS), np.float32)
    for task in range(first, len(lengths) * groups * parts, count):
        clip, group, part = task // (groups * parts), task // parts % groups, task % parts
        n = min(frames, lengths[clip] - start)  # valid ones
        if n <= 0:
            continue
        begin, step = (n - 1, -1) if reverse else (0, 1)
        h0, q0 = group * share, part * mine
        h1, q1 = min(h0 + share, heads), min(q0 + mine, blocks)
        for h in range(h0, h1):
            for q in range(q0, q1):
                sums[h - h0, q] = 0
                for j in range(width):
                    for i in range(COLUMNS):
                        sums[h - h0, q, i] += a[clip, begin, h, j] * state[clip, h, q, j, i]
        for done in range(0, n, TILE):
            size = min(TILE, n - done)
            for i in range(size):
                t = begin + step * (done + i)
                after = t + step if done + i + 1 < n else t
                for h in range(h0, h1):
                    for j in range(width):
                        keys[h - h0, i, 0, j] = r[clip, t, h, j]
                        keys[h - h0, i, 1, j] = _decay(w[clip, t, h, j])
                        keys[h - h0, i, 2, j] = k[clip, t, h, j]
                        keys[h - h0, i, 3, j] = b[clip, t, h, j]
                        keys[h - h0, i, 4, j] = a[clip, after, h, j]
                    for q in range(q0, q1):
                        for j in range(min(COLUMNS, width - q * COLUMNS)):
                            values[h - h0, q, i, j] = v[clip, t, h, q * COLUMNS + j]
            for h in range(h0, h1):
                for q in range(q0, q1):
                    left = q * COLUMNS
                    right = min(left + COLUMNS, width)
                    for i in range(size):
                        t = begin + step * (done + i)
                        position = lengths[clip] - 1 - start - t if reverse else start + t
                        if len(saved) and position % segment == 0:
                            saved[position // segment, clip, h, :, left:right] = state[
                                clip, h, q, :, : right - left
                            ]
                        _frame(
                            state[clip, h, q],
                            keys[h - h0, i],
                            values[h - h0, q, i],
                            sums[h - h0, q],
                            out[h - h0, q, i],
                        )
            for i in range(size):
                t = begin + step * (done + i)
                for h in range(h0, h1):
                    for q in range(q0, q1):
                        for j in range(min(COLUMNS, width - q * COLUMNS)):
                            y[clip, t, h, q * COLUMNS + j] = out[h - h0, q, i, j]
