"""Copies between the host and a device for which neither waits, or the host once for all.

A copy from ordinary memory, or back, makes the host wait until the device has done all that it was
given; a GPU that is waited for so has nothing to do afterwards.
"""

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on a device, from the host through pinned memory; x itself where it is there."""
    if device.type == "cuda" and x.device.type == "cpu":
        try:
            return x.pin_memory().to(device, non_blocking=True)
        except RuntimeError as error:
            _say_once(error)
    return x.to(device)


def host_zeros(shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
    """Zeros on the host; `pinned`: in memory that a GPU reads by itself, if there is any."""
    if pinned:
        try:
            return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=True)
        except RuntimeError as error:
            _say_once(error)
    return torch.zeros(shape, dtype=dtype, device="cpu")


def _say_once(error: RuntimeError) -> None:
    """Of pinned memory, of which WSL and small containers give little."""
    _say(str(error).partition("\n")[0])


@functools.cache
def _say(reason: str) -> None:
    log.warning("no pinned memory, so the host waits for its copies: %s", reason)


def on_host(*tensors: Tensor) -> list[Tensor]:
    """The tensors on the CPU, all in one transfer, for which a device is waited for once."""
    there = [x for x in tensors if x.device.type != "cpu"]
    if not there:
        return list(tensors)
    packed = torch.cat([x.contiguous().view(-1).view(torch.uint8) for x in there]).cpu()
    parts = iter(packed.split([x.numel() * x.element_size() for x in there]))
    return [
        x if x.device.type == "cpu" else next(parts).clone().view(x.dtype).view(x.shape)
        for x in tensors
    ]


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all calls: memory that a stream has freed, torch gives to no other."""
    return torch.cuda.Stream(device)


def ahead(
    items: Iterable, make: Callable, device: torch.device
) -> Iterator[tuple[object, tuple[Tensor, ...]]]:
    """Of each item, in order, what `make` gives of it: (anything, tensors), those on a device.

    A thread makes the next one meanwhile; a GPU gets it on a stream of its own, while it computes.
    What `make` raises comes out here. An item alone is made by the caller.
    """
    items = list(items)
    if len(items) < 2:
        for known, tensors in map(make, items):
            yield known, tuple(sent(x, device) for x in tensors)
        return
    stream = _copy_stream(device) if device.type == "cuda" else None

    def sent_by_the_way(item):
        known, tensors = make(item)
        if stream is None:
            return known, tuple(x.to(device) for x in tensors), None
        # the device first: a thread begins on the first GPU, of which the way back from the stream
        # of another would take memory
        with torch.cuda.device(device), torch.cuda.stream(stream):
            there = tuple(sent(x, device) for x in tensors)
            return known, there, stream.record_event()

    def arrived(future: Future):
        known, tensors, event = future.result()
        if event is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(event)
            for x in tensors:  # their memory was taken on the other stream
                x.record_stream(current)
        return known, tensors

    coming: deque[Future] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for item in items:
                coming.append(pool.submit(sent_by_the_way, item))
                if len(coming) > 1:
                    yield arrived(coming.popleft())
            yield arrived(coming.popleft())
        finally:
            for future in coming:
                future.cancel()
