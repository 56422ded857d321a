"""The encoder's Triton kernels as operators of PyTorch, numba's for a CPU, and whether an input may
take them.

An operator shows torch.compile, and whoever counts kernels, one function of its inputs. None has a
gradient; without Triton or numba, and on other devices, the layers' plain form runs.
"""

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from ..config.encoder import output_length

WIDEST_HEAD = 128  # of attention's kernel: wider ones, compiled, spill a thousand registers


def usable(x: Tensor) -> bool:
    """Whether the kernels take `x`: on a GPU, without gradients, in a type of theirs."""
    types = (torch.float32, torch.bfloat16, torch.float16)
    return x.is_cuda and not torch.is_grad_enabled() and x.dtype in types and _has_triton()


def for_cpu(x: Tensor) -> ModuleType | None:
    """`compiled_layers` where it takes `x`: on a CPU, without gradients, in a type of its own, and
    with numba, which the extra `fast` brings; else None."""
    if (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)  # no trace's
    ):
        return _compiled_layers()
    return None


@functools.cache
def _compiled_layers() -> ModuleType | None:
    try:
        from . import compiled_layers
    except ImportError:
        return None
    return compiled_layers


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.library.custom_op("fastconformer::rel_pos_attention", mutates_args=())
def rel_pos_attention(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, bias_u: Tensor, bias_v: Tensor, hidden: Tensor
) -> Tensor:
    """As `triton_attention.attention`."""
    from .triton_attention import attention

    with torch.cuda.device_of(q):
        return attention(q, k, v, p, bias_u, bias_v, hidden)


@rel_pos_attention.register_fake
def _(q, k, v, p, bias_u, bias_v, hidden):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastconformer::gated_convolution", mutates_args=())
def gated_convolution(
    x: Tensor,
    pad_mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: list[Tensor],
    eps: float,
    left: int,
) -> Tensor:
    """As `triton_convolution.convolution`."""
    from .triton_convolution import convolution

    with torch.cuda.device_of(x):
        return convolution(x, pad_mask, weight, bias, norm, eps, left)


@gated_convolution.register_fake
def _(x, pad_mask, weight, bias, norm, eps, left):
    return x.new_empty(x.shape[0], x.shape[1], x.shape[2] // 2)


@torch.library.custom_op("fastconformer::subsampling_start", mutates_args=())
def subsampling_start(
    features: Tensor,
    lengths: Tensor,
    weight: Tensor,
    bias: Tensor,
    depth_weight: Tensor,
    depth_bias: Tensor,
    causal: bool,
) -> Tensor:
    """As `triton_subsampling.start`."""
    from .triton_subsampling import start

    with torch.cuda.device_of(features):
        return start(features, lengths, weight, bias, depth_weight, depth_bias, causal)


@subsampling_start.register_fake
def _(features, lengths, weight, bias, depth_weight, depth_bias, causal):
    batch, n_bins, n_frames = features.shape
    size = output_length(n_frames, 4, causal), output_length(n_bins, 4, causal)
    return features.new_empty(batch, *size, len(weight))


@torch.library.custom_op("fastconformer::subsampling_stage", mutates_args=())
def subsampling_stage(
    x: Tensor, lengths: Tensor, weight: Tensor, bias: Tensor, factor: int, causal: bool
) -> Tensor:
    """As `triton_subsampling.stage`."""
    from .triton_subsampling import stage

    with torch.cuda.device_of(x):
        return stage(x, lengths, weight, bias, factor, causal)


@subsampling_stage.register_fake
def _(x, lengths, weight, bias, factor, causal):
    batch, n_frames, n_bins, channels = x.shape
    size = output_length(n_frames, 2, causal), output_length(n_bins, 2, causal)
    return x.new_empty(batch, *size, channels)


@torch.library.custom_op("fastconformer::subsampling_end", mutates_args=())
def subsampling_end(x: Tensor, lengths: Tensor, factor: int, causal: bool) -> Tensor:
    """As `triton_subsampling.end`."""
    from .triton_subsampling import end

    with torch.cuda.device_of(x):
        return end(x, lengths, factor, causal)


@subsampling_end.register_fake
def _(x, lengths, factor, causal):
    return x.new_empty(x.shape[0], x.shape[1], x.shape[2] * x.shape[3])
