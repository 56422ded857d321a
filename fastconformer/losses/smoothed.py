"""Cross-entropy with smoothed labels, for decoders that say one token after the other.

With smoothing e and V classes, NeMo's SmoothedCrossEntropyLoss sums over the tokens that count

    -((1 - s) * log p[target] + s * mean over classes of log p),   s = e * V / (V - 1)
"""

import torch
from torch.nn import functional as F


def smoothed_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    counts: torch.Tensor,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The sum of each clip in nats, (B,) float32.

    Args:
        logits: (B, U, V), not normalised (log-probabilities give the same).
        targets: (B, U); counts: (B, U), True where a token is trained on. A target that does not
            count may be any number.
        label_smoothing: e, from 0 to below 1.
    Source: NeMo 3.0.0; Szegedy et al., arXiv:1512.00567.
    """
    n_classes = logits.shape[-1]
    losses = F.cross_entropy(
        logits.float().flatten(0, 1),
        targets.masked_fill(~counts, 0).flatten(),
        reduction="none",
        label_smoothing=label_smoothing * n_classes / (n_classes - 1),
    )
    return losses.view_as(targets).masked_fill(~counts, 0.0).sum(1)
