"""The encoder's Triton kernels as operators of PyTorch, numba's for a CPU, and whether an input may
take them.

An operator shows torch.compile, and whoever counts kernels, one function of its inputs. Attention
alone has a gradient; without Triton or numba, and on other devices, the layers' plain form runs.
"""

import functools
import logging
from types import ModuleType

import torch
from torch import Tensor

from ..config.encoder import output_length

log = logging.getLogger(__name__)

OLDEST_CARD = 8, 0  # the compute capability from which on Triton supports NVIDIA's cards

# Of attention's kernels: wider ones, compiled, spill hundreds of registers.
WIDEST_HEAD, WIDEST_HEAD_FLOAT32_GRADIENT = 128, 64
MOST_LANES = 65_535  # clips times heads: the second dimension of a grid


def usable(x: Tensor) -> bool:
    """Whether the kernels without a gradient take `x`."""
    return not torch.is_grad_enabled() and takes(x)


def takes(x: Tensor) -> bool:
    """Whether the kernels take `x`: on a GPU, in a type of theirs."""
    types = (torch.float32, torch.bfloat16, torch.float16)
    return x.is_cuda and x.dtype in types and triton_works(x.device)


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
    except ImportError as error:
        log.warning("slower on this CPU: %s; pip install 'fastconformer[fast]'", error)
        return None
    return compiled_layers


def take_heads(q: Tensor, width: int) -> bool:
    """Whether attention's kernels take queries (B, T, H K) with heads of that width."""
    if len(q) * (q.shape[-1] // width) > MOST_LANES:
        return False
    if q.dtype == torch.float32 and torch.is_grad_enabled():
        return width <= WIDEST_HEAD_FLOAT32_GRADIENT
    return width <= WIDEST_HEAD


def triton_works(device: torch.device) -> bool:
    """Whether Triton compiles and runs a kernel on this GPU, tried once; where it does not, for
    want of a C compiler or on an old card, the reason is logged in a line."""
    return _tried(device)


# torch.compile asks it before it traces: what torch.compiler.assume_constant_result does, which
# imports all of dynamo
triton_works._dynamo_marked_constant = True


@functools.cache
def _tried(device: torch.device) -> bool:
    try:
        from . import triton_probe

        with torch.cuda.device(device):
            card = torch.cuda.get_device_capability()
            if torch.version.hip is None and card < OLDEST_CARD:
                raise RuntimeError("compute capability {}.{}, 8.0 is needed".format(*card))
            triton_probe.run(device)
    except Exception as error:  # of any kind: also what a compiler's process raises
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        log.warning("no Triton kernels on %s, so plain PyTorch, slower: %s", device, reason)
        return False
    return True


@torch.library.custom_op("fastconformer::rel_pos_attention", mutates_args=())
def rel_pos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    bias_u: Tensor,
    bias_v: Tensor,
    hidden: Tensor,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `triton_attention.attention`; `seed`, which `dropout` needs, is an int64 on the host."""
    from .triton_attention import attention

    with torch.cuda.device_of(q):
        return attention(q, k, v, p, bias_u, bias_v, hidden, dropout, _number(seed))


def dropout_seed() -> Tensor:
    """Drawn from PyTorch's generator of the host, which a resumed run and activation checkpointing
    restore, and for which no device is waited for."""
    return torch.randint(0, 2**62, (), device="cpu")


def _number(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed)


@rel_pos_attention.register_fake
def _(q, k, v, p, bias_u, bias_v, hidden, dropout=0.0, seed=None):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(len(q), len(bias_u), q.shape[1], dtype=torch.float32)


@torch.library.custom_op("fastconformer::rel_pos_attention_backward", mutates_args=())
def rel_pos_attention_backward(
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
    seed: Tensor | None,
    of_positions: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `triton_attention_backward.attention_backward`."""
    from .triton_attention_backward import attention_backward

    with torch.cuda.device_of(q):
        return attention_backward(
            grad, q, k, v, p, bias_u, bias_v, hidden, out, sums, dropout, _number(seed),
            of_positions,
        )  # fmt: skip


@rel_pos_attention_backward.register_fake
def _(grad, q, k, v, p, bias_u, bias_v, hidden, out, sums, dropout, seed, of_positions):
    wanted = (True, True, True, of_positions, True, of_positions)
    inputs = (q, k, v, p, bias_u, bias_v)
    return tuple(x.new_empty(x.shape if w else 0) for x, w in zip(inputs, wanted, strict=True))


def _keep(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, ctx.dropout, seed = inputs
    ctx.save_for_backward(*tensors, *output, seed)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    *saved, seed = ctx.saved_tensors
    of_positions = ctx.needs_input_grad[3] or ctx.needs_input_grad[5]
    grads = rel_pos_attention_backward(grad, *saved, ctx.dropout, seed, of_positions)
    needed = zip(grads, ctx.needs_input_grad)
    return *(g if need else None for g, need in needed), None, None, None


rel_pos_attention.register_autograd(_differentiate, setup_context=_keep)


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
