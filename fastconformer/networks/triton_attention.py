"""Attention with relative positions on a GPU, scores never in memory: the forward Triton kernel.

A program has BLOCK queries of one head and walks over the keys, BLOCK at a time, with a running
maximum and sum (online softmax; arXiv:1805.02867). Between BLOCK queries and BLOCK keys lie
2 BLOCK - 1 distances; the next keys share half of them, so that one product of BLOCK x BLOCK a step
gives the scores of all. Of each row and column one of the two halves is wanted, and a rotation of
the rows brings it to the key that lies so far away.

What dropout keeps is a function of a seed, the query's row and the key, so that the backward pass
(triton_attention_backward.py) finds it again: Philox for a row, from which a hash leads to its keys
(a whole Philox for each weight would cost more than the products).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
SIZES = ("n_frames", "n_heads", "clip_stride", "seed")  # arguments that change from batch to batch
# (frames of a block, blocks on their way, warps), the best first. As compiled, 64 spill no register
# where the card has shared memory enough for two stages, which is where its products are wide, too.
BLOCKS = ((64, 2, 8), (32, 2, 4), (32, 1, 4), (16, 2, 4), (16, 1, 4))
WIDE_SHARED_BYTES = 200_000


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    bias_u: Tensor,
    bias_v: Tensor,
    hidden: Tensor,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """q, k, v (B, T, H K), p (2T-1, H K) projected positions of falling distance, biases (H, K),
    `hidden` (B or 1, 1, 1 or T, T) True where a key may not be seen; `dropout` of the weights.
    Returns (B, T, H K) and the logarithm, base 2, of each query's sum of exponentials, (B, H, T)
    float32."""
    batch, n_frames, width = q.shape
    n_heads, head = bias_u.shape
    assert n_frames * width < 1 << 30, "a clip's offsets are 32 bits wide"
    q, k, v, p, hidden = (x.contiguous() for x in (q, k, v, p, hidden))
    out = torch.empty_like(q)
    sums = q.new_empty(batch, n_heads, n_frames, dtype=torch.float32)
    if not q.numel():
        return out, sums
    block_k = max(16, triton.next_power_of_2(head))
    by_query = hidden.shape[2] > 1
    block, stages, warps = (16, 1, 4) if interpreted() else _block(block_k, q.dtype, by_query)
    _attention_kernel[(triton.cdiv(n_frames, block), batch * n_heads)](
        q, k, v, p, bias_u, bias_v, hidden.view(torch.uint8), out, sums, n_frames, n_heads,
        0 if len(hidden) == 1 else hidden.stride(0), seed, head**-0.5 * LOG2_E,
        head, by_query, threshold(dropout), precision(), block, block_k,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, sums


def interpreted() -> bool:
    return not isinstance(_attention_kernel, triton.JITFunction)


def _block(block_k: int, dtype: torch.dtype, by_query: bool) -> tuple[int, int, int]:
    """The first of BLOCKS that suits the card: in its shared memory lie the queries, and keys,
    values and positions for each stage."""
    active = triton.runtime.driver.active
    properties = active.utils.get_device_properties(active.get_current_device())
    shared = properties["max_shared_mem"]
    many = dtype == torch.float32 or (by_query and block_k > 64)  # registers, in blocks of 64
    first = int(many or shared < WIDE_SHARED_BYTES)
    if dtype == torch.float32 and block_k > 64:
        first = 3
    for choice in BLOCKS[first:]:
        block, stages, _ = choice
        if (1 + 3 * stages) * block * block_k * dtype.itemsize + 16_384 <= shared:
            break
    return choice


def precision() -> str:
    """Of float32 products: as torch's own may be; in three parts they keep float32's accuracy."""
    settings = torch.backends.cuda.matmul
    if hasattr(settings, "fp32_precision"):  # torch 2.9; then asking for the old names may raise
        return "tf32" if settings.fp32_precision == "tf32" else "tf32x3"
    return "tf32" if settings.allow_tf32 else "tf32x3"


def threshold(dropout: float) -> int:
    """32 random bits below it drop a weight."""
    return round(dropout * 2**32)


@triton.jit
def row_bits(seed, first, row):
    """Random bits of rows first + row, from which `kept` makes those of their keys."""
    return tl.randint(seed, first + row).to(tl.uint32)


@triton.jit
def kept(bits, key, THRESHOLD: tl.constexpr):
    """Whether dropout keeps the weights of rows with these bits and keys; the two broadcast."""
    x = bits + key.to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)) >= tl.full((), THRESHOLD, tl.uint32)


@triton.jit
def of_distances(
    query, more, p_ptr, row, last, c, is_channel, stride, PRECISION: tl.constexpr
):  # fmt: skip
    """Scores (M, M) of queries with rows of p; rows that do not exist repeat the first or last."""
    row = tl.minimum(tl.maximum(row, 0), last)
    at = p_ptr + row[None, :] * stride + c[:, None]
    p = tl.load(at, mask=is_channel[:, None], other=0.0)
    of_bias = tl.sum(p.to(tl.float32) * more[:, None], 0)
    return tl.dot(query, p, input_precision=PRECISION) + of_bias[None, :]


@triton.jit(do_not_specialize=SIZES)
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, p_ptr, u_ptr, v_bias_ptr, hidden_ptr, out_ptr, sums_ptr, n_frames, n_heads,
    clip_stride, seed, scale, WIDTH: tl.constexpr, BY_QUERY: tl.constexpr, THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    clip = (tl.program_id(1) // n_heads).to(tl.int64)
    head = tl.program_id(1) % n_heads
    stride = n_heads * WIDTH
    begin = clip * n_frames * stride + head * WIDTH
    m = tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK_K)
    is_channel = c < WIDTH
    first = tl.program_id(0) * BLOCK
    row = tl.minimum(first + m, n_frames - 1)
    q = tl.load(
        q_ptr + begin + row[:, None] * stride + c[None, :], mask=is_channel[None, :], other=0.0
    )
    u = tl.load(u_ptr + head * WIDTH + c, mask=is_channel, other=0.0)
    w = tl.load(v_bias_ptr + head * WIDTH + c, mask=is_channel, other=0.0)
    # one set of queries in registers: what the other bias adds depends on the distance alone
    query = (q + u[None, :]).to(q.dtype)
    more = w.to(tl.float32) - u.to(tl.float32)
    # Columns of two blocks of distances: query m and key n meet in BLOCK - 1 - m + n.
    early = m[None, :] >= (BLOCK - 1 - m)[:, None]
    rotated = ((BLOCK - 1 - m)[:, None] + m[None, :]) % BLOCK
    p_begin = p_ptr + head * WIDTH
    last = 2 * n_frames - 2
    rows = tl.program_id(1).to(tl.int64) * n_frames
    if THRESHOLD > 0:
        bits = row_bits(seed, rows, row)
    low = of_distances(
        query, more, p_begin, n_frames - first - BLOCK + m, last, c, is_channel, stride, PRECISION
    )
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for start in range(0, n_frames, BLOCK):
        key = start + m
        inside = key < n_frames
        at = tl.minimum(key, n_frames - 1)
        k = tl.load(
            k_ptr + begin + at[None, :] * stride + c[:, None], mask=is_channel[:, None], other=0.0
        )
        high = of_distances(
            query, more, p_begin, n_frames - first + key, last, c, is_channel, stride, PRECISION
        )
        score = tl.gather(tl.where(early, low, high), rotated, 1)
        low = high
        score = tl.dot(query, k, score, input_precision=PRECISION) * scale
        if BY_QUERY:
            unseen = tl.load(
                hidden_ptr + clip * clip_stride + row.to(tl.int64)[:, None] * n_frames + at[None, :]
            )
        else:
            unseen = tl.load(hidden_ptr + clip * clip_stride + at)[None, :]
        # finite, so that a query with nothing to see looks at all keys alike
        score = tl.where(unseen != 0, -1e30, score)
        score = tl.where(inside[None, :], score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp2(top - new)
        weight = tl.exp2(score - new[:, None])
        total = total * shrink + tl.sum(weight, 1)
        if THRESHOLD > 0:
            weight = tl.where(kept(bits[:, None], key[None, :], THRESHOLD), weight, 0.0)
        v = tl.load(
            v_ptr + begin + at[:, None] * stride + c[None, :], mask=is_channel[None, :], other=0.0
        )
        mixed = tl.dot(weight.to(v.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
        top = new
    tl.store(sums_ptr + rows + row, top + tl.log2(total), mask=first + m < n_frames)
    if THRESHOLD > 0:
        total *= 1.0 - THRESHOLD / 4294967296.0
    mixed = mixed / total[:, None]
    tl.store(
        out_ptr + begin + row[:, None] * stride + c[None, :], mixed.to(out_ptr.dtype.element_ty),
        mask=(first + m < n_frames)[:, None] & is_channel[None, :],
    )  # fmt: skip
