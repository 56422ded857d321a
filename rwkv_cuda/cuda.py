"""The CUDA kernels' side of the operator: checks, buffers, and the order of the launches.

`forward` and `backward` work as those of chunked.py, for all directions in one launch. The states
they save are the same, too. Where clips times heads leave the card idle, time is cut into segments
that run at once: each one's effect on the state (a matrix and an offset), then a scan over the
segments, then each segment again from its true entry state.

Not yet run on a GPU: the tests compile the kernels for a CPU (csrc/tile.h) and call them from here.
"""

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_cuda import build
from rwkv_cuda.chunked import SEGMENT, n_segments

logger = logging.getLogger("rwkv_cuda")

WIDTHS = (32, 64, 128)  # compiled in; others are padded with zeros to the next
CHUNK = 16
FORWARD, BACKWARD, SCAN, SCAN_BACK = range(4)
WHOLE, CONTRIBUTION, TRANSITION, REPLAY = range(4)
BLOCKS_PER_PROCESSOR = 2  # fewer blocks than this leave the card idle: time is cut up then
POINTERS = ("r", "w", "k", "v", "a", "b", "grad_y", "y")
MORE_POINTERS = (
    "lengths",
    "initial",
    "last",
    "grad_last",
    "states",
    "adjoints",
    "transitions",
    "scratch",
)
SIZES = ("batch", "frames", "heads", "segments", "segment", "directions", "reversed")


class _Arguments(ctypes.Structure):
    """`Arguments` of csrc/chunk.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("grads", ctypes.c_void_p * 6),
        *((name, ctypes.c_void_p) for name in MORE_POINTERS),
        *((name, ctypes.c_int) for name in SIZES),
    )


class Kernels:
    """The launches. `library` is what build.load() gives, or the emulation on a CPU."""

    def __init__(self, library: ctypes.CDLL, processors: Callable[[torch.device], int]) -> None:
        """processors: multiprocessors of a device."""
        self.library = library
        self.processors = processors
        library.wkv7_error.restype = ctypes.c_char_p
        library.wkv7_launch.argtypes = [
            ctypes.c_void_p,
            *[ctypes.c_int] * 4,
            ctypes.c_void_p,
        ]
        library.wkv7_blocks.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 3]

    def forward(
        self,
        inputs: Sequence[Tensor],
        lengths: Tensor | None,
        initial_state: Tensor | None,
        directions: Sequence[bool],
        save_states: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y (D, B, T, H, N), last states (D, B, H, N, N), saved states (D, segments, ...)."""
        inputs, width = self._prepare(inputs)
        r = inputs[0]
        count, (batch, frames, heads, padded) = len(directions), r.shape
        shape = (batch, heads, padded, padded)
        y = (r.new_empty if lengths is None else r.new_zeros)(count, *r.shape)
        last = r.new_empty(count, *shape, dtype=torch.float32)
        segments = n_segments(frames)
        split = self._split(r, FORWARD, count)
        states = None
        if save_states or split:
            # Segments past a clip's end are never written, and are 0 in what is saved.
            make = r.new_zeros if save_states and lengths is not None else r.new_empty
            states = make(count, segments, *shape, dtype=torch.float32)
        initial = _pad_state(initial_state, padded)
        arguments, keep = _arguments(inputs, lengths, directions)
        _point(arguments, keep, y=y, last=last, states=states, initial=initial)
        if split:
            transitions = torch.empty_like(states)
            _point(arguments, keep, transitions=transitions)
            self._launch(arguments, FORWARD, CONTRIBUTION, r)
            self._launch(arguments, FORWARD, TRANSITION, r)
            self._launch(arguments, SCAN, WHOLE, r)
            self._launch(arguments, FORWARD, REPLAY, r)
        else:
            self._launch(arguments, FORWARD, WHOLE, r)
        saved = states if save_states else last.new_empty(count, 0, *shape)
        return (
            y[..., :width].contiguous(),
            last[..., :width, :width].contiguous(),
            saved[..., :width, :width].contiguous(),
        )

    def backward(
        self,
        grad_y: Tensor,
        grad_state: Tensor | None,
        inputs: Sequence[Tensor],
        saved: Tensor,
        lengths: Tensor | None,
        directions: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        """Gradients of r, w, k, v, a, b, and of the initial states, (D, B, H, N, N)."""
        inputs, width = self._prepare(inputs)
        r = inputs[0]
        padded, count = r.shape[3], len(directions)
        grad_y = F.pad(grad_y.to(r.dtype), (0, padded - width)).contiguous()
        states, grad_last = _pad_state(saved, padded), _pad_state(grad_state, padded)
        # Directions, and blocks with some of the value columns, write their own part of a sum.
        parts = count * (padded // 32)
        make = r.new_empty if lengths is None else r.new_zeros
        grads = [make(count if i == 3 else parts, *r.shape) for i in range(6)]
        grad_initial = torch.empty_like(states[:, 0]) if states.shape[1] else None
        if grad_initial is None:
            grad_initial = states.new_zeros(count, *states.shape[2:])
        arguments, keep = _arguments(inputs, lengths, directions)
        arguments.grads[:] = [x.data_ptr() for x in grads]
        _point(arguments, keep, grad_y=grad_y, states=states, grad_last=grad_last)
        mode = WHOLE
        if self._split(r, BACKWARD, count):
            mode = REPLAY
            transitions, adjoints = torch.empty_like(states), torch.empty_like(states)
            _point(arguments, keep, transitions=transitions, adjoints=adjoints)
            self._launch(arguments, FORWARD, TRANSITION, r)
            self._launch(arguments, BACKWARD, CONTRIBUTION, r)
            _point(arguments, keep, last=grad_initial)
            self._launch(arguments, SCAN_BACK, WHOLE, r)
        blocks = self.library.wkv7_blocks(ctypes.byref(arguments), BACKWARD, mode, padded)
        scratch = states.new_empty(blocks, SEGMENT // CHUNK, padded, 32)
        _point(arguments, keep, scratch=scratch, last=grad_initial)
        self._launch(arguments, BACKWARD, mode, r)
        summed = [(x[0] if len(x) == 1 else x.sum(0))[..., :width].contiguous() for x in grads]
        return *summed, grad_initial[..., :width, :width].contiguous()

    def _prepare(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        """Contiguous, aligned inputs of a width that is compiled in; the width they had."""
        r = inputs[0]
        width = r.shape[3]
        if r.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"r is {r.dtype}, the CUDA kernels take float32 or bfloat16")
        if not 0 < width <= WIDTHS[-1]:
            raise ValueError(f"heads are {width} wide, the CUDA kernels take up to {WIDTHS[-1]}")
        padded = next(x for x in WIDTHS if x >= width)
        inputs = [F.pad(x, (0, padded - width)) if padded > width else x for x in inputs]
        inputs = [x.contiguous() for x in inputs]
        # A row is read in quads of 16 bytes; a view into a buffer may begin between them.
        return [x if x.data_ptr() % 16 == 0 else x.clone() for x in inputs], width

    def _split(self, r: Tensor, kernel: int, directions: int) -> bool:
        batch, frames, heads, width = r.shape
        columns = 64 if kernel == FORWARD and width == 64 else 32
        blocks = batch * heads * directions * (width // columns)
        idle = blocks < BLOCKS_PER_PROCESSOR * self.processors(r.device)
        # Segments cost three passes instead of one: four are the fewest that gain.
        return idle and n_segments(frames) >= 4

    def _launch(self, arguments: _Arguments, kernel: int, mode: int, r: Tensor) -> None:
        if not r.numel():
            mode = WHOLE
        stream = 0
        if r.is_cuda:
            stream = torch.cuda.current_stream(r.device).cuda_stream
        code = self.library.wkv7_launch(
            ctypes.byref(arguments), kernel, mode, r.dtype == torch.bfloat16, r.shape[3], stream
        )
        if code:
            reason = self.library.wkv7_error(code).decode()
            raise RuntimeError(
                f"the WKV7 kernel for heads {r.shape[3]} wide did not start: {reason}; "
                'backend="chunked" runs without it'
            )


def _arguments(
    inputs: Sequence[Tensor], lengths: Tensor | None, directions: Sequence[bool]
) -> tuple[_Arguments, list]:
    batch, frames, heads, _ = inputs[0].shape
    arguments = _Arguments(
        batch=batch,
        frames=frames,
        heads=heads,
        segments=n_segments(frames),
        segment=SEGMENT,
        directions=len(directions),
        reversed=sum(reverse << i for i, reverse in enumerate(directions)),
    )
    keep = []  # tensors that live until the launches are queued
    _point(arguments, keep, **dict(zip(POINTERS, inputs)))
    if lengths is not None:
        _point(arguments, keep, lengths=lengths.to(inputs[0].device, torch.int32).contiguous())
    return arguments, keep


def _point(arguments: _Arguments, keep: list, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        keep.append(tensor)
        setattr(arguments, name, None if tensor is None else tensor.data_ptr())


def _pad_state(state: Tensor | None, width: int) -> Tensor | None:
    if state is None:
        return None
    extra = width - state.shape[-1]
    return F.pad(state.float(), (0, extra, 0, extra)).contiguous()


def _kernels() -> Kernels:
    def processors(device: torch.device) -> int:
        return torch.cuda.get_device_properties(device).multi_processor_count

    return Kernels(build.load(), processors)


@functools.cache
def works(device: torch.device) -> bool:
    """Whether the kernels run on this GPU, tried once; where they do not, for a driver that is
    older than the compiler, the reason is logged in a line."""
    ones, zeros = (make(1, CHUNK, 1, 64, device=device) for make in (torch.ones, torch.zeros))
    try:
        y, *_ = forward((ones, ones, ones, ones, zeros, zeros), None, None, [False], False)
        if (y[0, 0, 0] != 64).any():
            raise RuntimeError("a kernel's numbers are wrong")
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        logger.warning("WKV7 runs in plain PyTorch on %s, slower: %s", device, reason)
        return False
    return True


def forward(inputs, lengths, initial_state, directions, save_states):
    """`Kernels.forward` on the device of the inputs."""
    with torch.cuda.device(inputs[0].device):
        return _kernels().forward(inputs, lengths, initial_state, directions, save_states)


def backward(grad_y, grad_state, inputs, saved, lengths, directions):
    """`Kernels.backward` on the device of the inputs."""
    with torch.cuda.device(inputs[0].device):
        return _kernels().backward(grad_y, grad_state, inputs, saved, lengths, directions)
