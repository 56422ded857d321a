"""The device of a run: which one, how much memory a call takes there, and what it leaves behind."""

import contextlib
import os
from collections.abc import Callable, Iterator

import torch

from fastconformer import process_memory
from fastconformer.load import check_usable, find_device

CUDA_SHARE = 0.95  # of the free memory: the allocator needs room between blocks
CPU_SHARE = 0.5  # of the available memory: other programs live there too


def choose_device(name: str) -> torch.device:
    """The recipe's device; of many processes each takes the GPU that torchrun names."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = find_device(name, "trainer.device")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        check_usable(device)
    return device


def release_memory() -> None:
    """What no tensor uses goes back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Weights, statistics, gradients, modes and random numbers are afterwards what they are now."""
    kept = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    cuda = torch.cuda.is_available()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else ()):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in model.state_dict().items():
                    tensor.copy_(kept[name])
            for name, module in model.named_modules():
                module.training = modes[name]
            for parameter in model.parameters():
                parameter.grad = None


class Memory:
    """How much a call takes at most, where there is a limit."""

    def __init__(self, device: torch.device, limit_gb: float):
        self.device, self.limit_gb = device, limit_gb

    def peak_gb(self, call: Callable[[], None]) -> float | None:
        """Memory in use at the call's peak, in 10^9 bytes, or None when it is above the limit."""
        process_memory.give_back()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            process_memory.forget_peak()
        try:
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            if not process_memory.is_out_of_memory(error):
                raise
            error.__traceback__ = None  # it holds the step's tensors
            return None
        if self.device.type == "cuda":
            peak_gb = torch.cuda.max_memory_allocated(self.device) / 1e9
        else:
            peak_gb = process_memory.peak_bytes() / 1e9
        return peak_gb if peak_gb <= self.limit_gb else None


@contextlib.contextmanager
def device_memory(device: torch.device, memory_gb: float | None) -> Iterator[Memory]:
    """Memory of a device under a limit; on CUDA torch keeps to the limit itself."""
    if device.type != "cuda":
        if not process_memory.forget_peak():
            raise ValueError("the search on a CPU needs Linux; give data.batch_duration_s")
        if memory_gb is None:
            free, held = process_memory.free_bytes(), process_memory.resident_bytes()
            memory_gb = (CPU_SHARE * free + held) / 1e9
        yield Memory(device, memory_gb)
        return
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    if memory_gb is None:
        memory_gb = CUDA_SHARE * (free + torch.cuda.memory_reserved(device)) / 1e9
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * 1e9 / total), device)
    try:
        yield Memory(device, memory_gb)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()
