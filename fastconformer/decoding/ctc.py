"""CTC greedy decoding: the best class of each frame, runs collapsed, blanks dropped."""

import numpy as np
import torch

from .hypothesis import Hypothesis


def ctc_greedy(log_probs: torch.Tensor, lengths: torch.Tensor) -> list[Hypothesis]:
    """log_probs (B, T', V+1), blank last; lengths (B,). The score sums the best log-probability of
    every frame that is not blank, as NeMo's greedy CTC does."""
    blank = log_probs.shape[-1] - 1
    best, labels = log_probs.max(-1)  # (B, T')
    valid = torch.arange(labels.shape[1], device=labels.device) < lengths[:, None]
    spoken = (labels != blank) & valid
    scores = (best.float() * spoken).sum(-1).tolist()
    starts = spoken.clone()
    starts[:, 1:] &= labels[:, 1:] != labels[:, :-1]
    starts, spoken, labels = starts.cpu().numpy(), spoken.cpu().numpy(), labels.cpu().numpy()
    hypotheses = []
    for row, score in enumerate(scores):
        frames = starts[row].nonzero()[0]
        runs = np.bincount(starts[row].cumsum() * spoken[row], minlength=len(frames) + 1)
        hypotheses.append(
            Hypothesis(labels[row][frames].tolist(), frames.tolist(), runs[1:].tolist(), score)
        )
    return hypotheses
