"""The transducer losses as their definition: loops over frames and tokens, gradients by autograd.

Short and slow; the other implementations are tested against it, in float64. The arguments are those
of the public functions without omega and reduction, nothing is checked, and the result is the loss
of each clip, (B,).

alpha(t, u) is the log-probability of having emitted u tokens on arriving at frame t:

    alpha(0, 0) = 0
    alpha(t, u) = logsumexp over classes i, of d_i frames, of
                      alpha(t-d_i, u)   + blank(t-d_i, u)   + duration_i(t-d_i, u)     with d_i > 0
                      alpha(t-d_i, u-1) + label(t-d_i, u-1) + duration_i(t-d_i, u-1)   with t < T
    loss        = -alpha(T, U)

RNNT is the case in which a label always takes 0 frames and a blank always 1.

Sources: Graves 2012 (arXiv:1211.3711), Xu et al. 2023 (arXiv:2304.06795), Yu et al. 2021 (FastEmit,
arXiv:2010.11148), and for what FastEmit and clamp do to the numbers NeMo 3.0's CUDA kernels.
"""

import math

import torch
from torch import Tensor


def rnnt_loss(
    logits, targets, logit_lengths, target_lengths, blank, fastemit_lambda=0.0, clamp=-1.0
) -> Tensor:
    """As `fastconformer.losses.rnnt_loss` with reduction "none"."""

    def losses(logits):
        certain = torch.zeros_like(logits[..., :1])
        return _losses(
            logits.log_softmax(-1), certain, [(0, 0)], [(0, 1)],
            targets, logit_lengths, target_lengths, blank, fastemit_lambda,
        )  # fmt: skip

    return _with_clamped_gradient(losses, logits, logits.shape[-1], clamp)


def tdt_loss(
    logits, targets, logit_lengths, target_lengths, durations, blank,
    sigma=0.0, fastemit_lambda=0.0, clamp=-1.0,
) -> Tensor:  # fmt: skip
    """As `fastconformer.losses.tdt_loss` with reduction "none", without omega."""
    n_classes = logits.shape[-1] - len(durations)
    label_arcs = list(enumerate(durations))
    blank_arcs = [(i, d) for i, d in label_arcs if d > 0]

    def losses(logits):
        return _losses(
            logits[..., :n_classes].log_softmax(-1) - sigma,
            logits[..., n_classes:].log_softmax(-1), label_arcs, blank_arcs,
            targets, logit_lengths, target_lengths, blank, fastemit_lambda,
        )  # fmt: skip

    return _with_clamped_gradient(losses, logits, n_classes, clamp)


def _losses(
    log_probs, durations, label_arcs, blank_arcs,
    targets, logit_lengths, target_lengths, blank, fastemit_lambda,
) -> Tensor:  # fmt: skip
    losses = []
    for b, (n_frames, n_tokens) in enumerate(
        zip(logit_lengths.tolist(), target_lengths.tolist(), strict=True)
    ):
        index = targets[b, :n_tokens].long().expand(log_probs.shape[1], -1)
        label = log_probs[b, :, :n_tokens].gather(-1, index[..., None])[..., 0]
        # FastEmit in the gradient only: token emissions count 1 + lambda times, durations once.
        label = label + fastemit_lambda * (label - label.detach())
        log_likelihood = _log_likelihood(
            label, log_probs[b, ..., blank], durations[b], label_arcs, blank_arcs,
            n_frames, n_tokens,
        )  # fmt: skip
        loss = -log_likelihood
        if fastemit_lambda > 0.0:  # and in the reported loss a factor, which NeMo has in float32
            factor = torch.tensor(1.0 + fastemit_lambda, dtype=torch.float32).item()
            loss = loss - (factor - 1.0) * log_likelihood.detach()
        losses.append(loss)
    return torch.stack(losses)


def _log_likelihood(label, blank, durations, label_arcs, blank_arcs, n_frames, n_tokens) -> Tensor:
    alpha = {(0, 0): blank.new_zeros(())}  # only cells that can be reached
    for t in range(n_frames + 1):
        for u in range(n_tokens + 1):
            arrivals = [
                alpha[t - d, u] + blank[t - d, u] + durations[t - d, u, i]
                for i, d in blank_arcs
                if (t - d, u) in alpha
            ]
            arrivals += [
                alpha[t - d, u - 1] + label[t - d, u - 1] + durations[t - d, u - 1, i]
                for i, d in label_arcs
                if (t - d, u - 1) in alpha and t < n_frames
            ]
            if arrivals:
                alpha[t, u] = torch.logsumexp(torch.stack(arrivals), 0)
    return alpha.get((n_frames, n_tokens), blank.sum() * 0.0 - math.inf)


def _with_clamped_gradient(losses, logits, n_classes, clamp) -> Tensor:
    """The losses, with the gradient of the first n_classes logits limited before it is scaled."""
    if clamp <= 0.0 or not logits.requires_grad:
        return losses(logits)
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        value = losses(leaf)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
    grad[..., :n_classes].clamp_(-clamp, clamp)
    return value.detach() + ((logits - logits.detach()) * grad).sum((1, 2, 3))
