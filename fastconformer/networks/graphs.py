"""CUDA graphs: what launches many small kernels is captured once and replayed by one launch.

A GPU waits for its host where kernels take less time than their launches, as for one clip or a
stream's chunk: some 600 launches of 5 us for an encoder of 24 layers, whose work takes 1 ms.
"""

import contextlib
import itertools
import logging
import operator
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

# Feature frames of all clips: the 0.6B size is launched for 3.3 ms, in which an H200 does the work
# of 6,600 (50 us a second of audio, by arithmetic). From there on it would wait for nothing.
MOST_FRAMES = 4096
STEP_FRAMES = 512  # to a multiple of which they are rounded up: 64 of the encoder, a kernel's block
KEPT = 24  # graphs of an encoder: 15 shapes have so few frames, and those of a stream

_capturing = threading.Lock()  # of the process: captures and random generators are not for two
_invalid: list = []  # graphs that are never freed


class GraphCache:
    """The graphs of a network, with the buffers that they read and write, kept between calls. One
    call at a time uses it. A copy of the network starts with an empty one.

    captures: so many so far; failed: one did not succeed, and none is tried any more.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.graphs: OrderedDict[Hashable, tuple] = OrderedDict()
        self.captures, self.failed = 0, False
        self._contents = self._stream = self._pool = self._last = None

    def __deepcopy__(self, memo):
        return GraphCache()

    def __reduce__(self):
        return GraphCache, ()

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """The buffers are the caller's inside: on the host, and on the device where the one before
        had another stream."""
        with self.lock:
            if device.type == "cuda" and torch.cuda.is_initialized():
                stream = torch.cuda.current_stream(device)
                if self._last not in (None, stream):
                    stream.wait_stream(self._last)
                self._last = stream
            yield

    def get(
        self, key: Hashable, make: Callable[[], tuple], most: int, device: torch.device
    ) -> tuple:
        """What is kept for a key, and the function that replays it; for a turn's holder.

        `make()` gives the buffers and a function over them, which asks the device nothing; it runs
        as it is on a CPU, and where a capture fails. The `most` used last are kept.
        """
        if key in self.graphs:
            self.graphs.move_to_end(key)
            return self.graphs[key]
        while len(self.graphs) >= most:
            self.graphs.popitem(last=False)
        # kept for later calls, which may run outside of an inference mode that holds now, and of an
        # autocast, whose casts of weights live as long as it does
        autocast = torch.autocast(device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), autocast:
            buffers, replay = make()
            if device.type == "cuda" and not self.failed:
                try:
                    replay = captured(self, replay, device)
                    self.captures += 1
                except RuntimeError as error:  # no memory, or what cannot be captured
                    self.failed = True
                    reason = str(error).partition("\n")[0]
                    log.warning("no more CUDA graphs, which are faster: %s", reason)
        self.graphs[key] = buffers, replay
        return buffers, replay

    def usable(self, x: Tensor) -> bool:
        """Whether an input on this place, now, may go by a graph."""
        return (
            x.is_cuda
            and not self.failed
            and not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cuda")
            and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        )

    def run(
        self,
        name: Hashable,
        network: nn.Module,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        shapes: Sequence[tuple[int, ...]],
        take: Callable[..., Sequence[Tensor]],
    ) -> Sequence[Tensor] | None:
        """`take(*function(*buffers))`, by a replay, of usable inputs: buffers of these shapes hold
        the inputs in their first corner and zeros beyond. None: the plain call must do.

        `name` says all that the function depends on beside the buffers and the network.
        """
        device = inputs[0].device
        with self.turn(device):
            if self._contents is None or not self._contents.unchanged():
                self.graphs.clear()
                self._contents = _Contents(network)
            if self._contents.observed():
                return None

            def make():
                buffers = [x.new_zeros(shape) for x, shape in zip(inputs, shapes, strict=True)]
                outputs: list[Tensor] = []

                def step():
                    outputs[:] = function(*buffers)

                return (buffers, outputs), step

            types = tuple(x.dtype for x in inputs)
            key = name, tuple(shapes), types, device, *_settings()
            (buffers, outputs), replay = self.get(key, make, KEPT, device)
            if self.failed:
                self.graphs.clear()
                return None
            for x, buffer in zip(inputs, buffers, strict=True):
                if x.shape != buffer.shape:
                    buffer.zero_()
                buffer[tuple(slice(n) for n in x.shape)].copy_(x)
            replay()
            return take(*outputs)


def captured(cache: GraphCache, function: Callable[[], None], device: torch.device) -> Callable:
    """What replays the kernels that `function()` launches.

    The stream is the cache's own, so that its products' workspaces are too, and of high priority:
    those that are drawn for copies come from another pool of streams. The graphs of a cache, of
    which one runs at a time, share their memory.
    """
    if cache._stream is None or cache._stream.device != device:
        cache._stream = torch.cuda.Stream(device, priority=-1)
    if not cache.graphs:  # a pool ends with its last graph
        cache._pool = torch.cuda.graph_pool_handle()
    stream, current = cache._stream, torch.cuda.current_stream(device)
    graph = torch.cuda.CUDAGraph()
    # the device first: the way back from its stream would else take memory of the current device
    with _capturing, torch.cuda.device(device), torch.cuda.stream(stream):
        stream.wait_stream(current)
        try:
            function()  # libraries choose and load their kernels before the capture
            # Not by `torch.cuda.graph`, which empties the caches of all threads, waits for the
            # device, where others may capture, and has one stream, of one device.
            graph.capture_begin(pool=cache._pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                _end(graph, device, cache._pool)
        finally:
            current.wait_stream(stream)  # the buffers are being written, also where it failed
    return graph.replay


def _end(graph, device: torch.device, pool) -> None:
    try:
        graph.capture_end()
    except RuntimeError:
        # What cannot be captured ends a capture before torch's allocator hears of it, which would
        # ask this graph at each allocation, and free nothing that two streams have used.
        _invalid.append(graph)
        with contextlib.suppress(RuntimeError):
            end = getattr(torch._C, "_cuda_endAllocateToPool", None)
            end = end or torch._C._cuda_endAllocateCurrentStreamToPool  # before torch 2.8
            end(device.index, pool)
        # Nor, in some versions, does the device's random generator hear of it, for which dropout
        # and all other graphs would raise from then on; a capture that succeeds tells it.
        with contextlib.suppress(RuntimeError):
            one, again = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
            again.capture_begin(capture_error_mode="thread_local")
            one.add_(1)
            again.capture_end()
        raise


class _Contents:
    """What a graph of a network holds fixed: its modules and where its weights lie; their values
    may change, a replay reads them. Looked at in 0.2 ms for 900 weights. The network itself is not
    held, which holds this: its weights are free as soon as nobody else has it."""

    def __init__(self, network: nn.Module):
        modules = list(network.modules())
        self.network, self.inner = weakref.ref(network), modules[1:]
        self.places = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
        self.hooks = [d for m in modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self.held = list(self._now())  # kept alive, so that no other takes their number
        self.numbers = list(map(id, self.held))
        self.tensors = [x for x in self.held if isinstance(x, Tensor)]
        self.addresses = list(map(Tensor.data_ptr, self.tensors))

    def _now(self) -> Iterator:
        return itertools.chain.from_iterable(map(dict.values, self.places))

    def unchanged(self) -> bool:
        return (
            list(map(id, self._now())) == self.numbers
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )

    def observed(self) -> bool:
        """Whether modules do more than compute: train, or tell others what they see."""
        modules = self.network(), *self.inner
        return any(self.hooks) or any(map(operator.attrgetter("training"), modules))


def _settings() -> tuple:
    """Of torch, by which kernels are chosen. Where the new names are used the old ones raise."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    new = hasattr(matmul, "fp32_precision")  # from torch 2.9 on
    return (
        matmul.fp32_precision if new else torch.get_float32_matmul_precision(),
        cudnn.conv.fp32_precision if new else cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )
