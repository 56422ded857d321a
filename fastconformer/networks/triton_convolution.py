"""What lies between the two products of a convolution module, on a GPU: one Triton kernel.

GLU, mask, depthwise convolution, BatchNorm with fixed statistics and SiLU. A program has some
frames of some channels, and reads each once for every tap: from the caches, all but the first time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_C = 16, 64


def convolution(
    x: Tensor, pad_mask: Tensor, weight: Tensor, bias: Tensor | None, norm: list[Tensor],
    eps: float, left: int,
) -> Tensor:  # fmt: skip
    """x (B, T, 2D), pad_mask (B, T) True on padding, weight (D, 1, taps), bias (D) or None, `norm`:
    BatchNorm's weight, bias, mean and variance (D) -> (B, T, D). `left`: taps before a frame."""
    batch, n_frames, width = x.shape[0], x.shape[1], x.shape[2] // 2
    x, weight = x.contiguous(), weight.contiguous()
    out = x.new_empty(batch, n_frames, width)
    if not x.numel():
        return out
    _convolution_kernel[(triton.cdiv(n_frames, BLOCK_T), triton.cdiv(width, BLOCK_C), batch)](
        x, pad_mask.view(torch.uint8), weight, weight if bias is None else bias, *norm, out,
        n_frames, width, pad_mask.stride(0), left, eps,
        bias is not None, weight.shape[2], BLOCK_T, BLOCK_C, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_frames", "clip_stride", "left"])
def _convolution_kernel(
    x_ptr, pad_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, variance_ptr,
    out_ptr, n_frames, width, clip_stride, left, eps, HAS_BIAS: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    clip = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = c < width
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for tap in range(TAPS):
        frame = t + tap - left
        inside = (frame >= 0) & (frame < n_frames)
        padding = tl.load(pad_ptr + clip * clip_stride + frame, mask=inside, other=1)
        seen = (padding == 0)[:, None] & is_channel[None, :]
        at = (clip * n_frames + frame)[:, None] * (2 * width) + c[None, :]
        x = tl.load(x_ptr + at, mask=seen, other=0.0).to(tl.float32)
        gate = tl.load(x_ptr + at + width, mask=seen, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + c * TAPS + tap, mask=is_channel, other=0.0).to(tl.float32)
        total += x * tl.sigmoid(gate) * weight[None, :]
    mean = tl.load(mean_ptr + c, mask=is_channel, other=0.0).to(tl.float32)
    if HAS_BIAS:
        mean -= tl.load(bias_ptr + c, mask=is_channel, other=0.0).to(tl.float32)
    variance = tl.load(variance_ptr + c, mask=is_channel, other=1.0).to(tl.float32)
    scale = tl.load(norm_weight_ptr + c, mask=is_channel, other=0.0).to(tl.float32)
    scale *= tl.rsqrt(variance + eps)
    shift = tl.load(norm_bias_ptr + c, mask=is_channel, other=0.0).to(tl.float32)
    y = (total - mean[None, :]) * scale[None, :] + shift[None, :]
    y = y * tl.sigmoid(y)
    out = out_ptr + (clip * n_frames + t)[:, None] * width + c[None, :]
    tl.store(
        out, y.to(out_ptr.dtype.element_ty), mask=(t < n_frames)[:, None] & is_channel[None, :]
    )
