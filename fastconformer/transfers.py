"""Copies between the host and a device for which neither waits, or the host once for all.

A copy from ordinary memory, or back, makes the host wait until the device has done all that it was
given; a GPU that is waited for so has nothing to do afterwards.
"""

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on a device, from the host through pinned memory; x itself where it is there."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


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
