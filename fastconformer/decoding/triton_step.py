"""The Triton kernels of a transducer's greedy step on a GPU; `fused_step` puts them together.

Letters: B clips, W frames of the window, J width of the joint, H of the prediction network.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = {"relu": 0, "tanh": 1, "sigmoid": 2}
BLOCK = 1024


def window_hidden(
    projected: Tensor, predicted: Tensor, frame: Tensor, lengths: Tensor, starts: Tensor,
    window: int, activation: str,
) -> Tensor:  # fmt: skip
    """The joint's hidden layer of W frames from each clip's own on: projected (rows, J), predicted
    (B, J), the others (B,) -> (B, W, J). Beyond its end a clip's last frame stands."""
    batch, width = predicted.shape
    out = predicted.new_empty(batch, window, width)
    _window_kernel[(batch * window,)](
        projected, predicted, frame, lengths, starts, out, window, width, ACTIVATIONS[activation],
        triton.next_power_of_2(width),
    )  # fmt: skip
    return out


def read_logits(
    logits: Tensor, bias: Tensor | None, n_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (rows, V+1+N), bias (V+1) or None, n_tokens V+1 -> of each row the best token, the
    best duration class (0 without), and the token's log-probability."""
    rows, n_outputs = logits.shape
    tokens, classes = (logits.new_empty(rows, dtype=torch.long) for _ in range(2))
    scores = logits.new_empty(rows, dtype=torch.float32)
    _read_kernel[(rows,)](
        logits, logits if bias is None else bias, tokens, classes, scores, n_tokens, n_outputs,
        bias is not None, min(BLOCK, triton.next_power_of_2(n_tokens)),
        triton.next_power_of_2(max(1, n_outputs - n_tokens)),
    )  # fmt: skip
    return tokens, classes, scores


def take_label(
    tokens: Tensor, classes: Tensor, scores: Tensor, durations: Tensor | None, frame: Tensor,
    on_frame: Tensor, lengths: Tensor, int_record: Tensor, float_record: Tensor, blank: int,
    max_symbols: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Moves each clip over the blanks of its window to the next label and past it, and writes what
    it found: tokens, classes, scores (B W,); frame, on_frame, lengths (B,); the records (3, B) and
    (2, B). `max_symbols` 0: no limit. Returns whether there is a label (B,) bool, and it, else
    0."""
    batch = len(frame)
    found = torch.empty(batch, dtype=torch.bool, device=frame.device)
    label = torch.empty_like(frame)
    _label_kernel[(batch,)](
        tokens, classes, scores, frame if durations is None else durations, frame, on_frame,
        lengths, int_record, float_record, found.view(torch.uint8), label, batch,
        len(tokens) // max(1, batch), blank, max_symbols, durations is not None, num_warps=1,
    )  # fmt: skip
    return found, label


def lstm_state(of_input: Tensor, of_state: Tensor, h: Tensor, c: Tensor, found: Tensor) -> Tensor:
    """An LSTM cell behind its two products (B, 4H): the new output (B, H), which h and c (B, H)
    take only where found."""
    batch, hidden = h.shape
    out = torch.empty_like(h)
    block = min(BLOCK, triton.next_power_of_2(hidden))
    _lstm_kernel[(batch, triton.cdiv(hidden, block))](
        of_input, of_state, h, c, found.view(torch.uint8), out, hidden, block
    )
    return out


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    y = (1 - e) / (1 + e)
    return tl.where(x < 0, -y, y)


@triton.jit(do_not_specialize=["window"])
def _window_kernel(
    projected_ptr, predicted_ptr, frame_ptr, lengths_ptr, starts_ptr, out_ptr, window, width,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    clip, place = tl.program_id(0) // window, tl.program_id(0) % window
    last = tl.maximum(tl.load(lengths_ptr + clip) - 1, 0)
    row = tl.load(starts_ptr + clip) + tl.minimum(tl.load(frame_ptr + clip) + place, last)
    j = tl.arange(0, BLOCK)
    inside = j < width
    x = tl.load(projected_ptr + row * width + j, mask=inside, other=0.0)
    x += tl.load(predicted_ptr + clip * width + j, mask=inside, other=0.0)
    y = x.to(tl.float32)
    if ACTIVATION == 0:
        y = tl.where(y < 0, 0.0, y)  # NaN stays
    elif ACTIVATION == 1:
        y = _tanh(y)
    else:
        y = _sigmoid(y)
    out = out_ptr + tl.program_id(0) * width + j
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_tokens"])
def _read_kernel(
    logits_ptr, bias_ptr, tokens_ptr, classes_ptr, scores_ptr, n_tokens, n_outputs,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * n_outputs
    best = float("-inf")  # not in one line: Triton 3.3 knows no tuples of numbers
    token = 0
    total = 0.0
    for start in range(0, n_tokens, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + v, mask=v < n_tokens, other=float("-inf"))
        if HAS_BIAS:
            z += tl.load(bias_ptr + v, mask=v < n_tokens, other=0.0)
        z = z.to(tl.float32)
        top = tl.max(z, 0)
        first = tl.min(tl.where(z == top, v, n_tokens), 0)
        token = tl.where(top > best, first, token)
        new = tl.maximum(best, top)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(best - safe) + tl.sum(tl.exp(z - safe), 0)
        best = new
    n = tl.arange(0, BLOCK_N)
    is_class = n < n_outputs - n_tokens
    z = tl.load(logits_ptr + n_tokens + n, mask=is_class, other=float("-inf")).to(tl.float32)
    which = tl.min(tl.where(z == tl.max(z, 0), n, BLOCK_N), 0)
    which = tl.where(which < n_outputs - n_tokens, which, 0)  # of NaN none is the largest
    tl.store(tokens_ptr + row, token)
    tl.store(classes_ptr + row, which)
    tl.store(scores_ptr + row, -tl.log(total))


@triton.jit(do_not_specialize=["batch", "window", "blank", "max_symbols"])
def _label_kernel(
    tokens_ptr, classes_ptr, scores_ptr, durations_ptr, frame_ptr, on_frame_ptr, lengths_ptr,
    int_ptr, float_ptr, found_ptr, label_ptr, batch, window, blank, max_symbols,
    HAS_DURATIONS: tl.constexpr,
):  # fmt: skip
    clip = tl.program_id(0)
    begin = clip * window
    frame, length = tl.load(frame_ptr + clip), tl.load(lengths_ptr + clip)
    moved = 0
    for _ in range(window):
        at = begin + tl.minimum(moved, window - 1)
        move = 1
        if HAS_DURATIONS:
            move = tl.maximum(tl.load(durations_ptr + tl.load(classes_ptr + at)), 1).to(tl.int32)
        blanks = (tl.load(tokens_ptr + at) == blank) & (frame + moved < length)
        moved += tl.where(blanks & (moved < window), move, 0)
    frame += moved
    on_frame = tl.where(moved > 0, 0, tl.load(on_frame_ptr + clip))
    found = (moved < window) & (frame < length)
    at = begin + tl.minimum(moved, window - 1)
    token = tl.load(tokens_ptr + at)
    if HAS_DURATIONS:
        skip = tl.load(durations_ptr + tl.load(classes_ptr + at))
    else:
        skip = (token == blank).to(tl.int64)
    tl.store(int_ptr + clip, tl.where(found, token, -1))
    tl.store(int_ptr + batch + clip, frame)
    tl.store(int_ptr + 2 * batch + clip, skip)
    tl.store(float_ptr + clip, tl.load(scores_ptr + at))
    skip = tl.where(found, skip, 0)
    on_frame = tl.where(skip > 0, 0, on_frame + found.to(tl.int64))
    stuck = (max_symbols > 0) & (on_frame >= max_symbols)
    tl.store(frame_ptr + clip, frame + skip + stuck.to(tl.int64))
    tl.store(on_frame_ptr + clip, tl.where(stuck, 0, on_frame))
    tl.store(found_ptr + clip, found.to(tl.uint8))
    tl.store(label_ptr + clip, tl.where(found, token, 0))


@triton.jit
def _lstm_kernel(
    of_input_ptr, of_state_ptr, h_ptr, c_ptr, found_ptr, out_ptr, hidden, BLOCK: tl.constexpr
):
    clip = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = j < hidden
    gates = clip * 4 * hidden + j
    take = _gate(of_input_ptr, of_state_ptr, gates, inside)
    keep = _gate(of_input_ptr, of_state_ptr, gates + hidden, inside)
    new = _gate(of_input_ptr, of_state_ptr, gates + 2 * hidden, inside)
    show = _gate(of_input_ptr, of_state_ptr, gates + 3 * hidden, inside)
    at = clip * hidden + j
    c = tl.load(c_ptr + at, mask=inside, other=0.0).to(tl.float32)
    c = _sigmoid(keep) * c + _sigmoid(take) * _tanh(new)
    h = (_sigmoid(show) * _tanh(c)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, h, mask=inside)
    kept = inside & (tl.load(found_ptr + clip + tl.zeros_like(j)) != 0)
    tl.store(h_ptr + at, h, mask=kept)
    tl.store(c_ptr + at, c.to(c_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _gate(of_input_ptr, of_state_ptr, at, inside):
    x = tl.load(of_input_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return x + tl.load(of_state_ptr + at, mask=inside, other=0.0).to(tl.float32)
