"""The transducer lattice in plain PyTorch, for any device, with the analytic gradient.

Nodes (t, u) are sorted by anti-diagonal t + u; each step takes one diagonal, vectorised over its
nodes, the clips and the arcs. An arc is a class of duration with or without a token; RNNT has two,
a token of 0 frames and a blank of 1. Backwards, as log-probabilities:

    beta(node) = logsumexp over arcs of  score(arc) + beta(end of arc),    beta(T, U) = 0

and forwards, as probabilities, how often an alignment passes a node and an arc (its occupancy):

    p(arc | node) = exp(score(arc) + beta(end of arc) - beta(node))
    occupancy(node) = sum over arcs into it of  occupancy(start of arc) p(arc | start of arc)

The forward sum has only terms from 0 to 1, and -inf never meets -inf: a clip without any alignment
has log-likelihood -inf and all occupancies 0. The definition is in reference.py.

Letters besides the style guide's: K arcs, C nodes. Scores are log-probabilities; they and all sums
over them are float64, being small beside the logits.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """What the gradient needs beyond the logits."""

    targets: Tensor  # (B, U+1), 0 where there is none
    padding: Tensor  # (B, T', U+1), True past a clip's lengths
    top: Tensor  # (B, T', U+1), maximum of the token logits
    total: Tensor  # (B, T', U+1), sum of exp(logit - top)
    blank: int
    n_classes: int  # V + 1
    blank_occupancy: Tensor  # (B, T', U+1)
    label_occupancy: Tensor  # (B, T', U+1)
    duration_occupancy: Tensor | None  # (B, T', U+1, N); None for RNNT


def lattice(
    logits, targets, logit_lengths, target_lengths, blank, n_classes, durations, sigma, needs_grad
) -> tuple[Tensor, State | None]:
    """Log-likelihood of each clip.

    Args:
        logits: (B, T', U+1, V+1+N), any strides.
        targets, logit_lengths, target_lengths: as in `tdt_loss`, int64 on the logits' device.
        blank, sigma: as in `tdt_loss`.
        n_classes: V+1.
        durations: frames of the N classes, or None for RNNT on the first n_classes logits.
        needs_grad: whether `gradient` will be called.
    Returns:
        (B,) float64, and the state for `gradient`, or None.
    """
    logits = logits.detach()
    _, n_frames, n_rows, _ = logits.shape
    device = logits.device
    row = torch.arange(n_rows, device=device)
    targets = torch.nn.functional.pad(targets, (0, max(0, n_rows - targets.shape[1])))[:, :n_rows]
    targets = targets.masked_fill(row >= target_lengths[:, None], 0)

    tokens = _at_least_float32(logits[..., :n_classes])
    top = tokens.amax(-1)  # kept apart from the total: with large logits their sum is too coarse
    total = (tokens - top[..., None]).exp_().sum(-1)
    offset = top.double() + total.double().log() + sigma
    blank_score = tokens[..., blank].double() - offset
    label_score = tokens.gather(-1, _index(targets, n_frames))[..., 0].double() - offset
    duration_score = None
    if durations is not None:
        duration_score = logits[..., n_classes:].double().log_softmax(-1)
    log_likelihood, occupancy = occupancies(
        blank_score, label_score, duration_score, durations, logit_lengths, target_lengths,
        needs_grad,
    )  # fmt: skip
    if not needs_grad:
        return log_likelihood, None
    frame = torch.arange(n_frames, device=device)[:, None]
    padding = (frame >= logit_lengths[:, None, None]) | (row > target_lengths[:, None, None])
    return log_likelihood, State(targets, padding, top, total, blank, n_classes, *occupancy)


def occupancies(
    blank_score, label_score, duration_score, durations, logit_lengths, target_lengths, needs_grad
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None] | None]:
    """The lattice by itself.

    Args:
        blank_score, label_score: log-probabilities, (B, T', U+1), float64.
        duration_score: (B, T', U+1, N), or None with durations None for RNNT.
        durations, logit_lengths, target_lengths, needs_grad: as in `lattice`.
    Returns:
        Log-likelihood (B,), and the occupancies of blanks, of tokens, (B, T', U+1) each, and of
        duration classes, (B, T', U+1, N), or None; or None in their place.
    """
    _, n_frames, n_rows = blank_score.shape
    device = blank_score.device
    if durations is None:
        arcs = [(0, 0, True), (0, 1, False)]  # class, frames, with a token
    else:
        arcs = [(i, d, True) for i, d in enumerate(durations)]
        arcs += [(i, d, False) for i, d in enumerate(durations) if d > 0]
    frames_left = logit_lengths[:, None, None] - torch.arange(n_frames, device=device)[:, None]
    rows_left = (target_lengths[:, None] - torch.arange(n_rows, device=device))[:, None]
    scores = []
    for i, d, with_token in arcs:
        if with_token:
            allowed = (rows_left > 0) & (frames_left > d)
        else:
            allowed = (rows_left >= 0) & (
                (frames_left > d) | ((frames_left == d) & (rows_left == 0))
            )
        score = label_score if with_token else blank_score
        if duration_score is not None:
            score = score + duration_score[..., i]
        scores.append(score.masked_fill(~allowed, -torch.inf))
    final = logit_lengths * n_rows + target_lengths
    steps = [(d, int(with_token)) for _, d, with_token in arcs]
    log_likelihood, occupancy = _sweep(torch.stack(scores), final, steps, needs_grad)
    if not needs_grad:
        return log_likelihood, None
    duration_occupancy = None
    if duration_score is not None:
        duration_occupancy = torch.zeros_like(duration_score)
        for (i, _, _), of_arc in zip(arcs, occupancy, strict=True):
            duration_occupancy[..., i] += of_arc
    n_label = sum(with_token for _, _, with_token in arcs)
    blank_occupancy, label_occupancy = occupancy[n_label:].sum(0), occupancy[:n_label].sum(0)
    return log_likelihood, (blank_occupancy, label_occupancy, duration_occupancy)


def _sweep(scores, final, steps, needs_grad) -> tuple[Tensor, Tensor | None]:
    """Both passes over the lattice.

    Args:
        scores: (K, B, T', U+1), -inf where an arc may not go.
        final: t * (U+1) + u of the node at which each clip ends, (B,).
        steps: frames and tokens that each arc advances.
    Returns:
        Log-likelihood (B,), and the occupancy of each arc (K, B, T', U+1) or None.
    """
    n_arcs, n_clips, n_frames, n_rows = scores.shape
    device = scores.device
    n_nodes = (n_frames + 1) * n_rows  # alignments end one frame after the last
    time = torch.arange(n_frames + 1, device=device)[:, None].expand(-1, n_rows).flatten()
    row = torch.arange(n_rows, device=device).repeat(n_frames + 1)
    order = (time + row).argsort(stable=True)
    rank = order.argsort()
    # One index past the nodes: the end (or start) of an arc that leaves the lattice.
    rank_or_outside = torch.cat([rank, rank.new_tensor([n_nodes])])
    time, row = time[order], row[order]
    sizes = [min(n, n_frames) - max(0, n - n_rows + 1) + 1 for n in range(n_frames + n_rows)]
    diagonals = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))

    def neighbours(direction):
        """Index of the node at the other end of each arc, (C, K)."""
        columns = []
        for frames, tokens in steps:
            t, u = time + direction * frames, row + direction * tokens
            inside = (t >= 0) & (t <= n_frames) & (u >= 0) & (u < n_rows)
            columns.append(rank_or_outside[torch.where(inside, t * n_rows + u, n_nodes)])
        return torch.stack(columns, 1)

    scores = scores.permute(2, 3, 0, 1).reshape(-1, n_arcs, n_clips)
    scores = torch.cat([scores, scores.new_full((n_rows, n_arcs, n_clips), -torch.inf)])[order]
    ends = neighbours(1)
    beta = scores.new_full((n_nodes + 1, n_clips), -torch.inf)
    beta[rank[final], torch.arange(n_clips, device=device)] = 0.0
    for lo, hi in reversed(diagonals):
        onwards = scores[lo:hi] + beta[ends[lo:hi]]  # (nodes of the diagonal, K, B)
        beta[lo:hi] = torch.cat([beta[lo:hi, None], onwards], 1).logsumexp(1)
    log_likelihood = beta[0].clone()
    if not needs_grad:
        return log_likelihood, None

    dead = beta[:-1, None] == -torch.inf
    share = (scores + beta[ends] - beta[:-1, None]).exp().masked_fill(dead, 0.0)
    share = torch.cat([share, share.new_zeros(1, n_arcs, n_clips)])
    starts = neighbours(-1)
    arriving = share[starts, torch.arange(n_arcs, device=device)]  # (C, K, B)
    passing = torch.zeros_like(beta)
    passing[0] = 1.0
    for lo, hi in diagonals[1:]:
        passing[lo:hi] = (passing[starts[lo:hi]] * arriving[lo:hi]).sum(1)
    occupancy = (share * passing[:, None])[rank[: n_frames * n_rows]]
    return log_likelihood, occupancy.view(n_frames, n_rows, n_arcs, n_clips).permute(2, 3, 0, 1)


def gradient(logits, state, grad_losses, fastemit_lambda, clamp) -> Tensor:
    """Gradient of the logits.

    Args:
        logits: those given to `lattice`, which returned the state.
        grad_losses: gradient of the loss of each clip, (B,), float64.
        fastemit_lambda: as in `tdt_loss`.
        clamp: as in `tdt_loss`, but inf for none.
    Returns:
        (B, T', U+1, V+1+N) of the logits' type:
        softmax_v (blank + (1 + lambda) label) - [v is blank] blank
        - [v is label] (1 + lambda) label
        with the occupancies of the node's arcs, and softmax_i (blank + label) - duration_i.
    """
    wide = _at_least_float32(logits.detach())
    scale = grad_losses[:, None, None]
    blank = state.blank_occupancy
    label = state.label_occupancy * (1.0 + fastemit_lambda)
    weight = (blank + label) / state.total
    if clamp == torch.inf:  # nothing comes between: scale the small tensors, not the large one
        blank, label, weight = blank * scale, label * scale, weight * scale
    grad = torch.empty_like(wide, memory_format=torch.contiguous_format)
    tokens, durations = grad[..., : state.n_classes], grad[..., state.n_classes :]
    torch.sub(wide[..., : state.n_classes], state.top[..., None], out=tokens)
    tokens.exp_().mul_(weight[..., None].to(wide.dtype))
    tokens[..., state.blank] -= blank.to(wide.dtype)
    index = _index(state.targets, logits.shape[1])
    tokens.scatter_(-1, index, tokens.gather(-1, index) - label[..., None].to(wide.dtype))
    if clamp != torch.inf:
        tokens.clamp_(-clamp, clamp).mul_(scale[..., None].to(wide.dtype))
    if state.duration_occupancy is None:
        durations.zero_()
    else:
        share = wide[..., state.n_classes :].double().softmax(-1)
        share *= (state.blank_occupancy + state.label_occupancy)[..., None]
        durations.copy_((share - state.duration_occupancy) * scale[..., None])
    # Last, because nothing in the padding may matter, not even NaN.
    ignored = state.padding | (scale == 0.0)
    return grad.masked_fill_(ignored[..., None], 0.0).to(logits.dtype)


def _index(targets, n_frames) -> Tensor:
    return targets[:, None, :, None].expand(-1, n_frames, -1, -1)


def _at_least_float32(tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
