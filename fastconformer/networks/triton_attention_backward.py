"""Attention with relative positions on a GPU, scores never in memory: the backward Triton kernels.

With the weights A = exp2(S - sums) computed anew from the scores S, and what dropout kept:
dS = A (dO V^T - dO O^T's diagonal), dQ = dS K + dS' P, dK = dS^T (Q + u), dP = dS'^T (Q + w), where
' rotates rows from keys to distances. Three kernels, each with a program for BLOCK rows of what it
sums, in a fixed order and without atomics: queries, keys with values, distances. The distances are
those of all clips; programs for a share of the clips each write sums of their own, which PyTorch
adds. The gradients of u and w come out of the sums of dS over queries, by key and by distance.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_attention import (
    LOG2_E,
    SIZES,
    interpreted,
    kept,
    of_distances,
    precision,
    row_bits,
    threshold,
)

PROGRAMS = 1024  # of the kernel of the distances, where the clips are enough


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    bias_u: Tensor,
    bias_v: Tensor,
    hidden: Tensor,
    out: Tensor,
    sums: Tensor,
    dropout: float,
    seed: int,
    of_positions: bool,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, p, bias_u and bias_v, p's and bias_v's empty unless `of_positions`.
    `grad` (B, T, H K) of `out`; the rest as `triton_attention.attention` takes and gives it."""
    (batch, n_frames, _), (n_heads, head) = q.shape, bias_u.shape
    q, k, v, p, hidden, grad = (x.contiguous() for x in (q, k, v, p, hidden, grad))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    if not q.numel():
        nothing = p, bias_u, bias_v
        return dq, dk, dv, *(torch.zeros_like(x) for x in nothing)
    delta = torch.empty_like(sums)
    block_k = max(16, triton.next_power_of_2(head))
    block, stages, warps = (16, 1, 4) if interpreted() else _block(block_k, q.dtype)
    blocks, lanes = triton.cdiv(n_frames, block), batch * n_heads
    inputs = q, k, v, p, bias_u, bias_v, hidden.view(torch.uint8), sums, grad
    sizes = (
        n_frames, n_heads, 0 if len(hidden) == 1 else hidden.stride(0), seed, head**-0.5 * LOG2_E,
        head, hidden.shape[2] > 1, threshold(dropout), precision(), block, block_k,
    )  # fmt: skip
    options = {"num_warps": warps, "num_stages": stages}
    _query_kernel[(blocks, lanes)](*inputs, out, delta, dq, *sizes, **options)
    of_u = sums.new_empty(blocks, batch, *bias_u.shape)
    # with two stages on their way it spills
    _key_kernel[(blocks, lanes)](
        *inputs, delta, dk, dv, of_u, *sizes, num_warps=warps, num_stages=1
    )
    du = of_u.sum((0, 1)).to(bias_u.dtype)
    if not of_positions:
        return dq, dk, dv, p.new_empty(0), du, bias_v.new_empty(0)
    blocks = triton.cdiv(len(p), block)
    shares = max(1, min(batch, PROGRAMS // (blocks * n_heads)))
    of_p = sums.new_empty(shares, *p.shape)
    of_w = sums.new_empty(blocks, shares, *bias_v.shape)
    _distance_kernel[(blocks, n_heads, shares)](
        *inputs, delta, of_p, of_w, batch, *sizes, **options
    )
    dp = of_p.sum(0).to(p.dtype)
    return dq, dk, dv, dp, du, of_w.sum((0, 1)).to(bias_v.dtype)


def _block(block_k: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(frames of a block, stages, warps): as compiled, the largest that spill next to nothing."""
    if dtype == torch.float32:
        return 16, 1, 4
    return (32, 1, 4) if block_k <= 64 else (32, 2, 8)


@triton.jit
def _rows(ptr, row, stride, c, is_channel):
    """(M, K) of the memory from `ptr` on."""
    return tl.load(ptr + row[:, None] * stride + c[None, :], mask=is_channel[None, :], other=0.0)


@triton.jit
def _sums_of(sums_ptr, row, n_frames):
    """Logarithms of sums of rows, infinite where there is no such row, whose weights are 0 so; and
    the scores of keys that may not be seen, which count alike where there are no others."""
    of_row = tl.load(sums_ptr + tl.minimum(row, n_frames - 1))
    nothing = of_row < -1e29
    of_row = tl.where(nothing, tl.log2(n_frames.to(tl.float32)), of_row)
    of_row = tl.where(row < n_frames, of_row, float("inf"))
    return of_row, tl.where(nothing, 0.0, -1e30)


@triton.jit
def _unseen(hidden_ptr, row, key, n_frames, BY_QUERY: tl.constexpr):
    at = hidden_ptr + key
    if BY_QUERY:
        at += row.to(tl.int64) * n_frames
    return tl.load(at) != 0


@triton.jit
def _gradient(
    score, of_value, of_sum, fill, delta, unseen, bits, key, THRESHOLD: tl.constexpr
):  # fmt: skip
    """Weights with dropout, but for its factor, and the scores' gradient but for theirs."""
    weight = tl.exp2(tl.where(unseen, fill, score) - of_sum)
    dropped = weight
    if THRESHOLD > 0:
        keep = kept(bits, key, THRESHOLD)
        dropped = tl.where(keep, weight, 0.0)
        of_value = tl.where(keep, of_value / (1.0 - THRESHOLD / 4294967296.0), 0.0)
    return dropped, tl.where(unseen, 0.0, weight * (of_value - delta))


@triton.jit(do_not_specialize=SIZES)
def _query_kernel(
    q_ptr, k_ptr, v_ptr, p_ptr, u_ptr, w_ptr, hidden_ptr, sums_ptr, grad_ptr, out_ptr, delta_ptr,
    dq_ptr, n_frames, n_heads, clip_stride, seed, scale, WIDTH: tl.constexpr,
    BY_QUERY: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As the forward pass; at the end of a step the gradients of half of the distances are whole,
    and those of the other half are kept for the next."""
    clip = (tl.program_id(1) // n_heads).to(tl.int64)
    head = tl.program_id(1) % n_heads
    stride = n_heads * WIDTH
    begin = clip * n_frames * stride + head * WIDTH
    lane = tl.program_id(1).to(tl.int64) * n_frames
    hidden_ptr += clip * clip_stride
    p_ptr += head * WIDTH
    m = tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK_K)
    is_channel = c < WIDTH
    first = tl.program_id(0) * BLOCK
    row = tl.minimum(first + m, n_frames - 1)
    u = tl.load(u_ptr + head * WIDTH + c, mask=is_channel, other=0.0)
    w = tl.load(w_ptr + head * WIDTH + c, mask=is_channel, other=0.0)
    more = w.to(tl.float32) - u.to(tl.float32)
    q = _rows(q_ptr + begin, row, stride, c, is_channel)
    query = (q + u[None, :]).to(q.dtype)
    grad = _rows(grad_ptr + begin, row, stride, c, is_channel)
    out = _rows(out_ptr + begin, row, stride, c, is_channel)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + lane + row, delta, mask=first + m < n_frames)
    of_sum, fill = _sums_of(sums_ptr + lane, first + m, n_frames)
    bits = row_bits(seed, lane, row) if THRESHOLD > 0 else row
    early = m[None, :] >= (BLOCK - 1 - m)[:, None]
    to_key = ((BLOCK - 1 - m)[:, None] + m[None, :]) % BLOCK
    to_distance = (m[:, None] + m[None, :] + 1) % BLOCK
    last = 2 * n_frames - 2
    distance = n_frames - first - BLOCK + m
    low = of_distances(query, more, p_ptr, distance, last, c, is_channel, stride, PRECISION)
    before = tl.zeros((BLOCK, BLOCK), q.dtype)
    dq = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for start in range(0, n_frames, BLOCK):
        key = start + m
        at = tl.minimum(key, n_frames - 1)
        k = _rows(k_ptr + begin, at, stride, c, is_channel)
        v = _rows(v_ptr + begin, at, stride, c, is_channel)
        high = of_distances(
            query, more, p_ptr, distance + start + BLOCK, last, c, is_channel, stride, PRECISION
        )
        score = tl.gather(tl.where(early, low, high), to_key, 1)
        low = high
        score = tl.dot(query, tl.trans(k), score, input_precision=PRECISION) * scale
        of_value = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        unseen = _unseen(hidden_ptr, row[:, None], at[None, :], n_frames, BY_QUERY)
        _, ds = _gradient(
            score, of_value, of_sum[:, None], fill[:, None], delta[:, None], unseen, bits[:, None],
            key[None, :], THRESHOLD,
        )  # fmt: skip
        ds = tl.where((key < n_frames)[None, :], ds, 0.0).to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        ds = tl.gather(ds, to_distance, 1)
        at = tl.minimum(tl.maximum(distance + start, 0), last)
        p = _rows(p_ptr, at, stride, c, is_channel)
        dq = tl.dot(tl.where(early, ds, before), p, dq, input_precision=PRECISION)
        before = tl.where(early, 0.0, ds).to(q.dtype)
    at = distance + tl.cdiv(n_frames, BLOCK) * BLOCK
    p = _rows(p_ptr, tl.minimum(tl.maximum(at, 0), last), stride, c, is_channel)
    dq = tl.dot(before, p, dq, input_precision=PRECISION) * (scale * 0.6931471805599453)
    tl.store(
        dq_ptr + begin + row[:, None] * stride + c[None, :], dq.to(dq_ptr.dtype.element_ty),
        mask=(first + m < n_frames)[:, None] & is_channel[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _key_kernel(
    q_ptr, k_ptr, v_ptr, p_ptr, u_ptr, w_ptr, hidden_ptr, sums_ptr, grad_ptr, delta_ptr, dk_ptr,
    dv_ptr, of_u_ptr, n_frames, n_heads, clip_stride, seed, scale, WIDTH: tl.constexpr,
    BY_QUERY: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores stand here with keys in rows and queries in columns."""
    clip = (tl.program_id(1) // n_heads).to(tl.int64)
    head = tl.program_id(1) % n_heads
    stride = n_heads * WIDTH
    begin = clip * n_frames * stride + head * WIDTH
    lane = tl.program_id(1).to(tl.int64) * n_frames
    hidden_ptr += clip * clip_stride
    p_ptr += head * WIDTH
    m = tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK_K)
    is_channel = c < WIDTH
    first = tl.program_id(0) * BLOCK
    key = tl.minimum(first + m, n_frames - 1)
    u = tl.load(u_ptr + head * WIDTH + c, mask=is_channel, other=0.0)
    w = tl.load(w_ptr + head * WIDTH + c, mask=is_channel, other=0.0)
    more = w.to(tl.float32) - u.to(tl.float32)
    k = _rows(k_ptr + begin, key, stride, c, is_channel)
    v = _rows(v_ptr + begin, key, stride, c, is_channel)
    early = m[:, None] >= (BLOCK - 1 - m)[None, :]
    to_key = (m[:, None] + (BLOCK - 1 - m)[None, :]) % BLOCK
    last = 2 * n_frames - 2
    dk = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    by_key = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_frames, BLOCK):
        row = tl.minimum(start + m, n_frames - 1)
        q = _rows(q_ptr + begin, row, stride, c, is_channel)
        query = (q + u[None, :]).to(q.dtype)
        grad = _rows(grad_ptr + begin, row, stride, c, is_channel)
        delta = tl.load(delta_ptr + lane + row)
        of_sum, fill = _sums_of(sums_ptr + lane, start + m, n_frames)
        bits = row_bits(seed, lane, row) if THRESHOLD > 0 else row
        at = n_frames - start - BLOCK + first + m
        low = _of_queries(p_ptr, at, last, query, more, stride, c, is_channel, PRECISION)
        high = _of_queries(p_ptr, at + BLOCK, last, query, more, stride, c, is_channel, PRECISION)
        score = tl.gather(tl.where(early, low, high), to_key, 0)
        score = tl.dot(k, tl.trans(query), score, input_precision=PRECISION) * scale
        of_value = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        unseen = _unseen(hidden_ptr, row[None, :], key[:, None], n_frames, BY_QUERY)
        weight, ds = _gradient(
            score, of_value, of_sum[None, :], fill[None, :], delta[None, :], unseen, bits[None, :],
            key[:, None], THRESHOLD,
        )  # fmt: skip
        dv = tl.dot(weight.to(q.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), query, dk, input_precision=PRECISION)
        by_key += tl.sum(ds, 1)
    factor = scale * 0.6931471805599453
    to = begin + key[:, None] * stride + c[None, :]
    inside = (first + m < n_frames)[:, None] & is_channel[None, :]
    tl.store(dk_ptr + to, (dk * factor).to(dk_ptr.dtype.element_ty), mask=inside)
    if THRESHOLD > 0:
        dv = dv / (1.0 - THRESHOLD / 4294967296.0)
    tl.store(dv_ptr + to, dv.to(dv_ptr.dtype.element_ty), mask=inside)
    by_key = tl.where(first + m < n_frames, by_key, 0.0) * factor
    of_u = tl.sum(k.to(tl.float32) * by_key[:, None], 0)
    to = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * WIDTH
    tl.store(of_u_ptr + to + c, of_u, mask=is_channel)


@triton.jit
def _of_queries(
    p_ptr, row, last, query, more, stride, c, is_channel, PRECISION: tl.constexpr
):  # fmt: skip
    """`of_distances` with the distances in rows."""
    row = tl.minimum(tl.maximum(row, 0), last)
    p = _rows(p_ptr, row, stride, c, is_channel)
    of_bias = tl.sum(p.to(tl.float32) * more[None, :], 1)
    return tl.dot(p, tl.trans(query), input_precision=PRECISION) + of_bias[:, None]


@triton.jit(do_not_specialize=[*SIZES, "n_clips"])
def _distance_kernel(
    q_ptr, k_ptr, v_ptr, p_ptr, u_ptr, w_ptr, hidden_ptr, sums_ptr, grad_ptr, delta_ptr, of_p_ptr,
    of_w_ptr, n_clips, n_frames, n_heads, clip_stride, seed, scale, WIDTH: tl.constexpr,
    BY_QUERY: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Distances in rows and queries in columns: query m and distance c meet in key c + m of two
    blocks of keys, from whose products each takes the half that it wants."""
    head = tl.program_id(1)
    stride = n_heads * WIDTH
    p_ptr += head * WIDTH
    m = tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK_K)
    is_channel = c < WIDTH
    first = tl.program_id(0) * BLOCK
    last = 2 * n_frames - 2
    distance = first + m
    u = tl.load(u_ptr + head * WIDTH + c, mask=is_channel, other=0.0)
    w = tl.load(w_ptr + head * WIDTH + c, mask=is_channel, other=0.0)
    more = w.to(tl.float32) - u.to(tl.float32)
    p = _rows(p_ptr, tl.minimum(distance, last), stride, c, is_channel)
    of_bias = tl.sum(p.to(tl.float32) * more[None, :], 1)
    early = m[:, None] >= m[None, :]
    to_distance = (m[:, None] + m[None, :]) % BLOCK
    dp = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    by_distance = tl.zeros((BLOCK,), tl.float32)
    # queries that have a key at one of these distances
    begin = tl.maximum(0, n_frames - BLOCK - first)
    end = tl.minimum(n_frames, 2 * n_frames - 1 - first)
    frames = tl.cast(n_frames, tl.int64)
    clip_size = tl.cast(clip_stride, tl.int64)
    for clip in range(tl.program_id(2), n_clips, tl.num_programs(2)):
        lane = (frames * n_heads) * clip + head * n_frames
        at_clip = (frames * stride) * clip + head * WIDTH
        seen_ptr = hidden_ptr + clip_size * clip
        for start in range(begin, end, BLOCK):
            row = tl.minimum(start + m, n_frames - 1)
            q = _rows(q_ptr + at_clip, row, stride, c, is_channel)
            query = (q + u[None, :]).to(q.dtype)
            grad = _rows(grad_ptr + at_clip, row, stride, c, is_channel)
            delta = tl.load(delta_ptr + lane + row)
            of_sum, fill = _sums_of(sums_ptr + lane, start + m, n_frames)
            bits = row_bits(seed, lane, row) if THRESHOLD > 0 else row
            base = first - n_frames + 1 + start
            score, of_value = _of_keys(
                k_ptr + at_clip, v_ptr + at_clip, base + m, n_frames, query, grad, early, stride, c,
                is_channel, to_distance, PRECISION, BLOCK,
            )  # fmt: skip
            score = tl.dot(p, tl.trans(query), score, input_precision=PRECISION)
            score = (score + of_bias[:, None]) * scale
            key = base + m[:, None] + m[None, :]
            at = tl.minimum(tl.maximum(key, 0), n_frames - 1)
            unseen = _unseen(seen_ptr, row[None, :], at, n_frames, BY_QUERY)
            _, ds = _gradient(
                score, of_value, of_sum[None, :], fill[None, :], delta[None, :], unseen,
                bits[None, :], key, THRESHOLD,
            )  # fmt: skip
            ds = tl.where((key >= 0) & (key < n_frames), ds, 0.0)
            dp = tl.dot(ds.to(q.dtype), query, dp, input_precision=PRECISION)
            by_distance += tl.sum(ds, 1)
    factor = scale * 0.6931471805599453
    by_distance *= factor
    dp = dp * factor + by_distance[:, None] * more[None, :]
    to = (tl.program_id(2).to(tl.int64) * (last + 1) + distance) * stride + head * WIDTH
    inside = (distance <= last)[:, None] & is_channel[None, :]
    tl.store(of_p_ptr + to[:, None] + c[None, :], dp, mask=inside)
    of_w = tl.sum(p.to(tl.float32) * by_distance[:, None], 0)
    to = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    to = (to * n_heads + head) * WIDTH
    tl.store(of_w_ptr + to + c, of_w, mask=is_channel)


@triton.jit
def _of_keys(
    k_ptr, v_ptr, key, n_frames, query, grad, early, stride, c, is_channel, to_distance,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Products of keys with queries and of values with gradients, by distance."""
    near = tl.minimum(tl.maximum(key, 0), n_frames - 1)
    far = tl.minimum(tl.maximum(key + BLOCK, 0), n_frames - 1)
    k, next_k = (
        _rows(k_ptr, near, stride, c, is_channel),
        _rows(k_ptr, far, stride, c, is_channel),
    )
    query, grad = tl.trans(query), tl.trans(grad)
    score = tl.where(
        early,
        tl.dot(k, query, input_precision=PRECISION),
        tl.dot(next_k, query, input_precision=PRECISION),
    )
    v, next_v = (
        _rows(v_ptr, near, stride, c, is_channel),
        _rows(v_ptr, far, stride, c, is_channel),
    )
    of_value = tl.where(
        early,
        tl.dot(v, grad, input_precision=PRECISION),
        tl.dot(next_v, grad, input_precision=PRECISION),
    )
    return tl.gather(score, to_distance, 0), tl.gather(of_value, to_distance, 0)
