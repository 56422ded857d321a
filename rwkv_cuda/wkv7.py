"""The WKV7 operator: argument checks, choice of implementation, autograd, torch.compile.

    S_t = S_{t-1} diag(exp(-exp(w_t))) + (S_{t-1} a_t) b_t^T + v_t k_t^T,    y_t = S_t r_t

`wkv7` runs it in one direction, `wkv7_bidirectional` in both at once. Implementations: `reference`
(a loop, the definition), `chunked` (matrix products in plain PyTorch, any device; on a CPU with
numba the forward pass is a compiled walk over the frames instead, walk.py) and `cuda` (kernels of
csrc/, built on first use). Letters: B clips, T frames, H heads, N head width,
D directions.
"""

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rwkv_cuda import chunked
from rwkv_cuda.reference import wkv7_reference

BACKENDS = ("auto", "reference", "chunked", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
NAMES = ("r", "w", "k", "v", "a", "b")
logger = logging.getLogger("rwkv_cuda")


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    reverse: bool = False,
    lengths: Tensor | None = None,
    backend: str = "auto",
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RWKV-7's recurrence over the frames of each clip and head, one direction.

    Args:
        r, w, k, v, a, b: (B, T, H, N), float32 or bfloat16 (float64 but for CUDA kernels), all of
            one dtype; under autocast of any, taken as bfloat16. w is the raw decay.
        reverse: the same recurrence from each clip's own last frame to its first.
        lengths: valid frames of each clip, (B,) integers; None for all T. What the others hold,
            be it NaN, is not read; y is 0 there, and so are gradients.
        backend: "reference", "chunked", "cuda", or "auto": cuda on CUDA devices where the kernels
            are built or can be, else chunked.
        initial_state: state before the first frame (the last if reverse), (B, H, N, N), [value,
            key]; zeros if None.
        return_state: also return the state after the last frame of each clip.
    Returns:
        y (B, T, H, N), in the inputs' dtype; with return_state also the state, (B, H, N, N), in
        float32 (float64 for float64), whatever the inputs are. Both are differentiable.
    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit; an unknown backend; backend
            "cuda" where the kernels cannot run.
    Source: RWKV-7 (Peng et al. 2025, arXiv:2503.14456); lengths and direction: the BiRWKV7 fork.
    """
    if initial_state is not None:
        initial_state = initial_state[None]
    y, state = _wkv7((r, w, k, v, a, b), [reverse], lengths, backend, initial_state)
    return (y[0], state[0]) if return_state else y[0]


def wkv7_bidirectional(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Both directions over the same inputs: `wkv7(...)` and `wkv7(..., reverse=True)`.

    The CUDA kernels read the inputs once for both. Arguments and errors: as `wkv7`.
    Returns:
        y of the forward and of the reverse direction, (B, T, H, N) each; frame t of both belongs to
        frame t of the inputs.
    """
    y, _ = _wkv7((r, w, k, v, a, b), [False, True], lengths, backend, None)
    forward, backward = y.unbind(0)
    return forward, backward


def _wkv7(
    inputs: tuple[Tensor, ...],
    directions: list[bool],
    lengths: Tensor | None,
    backend: str,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (D, B, T, H, N) and last states (D, B, H, N, N); initial_state as the latter."""
    device = inputs[0].device
    if torch.is_autocast_enabled(device.type):
        inputs = tuple(x.to(torch.bfloat16) for x in inputs)
    _check(inputs, lengths, backend, initial_state)
    if lengths is not None:
        lengths = lengths.to(device)
    if backend == "auto":
        backend = _choose(inputs[0])
    if backend == "reference":
        _check_lengths(lengths, inputs[0].shape[1])
        entry = [None] * len(directions) if initial_state is None else initial_state
        y, state = zip(*(wkv7_reference(*inputs, x, lengths, s) for x, s in zip(directions, entry)))
        return torch.stack(y), torch.stack(state)
    differentiable = [*inputs] if initial_state is None else [*inputs, initial_state]
    save_states = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    y, state, _ = _forward_op(*inputs, lengths, initial_state, directions, backend, save_states)
    return y, state


def _check(
    inputs: tuple[Tensor, ...], lengths: Tensor | None, backend: str, state: Tensor | None
) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    r = inputs[0]
    if backend == "cuda" and not r.is_cuda:
        raise ValueError(f"backend is 'cuda' and r on {r.device}; move the inputs to a CUDA device")
    if r.dim() != 4:
        raise ValueError(f"r has shape {tuple(r.shape)}, expected (B, T, H, N)")
    for name, x in zip(NAMES, inputs):
        if x.shape != r.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, r has {tuple(r.shape)}; all are (B, T, H, N)"
            )
        if x.dtype != r.dtype or x.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {x.dtype} and r {r.dtype}; expected all float32, all bfloat16 or all "
                "float64"
            )
        if x.device != r.device:
            raise ValueError(f"{name} is on {x.device}, r on {r.device}; move them to one device")
    batch, _, heads, width = r.shape
    if lengths is not None and (lengths.shape != (batch,) or lengths.dtype not in INTEGERS):
        raise ValueError(
            f"lengths is {lengths.dtype} of shape {tuple(lengths.shape)}, expected integers of "
            f"shape ({batch},)"
        )
    if state is not None:
        if state.shape[1:] != (batch, heads, width, width):
            raise ValueError(
                f"initial_state has shape {tuple(state.shape[1:])}, expected "
                f"{(batch, heads, width, width)}: (B, H, N, N)"
            )
        if not state.is_floating_point() or state.device != r.device:
            raise ValueError(
                f"initial_state is {state.dtype} on {state.device}, expected floating point on "
                f"{r.device}"
            )


def _check_lengths(lengths: Tensor | None, frames: int) -> None:
    """The values, which only a running operator sees. On CUDA a look would wait: kernels clamp."""
    if lengths is not None and lengths.numel() and not lengths.is_cuda:
        low, high = lengths.min().item(), lengths.max().item()
        if low < 0 or high > frames:
            wrong = low if low < 0 else high
            raise ValueError(f"lengths holds {wrong}, expected 0 to {frames}, the frames of r")


def _choose(x: Tensor) -> str:
    if not x.is_cuda or x.dtype == torch.float64 or x.shape[3] > 128:
        return "chunked"
    # For heads 128 wide a block takes 106 KB of shared memory, with gradients 146; these have 99.
    if x.shape[3] > 64:
        card = torch.cuda.get_device_capability(x.device)
        if card in ((8, 6), (8, 9)) or card[0] >= 12:
            return "chunked"
    return "cuda" if _kernels_usable(x.device) else "chunked"


@torch.compiler.assume_constant_result
def _kernels_usable(device: torch.device) -> bool:
    from rwkv_cuda import build  # a compiler is looked for only where a GPU is

    if not build.usable():
        return False
    from rwkv_cuda import cuda

    return cuda.works(device)


@functools.cache
def _walk() -> Callable:
    """The forward pass of a CPU in float32: compiled loops, or without numba the chunked form."""
    try:
        from rwkv_cuda import walk
    except ImportError as error:
        logger.warning("WKV7 runs in plain PyTorch, slower: numba is not usable (%s)", error)
        return chunked.forward
    return walk.forward


@torch.library.custom_op("rwkv_cuda::wkv7", mutates_args=())
def _forward_op(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    lengths: Tensor | None,
    initial_state: Tensor | None,
    directions: Sequence[bool],
    backend: str,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (D, B, T, H, N), last states (D, B, H, N, N), states for backward (D, segments, ...)."""
    _check_lengths(lengths, r.shape[1])
    if backend == "cuda":
        from rwkv_cuda import cuda

        inputs = (r, w, k, v, a, b)
        return cuda.forward(inputs, lengths, initial_state, directions, save_states)
    states = [None] * len(directions) if initial_state is None else initial_state
    with torch.autocast(r.device.type, enabled=False):
        run = _walk() if r.device.type == "cpu" and r.dtype != torch.float64 else chunked.forward
        parts = [
            run(r, w, k, v, a, b, reverse, lengths, state, save_states)
            for reverse, state in zip(directions, states)
        ]
    return tuple(x[0][None] if len(x) == 1 else torch.stack(x) for x in zip(*parts))


@_forward_op.register_fake
def _(r, w, k, v, a, b, lengths, initial_state, directions, backend, save_states):
    batch, frames, heads, width = r.shape
    dtype = torch.promote_types(r.dtype, torch.float32)
    count = len(directions)
    segments = chunked.n_segments(frames) if save_states else 0
    y = r.new_empty(count, *r.shape)
    state = r.new_empty(count, batch, heads, width, width, dtype=dtype)
    saved = r.new_empty(count, segments, batch, heads, width, width, dtype=dtype)
    return y, state, saved


@torch.library.custom_op("rwkv_cuda::wkv7_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor,
    grad_state: Tensor | None,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    saved: Tensor,
    lengths: Tensor | None,
    directions: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, w, k, v, a, b and of the initial states, (D, B, H, N, N)."""
    if backend == "cuda":
        from rwkv_cuda import cuda

        inputs = (r, w, k, v, a, b)
        return cuda.backward(grad_y, grad_state, inputs, saved, lengths, directions)
    state_grads = [None] * len(directions) if grad_state is None else grad_state
    with torch.autocast(r.device.type, enabled=False):
        parts = [
            chunked.backward(y, state, r, w, k, v, a, b, kept, reverse, lengths)
            for y, state, kept, reverse in zip(grad_y, state_grads, saved, directions)
        ]
    *grads, state_grad = zip(*parts)
    return *(x[0] if len(x) == 1 else x[0] + x[1] for x in grads), torch.stack(state_grad)


@_backward_op.register_fake
def _(grad_y, grad_state, r, w, k, v, a, b, saved, lengths, directions, backend):
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, w, k, v, a, b)]
    count, _, *shape = saved.shape
    return *grads, saved.new_empty(count, *shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, lengths, initial_state, directions, backend, save_states = inputs
    if not save_states:
        raise RuntimeError("rwkv_cuda::wkv7 is called without save_states, yet differentiated")
    ctx.save_for_backward(*tensors, output[2], lengths)
    ctx.directions, ctx.backend = directions, backend
    ctx.state_dtype = None if initial_state is None else initial_state.dtype


def _backward(ctx, grad_y, grad_state, _):
    *tensors, lengths = ctx.saved_tensors
    *grads, state_grad = _backward_op(
        grad_y, grad_state, *tensors, lengths, ctx.directions, ctx.backend
    )
    state_grad = None if ctx.state_dtype is None else state_grad.to(ctx.state_dtype)
    return *grads, None, state_grad, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
