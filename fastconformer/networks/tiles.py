"""Work on long inputs a piece of time after another, so that only results are kept whole.

Used without gradients only: with them every piece would be kept for the backward pass anyway.
"""

import functools
from collections.abc import Callable

import torch

# Encoder frames that one piece holds of all clips, and on a CPU of each: shorter pieces of many
# clips cost time, longer ones of one clip only memory.
TILE_FRAMES, CLIP_FRAMES = 4096, 512
# Of a GPU's memory, what a feed-forward's inside takes, four times as wide as x: two of it live at
# once. By the memory that is there, not that is free: the same clips get the same pieces.
WIDER, SHARE = 4, 48


@functools.cache
def gpu_memory(device: torch.device) -> int:
    """Bytes of the card."""
    return torch.cuda.get_device_properties(device).total_memory


def _tile_frames(x: torch.Tensor) -> int:
    """Of each clip in a piece of x (B, T, ...)."""
    batch = max(1, x.shape[0])
    if not x.is_cuda:
        return max(1, min(TILE_FRAMES // batch, CLIP_FRAMES))
    frame_bytes = WIDER * x.shape[2:].numel() * x.element_size()
    return max(1, gpu_memory(x.device) // SHARE // (frame_bytes * batch))


def in_tiles(
    function: Callable[[int, int], tuple[torch.Tensor, ...]], x: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """`function(start, stop)` -> tensors (B, stop - start, ...); gives them for all T frames of
    x (B, T, ...).

    One call where gradients are on or the input is short, so that short inputs cost nothing more.
    """
    n_frames = x.shape[1]
    size = _tile_frames(x)
    if n_frames <= size or torch.is_grad_enabled():
        return function(0, n_frames)
    whole = None
    for start in range(0, n_frames, size):
        stop = min(start + size, n_frames)
        pieces = function(start, stop)
        if whole is None:
            whole = tuple(p.new_empty(p.shape[0], n_frames, *p.shape[2:]) for p in pieces)
        for target, piece in zip(whole, pieces, strict=True):
            target[:, start:stop] = piece
    return whole
