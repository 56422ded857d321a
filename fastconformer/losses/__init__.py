"""Transducer losses: joint logits (B, T', U+1, V+1[+N]) -> negative log-likelihood in nats.

`rnnt_loss` (Graves 2012, arXiv:1211.3711) and `tdt_loss` (Xu et al. 2023, arXiv:2304.06795) give
the numbers and gradients of NeMo 3.0's RNNTLoss. This file checks the arguments, draws omega's
coin, reduces, and holds the one autograd.Function; the work is done in

    reference.py    the definition in plain loops, slow, float64, differentiated by autograd
    cpu.py          numba, for CPU tensors
    vectorised.py   plain PyTorch, for any other device and for CPU without numba

The last two have the same two functions: `lattice` (log-likelihood and what its gradient needs) and
`gradient` (of the logits). Both keep only tensors of (B, T', U+1, N) besides the logits; the
gradient is the one further tensor of the logits' size.
"""

import functools
import logging
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import vectorised
from .checks import (
    check_batch,
    check_classes,
    check_durations,
    check_options,
    check_reduction,
    check_targets,
    describe,
    reduce,
)
from .fused import fused_transducer_loss

__all__ = ["fused_transducer_loss", "rnnt_loss", "tdt_loss"]

log = logging.getLogger(__name__)


def rnnt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    fastemit_lambda: float = 0.0,
    clamp: float = -1.0,
    reduction: str | None = "mean_batch",
) -> Tensor:
    """Negative log-likelihood of the RNN Transducer, -log sum over alignments of p(alignment).

    An alignment starts at frame 0; a token stays in its frame, a blank advances one frame, and the
    last symbol is the blank of the last frame. Several tokens may share a frame, so U > T' is fine.

    Args:
        logits: (B, T', U+1, V+1), not normalised, any float type (half types are computed in
            float32), any strides. May be larger than the longest clip needs.
        targets: token ids without blank, (B, U), integer; values past a length are ignored.
        logit_lengths: valid frames of each clip, (B,), at least 1.
        target_lengths: valid tokens of each clip, (B,).
        blank: index of blank in the last dimension.
        fastemit_lambda: FastEmit (arXiv:2010.11148). As in NeMo the reported loss is multiplied by
            1 + lambda, and the gradient has token emissions weighted by 1 + lambda.
        clamp: limit of |gradient| of each logit before the gradient of the reduction is multiplied
            in; 0 or less means none.
        reduction: "mean_batch" (mean of the clips), "mean" (mean of loss / target length; an empty
            target gives inf and a gradient that is not finite, as in NeMo), "mean_volume" (sum of
            losses / sum of target lengths), "sum", or "none" (also None, NeMo's spelling) for the
            losses per clip.
    Returns:
        float32 (float64 for float64 logits), a scalar or (B,). Frames and tokens past a clip's
        lengths have gradient zero, whatever the logits there are.
    Raises:
        ValueError: shapes, types or lengths do not fit together, a target is the blank or not a
            token, a float option is out of range, or the reduction is unknown.
    """
    n_outputs = _check(logits, targets, logit_lengths, target_lengths, reduction)
    n_classes = check_classes(n_outputs, None, blank)
    check_options(0.0, 0.0, fastemit_lambda, clamp)
    check_targets(targets, target_lengths, n_classes, blank)
    return _loss(
        logits, targets, logit_lengths, target_lengths, blank, n_classes, None, 0.0,
        fastemit_lambda, clamp, reduction,
    )  # fmt: skip


def tdt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    durations: Sequence[int],
    blank: int,
    sigma: float = 0.0,
    omega: float = 0.0,
    fastemit_lambda: float = 0.0,
    clamp: float = -1.0,
    reduction: str | None = "mean_batch",
) -> Tensor:
    """Negative log-likelihood of the Token-and-Duration Transducer.

    Each symbol comes with a duration, p(symbol) p(duration): a token advances by any duration
    (0 stays in the frame) and must land before T', a blank by any but 0. The last symbol is a blank
    that lands exactly on T'. Where no alignment exists (durations (2, 4) and an odd T', say, or no
    duration 0 and U >= T') the clip's loss is +inf and its gradient zero; NeMo, whose "impossible"
    is a finite -1000 or -10000, reports about that number instead.

    Args:
        logits: (B, T', U+1, V+1+N), not normalised: V tokens, blank, then one logit for each
            duration. Types and strides as in `rnnt_loss`.
        targets, logit_lengths, target_lengths: as in `rnnt_loss`.
        durations: frames advanced by each class, for example (0, 1, 2, 3, 4); any order and size,
            but one must be positive.
        blank: index of blank among the first V+1 logits: the last of them (V, as NeMo has it) or 0.
        sigma: subtracted from token and blank log-probabilities (logit under-normalisation).
        omega: probability that the whole batch gets the plain RNNT loss on its token logits,
            without sigma and with zero duration gradients. The coin is one draw from torch's
            default CPU generator in each call; there is no draw when omega is 0.
        fastemit_lambda: as in `rnnt_loss`; duration gradients are without it, as in NeMo.
        clamp: as in `rnnt_loss`; duration gradients are not limited, as in NeMo.
        reduction: as in `rnnt_loss`.
    Returns:
        float32 (float64 for float64 logits), a scalar or (B,).
    Raises:
        ValueError: as in `rnnt_loss`, or the last dimension is not V+1+N, or a duration is negative
            or not an integer, or none is positive.
    """
    durations = check_durations(durations)
    n_outputs = _check(logits, targets, logit_lengths, target_lengths, reduction)
    n_classes = check_classes(n_outputs, durations, blank)
    check_options(sigma, omega, fastemit_lambda, clamp)
    check_targets(targets, target_lengths, n_classes, blank)
    if omega > 0.0 and torch.rand((), dtype=torch.float32, device="cpu").item() < omega:
        durations, sigma = None, 0.0
    return _loss(
        logits, targets, logit_lengths, target_lengths, blank, n_classes, durations, sigma,
        fastemit_lambda, clamp, reduction,
    )  # fmt: skip


def _loss(
    logits, targets, logit_lengths, target_lengths, blank, n_classes, durations, sigma,
    fastemit_lambda, clamp, reduction,
):  # fmt: skip
    """The loss with checked arguments; durations None is RNNT on the first n_classes logits."""
    backend = _cpu_backend() if logits.device.type == "cpu" else vectorised
    device = logits.device
    target_lengths = target_lengths.to(device, torch.int64)
    # Looked up here: inside the Function gradients are always off.
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    losses = _TransducerLoss.apply(
        logits,
        targets.to(device, torch.int64),
        logit_lengths.to(device, torch.int64),
        target_lengths,
        (blank, n_classes, durations, sigma),
        (fastemit_lambda, clamp if clamp > 0.0 else math.inf),
        backend,
        needs_grad,
    )
    return reduce(losses, target_lengths, reduction)


class _TransducerLoss(torch.autograd.Function):
    """Joins a backend's `lattice` and `gradient`; the loss of each clip, (B,)."""

    @staticmethod
    def forward(
        ctx, logits, targets, logit_lengths, target_lengths, model, options, backend, needs_grad
    ):
        log_likelihood, state = backend.lattice(
            logits, targets, logit_lengths, target_lengths, *model, needs_grad
        )
        if needs_grad:
            ctx.save_for_backward(logits)
            ctx.state, ctx.options, ctx.backend = state, options, backend
        # NeMo has this factor in float32: 1e-8 of the loss in float64.
        factor = torch.tensor(1.0 + options[0], dtype=torch.float32).item()
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return (-factor * log_likelihood).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses):
        (logits,) = ctx.saved_tensors
        grad = ctx.backend.gradient(logits, ctx.state, grad_losses.double(), *ctx.options)
        return grad, None, None, None, None, None, None, None


@functools.cache
def _cpu_backend() -> ModuleType:
    try:
        from . import cpu
    except ImportError as error:
        log.warning("transducer losses run on plain PyTorch, slower: numba not usable (%s)", error)
        return vectorised
    return cpu


def _check(logits, targets, logit_lengths, target_lengths, reduction) -> int:
    """Shapes, types and lengths; returns the size of the last dimension."""
    check_reduction(reduction)
    if logits.dim() != 4 or not logits.is_floating_point() or 0 in logits.shape:
        raise ValueError(
            f"logits are {describe(logits)}, expected a non-empty float tensor (B, T', U+1, V+1+N)"
        )
    batch, n_frames, n_rows, n_outputs = logits.shape
    inputs = f"logits are {tuple(logits.shape)}"
    check_batch(inputs, batch, n_frames, n_rows, targets, logit_lengths, target_lengths)
    return n_outputs
