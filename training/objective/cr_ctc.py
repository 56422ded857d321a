"""CR-CTC: two views of one input, and how far the CTC head's answers to them lie apart.

Source: Yao et al. 2024 (arXiv:2410.05101). One time-warped input gets two SpecAugment masks, with
more time masking than usual; CTC is the mean of both views', and `consistency` is added to it.

Letters of shapes: B clips, M mel bins, T frames, T' encoder frames, V tokens without blank.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastconformer.transfers import sent


def time_warp(features: Tensor, lengths: Tensor, reach: int) -> Tensor:
    """Stretch what is before a random frame of each clip, and squeeze what is after, or the other
    way round; the clip stays as long as it was.

    Args:
        features: log-mel frames, (B, M, T).
        lengths: valid frames, (B,).
        reach: the frame moves by less than this many frames; a clip of less than 2 * reach + 2
            frames stays as it is.
    Returns:
        (B, M, T), a new tensor. Draws from torch's global generator.
    Source: SpecAugment's time warping (arXiv:1904.08779), linear between frames.
    """
    warped = features.clone()
    for clip, length in enumerate(lengths.tolist()):
        # Drawn for every clip, so that one clip's warp does not hang on the others' lengths.
        place, move = torch.rand(2).tolist()
        if length < 2 * reach + 2:
            continue
        center = reach + 1 + int(place * (length - 2 * reach - 1))
        target = center - reach + 1 + int(move * (2 * reach - 1))
        parts = features[clip, :, :center], features[clip, :, center:length]
        warped[clip, :, :length] = torch.cat(
            [
                F.interpolate(part[None], size=size, mode="linear")[0]
                for part, size in zip(parts, (target, length - target), strict=True)
            ],
            dim=-1,
        )
    return warped


def consistency(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Distance of two views' CTC distributions, in nats, summed over frames.

    `1/2 * sum over t of KL(sg(b_t) || a_t) + KL(sg(a_t) || b_t)`, where sg stops the gradient: each
    view is drawn to the other as it stands (arXiv:2410.05101, equation 4).

    Args:
        log_probs: (2 * B, T', V+1), the first view of every clip, then the second.
        lengths: valid encoder frames, (2 * B,), the same for both views.
    Returns:
        (2 * B,): each clip's distance, once for each view, so that it goes with losses per view.
    """
    first, second = log_probs.float().chunk(2)
    distance = F.kl_div(first, second.detach(), reduction="none", log_target=True)
    distance = distance + F.kl_div(second, first.detach(), reduction="none", log_target=True)
    frames = torch.arange(log_probs.shape[1], device=log_probs.device)
    padding = frames >= sent(lengths, frames.device).chunk(2)[0][:, None]
    per_clip = 0.5 * distance.sum(-1).masked_fill(padding, 0.0).sum(-1)
    return per_clip.repeat(2)
