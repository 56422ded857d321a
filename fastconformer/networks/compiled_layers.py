"""What lies between the encoder's matrix products on a CPU, as compiled functions (numba).

In PyTorch each is a chain of passes over memory, in bfloat16 with a conversion in every one. Here
numbers are read once, all arithmetic is float32, and results are written in the tensor's type. Rows
are dealt out to threads; a row's result does not depend on the others.

Importing this module needs numba. The kernels compile at their first call, for some seconds, and
are cached on disk. Letters: B clips, T frames, D width, H heads, N queries.
"""

import numpy as np
import torch
from numba import njit, prange

from ..compiled import (
    REORDER,
    array,
    bits_of_float32,
    exp_of,
    float32_of_bits,
    kernel,
    narrow,
    sigmoid,
    threads,
    wide,
)
from ..config.encoder import output_length

_ROWS = 32  # frames of one convolution; those beside them are gated twice
_GROUPS = 16  # parts of the rows of other kernels, for any number of threads up to it


# --- the convolution ----------------------------------------------------------------------------


def gated_convolution(
    x: torch.Tensor, pad_mask: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, left: int
) -> torch.Tensor:
    """GLU, zeros on padding, depthwise convolution, SiLU. x (B, T, 2D), pad_mask (B, T) True on
    padding, weight (K, D) and bias (D,) float32, `left` of the K frames before -> (B, T, D)."""
    b, t, width = x.shape
    out = x.new_empty(b, t, width // 2)
    pieces = -(-t // _ROWS)
    gated = torch.empty(
        b * pieces, _ROWS + len(weight) - 1, width // 2, dtype=torch.float32, device="cpu"
    )
    with threads(x.numel()):
        _convolve(
            array(x.contiguous()), pad_mask.contiguous().numpy(), array(weight), array(bias), left,
            array(gated), array(out),
        )  # fmt: skip
    return out


@kernel
def _convolve(x, pad_mask, weight, bias, left, gated, out):
    pieces = gated.shape[0] // x.shape[0]
    for part in prange(gated.shape[0]):
        _convolve_piece(x, pad_mask, weight, bias, left, gated, out, part, pieces)


@njit(fastmath={"contract"}, error_model="numpy")
def _convolve_piece(x, pad_mask, weight, bias, left, gated, out, part, pieces):
    n_taps, width = weight.shape
    b, first = part // pieces, part % pieces * _ROWS
    n = min(_ROWS, x.shape[1] - first)
    for r in range(n + n_taps - 1):
        t = first + r - left
        if t < 0 or t >= x.shape[1] or pad_mask[b, t]:
            for d in range(width):
                gated[part, r, d] = np.float32(0)
        else:
            for d in range(width):
                gated[part, r, d] = wide(x[b, t, d]) * sigmoid(wide(x[b, t, width + d]))
    for r in range(n):
        for d in range(width):
            # in the place of a row that no later one needs
            total = bias[d] + weight[0, d] * gated[part, r, d]
            gated[part, r, d] = total
        for k in range(1, n_taps):
            for d in range(width):
                gated[part, r, d] += weight[k, d] * gated[part, r + k, d]
        for d in range(width):
            total = gated[part, r, d]
            out[b, first + r, d] = narrow(total * sigmoid(total), out)


# --- the subsampling ----------------------------------------------------------------------------


def subsampling_start(
    x: torch.Tensor,
    lengths: torch.Tensor,
    first: torch.nn.Conv2d,
    depthwise: torch.nn.Conv2d,
    causal: bool,
) -> torch.Tensor:
    """The first convolution (3 x 3, stride 2), ReLU, zeros on padding, the depthwise convolution
    that follows; what lies between stays in the caches. x (B, T, M); lengths (B,) of it -> (B, T'',
    M'', C)."""
    (b, t, m), channels, before = x.shape, first.out_channels, 2 if causal else 1  # zeros
    t1, m1 = output_length(t, 2, causal), output_length(m, 2, causal)
    out = x.new_empty(b, output_length(t, 4, causal), output_length(m, 4, causal), channels)
    both = torch.stack((lengths, output_length(lengths, 2, causal)))
    weights = _taps(first), _taps(depthwise)
    with threads(4 * out.numel()) as groups:
        inputs = torch.zeros(groups, 3, m + before + 1, dtype=torch.float32, device="cpu")
        room = torch.zeros(groups, 3, m1 + before + 1, channels, dtype=torch.float32, device="cpu")
        _start(
            array(x.contiguous()), both.numpy(), *weights, before, t1, array(inputs),
            array(room), array(out),
        )  # fmt: skip
    return out


def _taps(conv: torch.nn.Conv2d) -> np.ndarray:
    """Weight (C, 1, 3, 3) and bias as (10, C), copied: what numpy has seen, FSDP cannot free."""
    both = torch.cat((conv.weight.detach().flatten(1), conv.bias.detach()[:, None]), 1)
    return array(both.float().t().contiguous())


@kernel
def _start(x, lengths, w, w2, before, t1, inputs, room, out):
    groups, n_rows = room.shape[0], out.shape[0] * out.shape[1]
    for group in prange(groups):
        start, stop = group * n_rows // groups, (group + 1) * n_rows // groups
        for i in range(start, stop):
            b, t = i // out.shape[1], i % out.shape[1]
            for a in range(0 if i == start or t == 0 else 1, 3):  # else the last of those before
                row = 2 * t - before + a
                slot = room[group, (row + 3) % 3]
                if row < 0 or row >= min(lengths[1, b], t1):
                    slot[:] = np.float32(0)
                else:
                    n_frames = min(lengths[0, b], x.shape[1])
                    _gather(x[b], n_frames, 2 * row - before, before, inputs[group])
                    _first_row(inputs[group], w, before, slot)
            _strided_row(room[group], 2 * t - before, w2, out[b, t])


@njit(error_model="numpy")
def _gather(x, n_frames, first, before, out):
    """Three frames from `first` on, between zeros."""
    for a in range(3):
        t = first + a
        for m in range(x.shape[1]):
            valid = t >= 0 and t < n_frames
            out[a, before + m] = wide(x[t, m]) if valid else np.float32(0)


@njit(fastmath={"contract"}, error_model="numpy")
def _first_row(x, w, before, out):
    """ReLU of the convolution, between zeros. x (3, M + before + 1) -> out (M' + before + 1, C)."""
    for i in range(out.shape[0] - before - 1):
        m = 2 * i
        for c in range(out.shape[1]):
            total = w[9, c]
            total += w[0, c] * x[0, m] + w[1, c] * x[0, m + 1] + w[2, c] * x[0, m + 2]
            total += w[3, c] * x[1, m] + w[4, c] * x[1, m + 1] + w[5, c] * x[1, m + 2]
            total += w[6, c] * x[2, m] + w[7, c] * x[2, m + 1] + w[8, c] * x[2, m + 2]
            out[before + i, c] = total if total > 0 else total * np.float32(0)  # NaN stays


@njit(fastmath={"contract"}, error_model="numpy")
def _strided_row(x, first, w, out):
    """A row of the depthwise convolution of three rows, in the slots of their numbers from `first`
    on. x (3, M' + before + 1, C) -> out (M'', C)."""
    x0, x1, x2 = x[(first + 3) % 3], x[(first + 4) % 3], x[(first + 5) % 3]
    for i in range(out.shape[0]):
        m = 2 * i
        for c in range(out.shape[1]):
            total = w[9, c]
            total += w[0, c] * x0[m, c] + w[1, c] * x0[m + 1, c] + w[2, c] * x0[m + 2, c]
            total += w[3, c] * x1[m, c] + w[4, c] * x1[m + 1, c] + w[5, c] * x1[m + 2, c]
            total += w[6, c] * x2[m, c] + w[7, c] * x2[m + 1, c] + w[8, c] * x2[m + 2, c]
            out[i, c] = narrow(total, out)


# --- attention ----------------------------------------------------------------------------------


def softmax_of_sums(
    scores: torch.Tensor,
    position: torch.Tensor,
    hidden: torch.Tensor | None,
    scale: float,
    reach: tuple[int, int],
) -> None:
    """Softmax over keys of `scale` times both scores of N successive queries, in the place of
    `scores`. scores (B, H, N, T) by key; position (H, B, N, T+N-1) by falling distance. The i-th
    query sees the keys from i - reach[0] to i + reach[1] that `hidden` (B, 1, 1 or N, T) does not
    say are hidden; where it hides all of them, it sees them evenly."""
    b, h, n, t = scores.shape
    room = torch.empty(min(_GROUPS, b * h * n), t, dtype=torch.float32, device="cpu")
    if hidden is None:
        hidden = torch.empty(0, 1, 1, t, dtype=torch.bool, device="cpu")
    with threads(scores.numel()):
        _softmax(
            array(scores.flatten(0, 2)), array(position.flatten(0, 2)), array(hidden.contiguous()),
            np.float32(scale), reach, (b, h, n), array(room),
        )  # fmt: skip


@kernel
def _softmax(scores, position, hidden, scale, reach, sizes, room):
    groups = room.shape[0]
    for group in prange(groups):
        first, last = group * scores.shape[0] // groups, (group + 1) * scores.shape[0] // groups
        for row in range(first, last):
            _softmax_row(scores, position, hidden, scale, reach, sizes, room[group], row)


# Rows as arrays of their own: an index that is a sum may be negative for numba, which keeps LLVM
# from whole vectors.


@njit(fastmath={"contract"}, error_model="numpy")
def _add(scores, position, scale, out):
    for j in range(scores.shape[0]):
        out[j] = scale * (wide(scores[j]) + wide(position[j]))


@njit(error_model="numpy")
def _in_order(bits):
    """A float's bits as an integer of the same order, and back: of integers LLVM takes the largest
    with whole vectors."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit(error_model="numpy")
def _largest(row):
    top = np.int32(-0x80000000)
    for j in range(row.shape[0]):
        top = max(_in_order(bits_of_float32(row[j])), top)
    return float32_of_bits(_in_order(top))


@njit(fastmath=REORDER, error_model="numpy")
def _exponentials(row, top):
    total = np.float32(0)
    for j in range(row.shape[0]):
        e = exp_of(row[j] - top)
        row[j] = e
        total += e
    return total


@njit(fastmath={"contract"}, error_model="numpy")
def _times(row, factor, out):
    for j in range(row.shape[0]):
        out[j] = narrow(row[j] * factor, out)


_HIDDEN = np.float32(-1e38)


@njit(error_model="numpy")
def _softmax_row(scores, position, hidden, scale, reach, sizes, room, row):
    b, h, n = sizes
    query, head, clip, n_keys = row % n, row // n % h, row // n // h, scores.shape[1]
    first, last = max(0, query - reach[0]), min(n_keys, query + reach[1] + 1)
    sums, skipped = room[: last - first], n - 1 - query + first
    _add(scores[row, first:last], position[(head * b + clip) * n + query, skipped:], scale, sums)
    if hidden.shape[0] > 0:
        of_query = query if hidden.shape[2] > 1 else 0
        for j in range(last - first):
            if hidden[clip, 0, of_query, first + j]:
                sums[j] = _HIDDEN
    total = _exponentials(sums, _largest(sums))
    _times(sums, np.float32(1) / total, scores[row, first:last])
    for j in range(first):
        scores[row, j] = 0
    for j in range(last, n_keys):
        scores[row, j] = 0


# --- 8 bits -------------------------------------------------------------------------------------


def quantized(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rows (N, D) float32 -> uint8 with a zero point of 128, and each row's scale (N,): its largest
    magnitude over 127."""
    out, scale = (
        torch.empty(rows.shape, dtype=torch.uint8, device="cpu"),
        torch.empty(len(rows), dtype=torch.float32, device="cpu"),
    )
    with threads(rows.numel()):
        _quantize(array(rows), array(out), array(scale))
    return out, scale


@kernel
def _quantize(rows, out, scale):
    for row in prange(rows.shape[0]):
        scale[row] = _quantize_row(rows[row], out[row])


@njit(error_model="numpy")
def _quantize_row(row, out):
    top = np.int32(0)
    for d in range(row.shape[0]):  # magnitudes are in the order of their bits
        top = max(bits_of_float32(row[d]) & np.int32(0x7FFFFFFF), top)
    scale = max(float32_of_bits(top), np.float32(1e-12)) / np.float32(127)
    for d in range(row.shape[0]):
        out[d] = np.uint8(np.int32(np.rint(row[d] / scale)) + np.int32(128))
    return scale


_AFTER = {"none": 0, "swish": 1, "relu": 2}


def scaled(
    sums: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, after: str
) -> torch.Tensor:
    """`sums` (N, D) times each row's scale, plus the bias, then what comes after; in place."""
    bias = torch.zeros(sums.shape[1], dtype=torch.float32, device="cpu") if bias is None else bias
    with threads(sums.numel()):
        _scale(array(sums), array(scale), array(bias), _AFTER[after])
    return sums


@kernel
def _scale(sums, scale, bias, after):
    for row in prange(sums.shape[0]):
        _scale_row(sums[row], scale[row], bias, after)


@njit(fastmath={"contract"}, error_model="numpy")
def _scale_row(row, scale, bias, after):
    if after == 1:
        for d in range(row.shape[0]):
            total = bias[d] + row[d] * scale
            row[d] = total * sigmoid(total)
    elif after == 2:
        for d in range(row.shape[0]):
            row[d] = max(bias[d] + row[d] * scale, np.float32(0))
    else:
        for d in range(row.shape[0]):
            row[d] = bias[d] + row[d] * scale
