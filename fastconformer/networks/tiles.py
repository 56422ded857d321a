"""Work on long inputs a piece of time after another, so that only results are kept whole.

Used without gradients only: with them every piece would be kept for the backward pass anyway.
"""

from collections.abc import Callable

import torch

# Encoder frames that one piece holds of all clips, and on a CPU of each: shorter pieces of many
# clips cost time, longer ones of one clip only memory.
TILE_FRAMES, TILE_FRAMES_GPU = 4096, 16384
CLIP_FRAMES = 512


def in_tiles(
    function: Callable[[int, int], tuple[torch.Tensor, ...]], x: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """`function(start, stop)` -> tensors (B, stop - start, ...); gives them for all T frames of
    x (B, T, ...).

    One call where gradients are on or the input is short, so that short inputs cost nothing more.
    """
    n_frames = x.shape[1]
    size = (TILE_FRAMES_GPU if x.is_cuda else TILE_FRAMES) // max(1, x.shape[0])
    size = max(1, size if x.is_cuda else min(size, CLIP_FRAMES))
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
