"""What lies between the matrix products of `dw_striding` subsampling, on a GPU: Triton kernels.

Rows are (frame, bin) with the channels last, as the products take them. The first two convolutions
are one kernel: for each tap of the depthwise one, the 3x3 convolution of the features is a product
of BLOCK_P x 16 with 16 x BLOCK_C (nine taps, the bias, six zeros), so that its output, a hundred
times the features, never reaches memory. The ReLU of a product is computed by who reads it.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..config.encoder import output_length

# of rows and of channels; a stage without a product has fewer rows, as its loads lie in registers
BLOCK_P, STAGE_BLOCK_P, BLOCK_C = 64, 32, 64


def start(
    features: Tensor, lengths: Tensor, weight: Tensor, bias: Tensor,
    depth_weight: Tensor, depth_bias: Tensor, causal: bool,
) -> Tensor:  # fmt: skip
    """features (B, M, T), lengths (B,), weights (C, 1, 3, 3), biases (C) -> (B, T/4, M/4, C): a
    convolution, ReLU and a depthwise convolution, both of stride 2, frames beyond a clip's length
    zeroed before each."""
    batch, n_bins, n_frames = features.shape
    channels = len(weight)
    inner, outer = (
        (output_length(n_frames, factor, causal), output_length(n_bins, factor, causal))
        for factor in (2, 4)
    )
    features = features if features.stride(2) == 1 else features.contiguous()
    out = features.new_empty(batch, *outer, channels)
    if not out.numel():
        return out
    block_c = min(BLOCK_C, max(16, triton.next_power_of_2(channels)))
    grid = triton.cdiv(outer[0] * outer[1], BLOCK_P), triton.cdiv(channels, block_c), batch
    _start_kernel[grid](
        features, lengths, *_contiguous(weight, bias, depth_weight, depth_bias), out,
        n_frames, n_bins, *inner, *outer, features.stride(0), features.stride(1), channels,
        causal, BLOCK_P, block_c, num_warps=4,
    )  # fmt: skip
    return out


def stage(
    x: Tensor, lengths: Tensor, weight: Tensor, bias: Tensor, factor: int, causal: bool
) -> Tensor:
    """x (B, T, M, C) before its ReLU, at `factor` features a frame, lengths (B,) of the features,
    weight (C, 1, 3, 3), bias (C) -> (B, T/2, M/2, C): ReLU, zeros beyond the lengths, a depthwise
    convolution of stride 2."""
    batch, n_frames, n_bins, channels = x.shape
    outer = output_length(n_frames, 2, causal), output_length(n_bins, 2, causal)
    x = x.contiguous()
    out = x.new_empty(batch, *outer, channels)
    if not out.numel():
        return out
    block_c = min(BLOCK_C, triton.next_power_of_2(channels))
    grid = triton.cdiv(outer[0] * outer[1], STAGE_BLOCK_P), triton.cdiv(channels, block_c), batch
    _stage_kernel[grid](
        x, lengths, *_contiguous(weight, bias), out, n_frames, n_bins, *outer, channels,
        factor.bit_length() - 1, causal, STAGE_BLOCK_P, block_c, num_warps=4,
    )  # fmt: skip
    return out


def end(x: Tensor, lengths: Tensor, factor: int, causal: bool) -> Tensor:
    """x (B, T, M, C) before its ReLU, as in `stage` -> (B, T, C M): ReLU, zeros beyond the lengths,
    in the order that a checkpoint's last product has."""
    batch, n_frames, n_bins, channels = x.shape
    x = x.contiguous()
    out = x.new_empty(batch, n_frames, channels * n_bins)
    if not out.numel():
        return out
    block_m, block_c = (
        triton.next_power_of_2(n_bins),
        min(BLOCK_C, triton.next_power_of_2(channels)),
    )
    _end_kernel[(n_frames, triton.cdiv(channels, block_c), batch)](
        x, lengths, out, n_frames, n_bins, channels, factor.bit_length() - 1, causal,
        block_m, block_c, num_warps=4,
    )  # fmt: skip
    return out


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


@triton.jit
def _valid(length, n_frames, LOG_FACTOR: tl.constexpr, CAUSAL: tl.constexpr):
    """Frames within a clip's length; a piece of a long one may begin beyond it."""
    if CAUSAL:
        valid = ((length + (1 << LOG_FACTOR) - 2) >> LOG_FACTOR) + 1
    else:
        valid = ((length - 1) >> LOG_FACTOR) + 1
    return tl.minimum(valid.to(tl.int32), n_frames)


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(
    do_not_specialize=[
        "n_frames", "n_bins", "inner_frames", "inner_bins", "out_frames", "out_bins",
        "clip_stride", "bin_stride",
    ]
)  # fmt: skip
def _start_kernel(
    x_ptr, lengths_ptr, weight_ptr, bias_ptr, depth_weight_ptr, depth_bias_ptr, out_ptr,
    n_frames, n_bins, inner_frames, inner_bins, out_frames, out_bins, clip_stride, bin_stride,
    channels, CAUSAL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    clip = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_row, is_channel = row < out_frames * out_bins, c < channels
    before: tl.constexpr = 2 if CAUSAL else 1
    length = tl.load(lengths_ptr + clip)
    valid = _valid(length, n_frames, 0, CAUSAL)
    inner_valid = _valid(length, inner_frames, 1, CAUSAL)
    # a column of the product: the bin's tap, the frame's, which lie side by side in memory
    k = tl.arange(0, 16)
    of_bin, of_frame, is_bias = k // 3, k % 3, k == 9
    weight = tl.load(
        weight_ptr + c[None, :] * 9 + (of_frame * 3 + of_bin)[:, None],
        mask=(k < 9)[:, None] & is_channel[None, :], other=0.0,
    )  # fmt: skip
    bias = tl.load(bias_ptr + c, mask=is_channel, other=0.0)
    weight = tl.where(is_bias[:, None], bias[None, :], weight).to(x_ptr.dtype.element_ty)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    total += tl.load(depth_bias_ptr + c, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for tap in range(9):
        frame = 2 * (row // out_bins) + tap // 3 - before
        of_bins = 2 * (row % out_bins) + tap % 3 - before
        exists = is_row & (frame >= 0) & (frame < inner_valid)
        exists &= (of_bins >= 0) & (of_bins < inner_bins)
        frame = (2 * frame - before)[:, None] + of_frame[None, :]
        of_bins = (2 * of_bins - before)[:, None] + of_bin[None, :]
        seen = exists[:, None] & (k < 9)[None, :] & (frame >= 0) & (frame < valid)
        seen &= (of_bins >= 0) & (of_bins < n_bins)
        at = clip * clip_stride + of_bins.to(tl.int64) * bin_stride + frame
        x = tl.load(x_ptr + at, mask=seen, other=0.0)
        # where the inner frame does not exist even its bias is zero
        x = tl.where(is_bias[None, :], exists[:, None].to(x.dtype), x)
        inner = _relu(tl.dot(x, weight, input_precision="tf32x3"))
        depth = tl.load(depth_weight_ptr + c * 9 + tap, mask=is_channel, other=0.0)
        total += inner * depth.to(tl.float32)[None, :]
    at = (clip * out_frames * out_bins + row)[:, None] * channels + c[None, :]
    tl.store(
        out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_channel[None, :]
    )


@triton.jit(do_not_specialize=["n_frames", "n_bins", "out_frames", "out_bins"])
def _stage_kernel(
    x_ptr, lengths_ptr, weight_ptr, bias_ptr, out_ptr, n_frames, n_bins, out_frames, out_bins,
    channels, LOG_FACTOR: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    clip = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_row, is_channel = row < out_frames * out_bins, c < channels
    before: tl.constexpr = 2 if CAUSAL else 1
    valid = _valid(tl.load(lengths_ptr + clip), n_frames, LOG_FACTOR, CAUSAL)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    total += tl.load(bias_ptr + c, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for tap in range(9):
        frame = 2 * (row // out_bins) + tap // 3 - before
        of_bins = 2 * (row % out_bins) + tap % 3 - before
        seen = is_row & (frame >= 0) & (frame < valid) & (of_bins >= 0) & (of_bins < n_bins)
        at = (clip * n_frames + frame) * n_bins + of_bins
        x = tl.load(
            x_ptr + at[:, None] * channels + c[None, :],
            mask=seen[:, None] & is_channel[None, :], other=0.0,
        )  # fmt: skip
        weight = tl.load(weight_ptr + c * 9 + tap, mask=is_channel, other=0.0).to(tl.float32)
        total += _relu(x.to(tl.float32)) * weight[None, :]
    at = (clip * out_frames * out_bins + row)[:, None] * channels + c[None, :]
    tl.store(
        out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_channel[None, :]
    )


@triton.jit(do_not_specialize=["n_frames"])
def _end_kernel(
    x_ptr, lengths_ptr, out_ptr, n_frames, n_bins, channels,
    LOG_FACTOR: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    clip = tl.program_id(2).to(tl.int64)
    frame = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = _valid(tl.load(lengths_ptr + clip), n_frames, LOG_FACTOR, CAUSAL)
    is_channel = (c < channels)[None, :]
    seen_bins = tl.where(frame < valid, n_bins, 0)
    begin = (clip * n_frames + frame) * n_bins * channels
    at = x_ptr + begin + m[:, None] * channels + c[None, :]
    x = tl.load(at, mask=(m < seen_bins)[:, None] & is_channel, other=0.0)
    at = out_ptr + begin + c[None, :] * n_bins + m[:, None]
    tl.store(at, _relu(x), mask=(m < n_bins)[:, None] & is_channel)
