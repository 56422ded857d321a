"""The tiles of the fused loss in plain PyTorch, for any device; what they compute is in fused.py.

The functions of a backend, on a Job, a Tile of n cells and the batch's Cells:

    scores    fills the cells' entries of Cells from their logits
    lattice   log-likelihoods (B,); with a gradient, scores in Cells become occupancies in place
    hidden    (n, H), the rows that the output layer multiplies, in its dtype or another
    gradient  logits (n, outputs) become the loss's gradient in place
    scatter   gradients of hidden, summed onto the rows of d_enc (B * T', H) and d_pred (B * R, H)
    scores_write_logits   whether `scores` has a tile's logits in memory
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import vectorised

_ACT = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
_WORD = 0xFFFFFFFF


def locate(job, index) -> tuple[Tensor, Tensor, Tensor]:
    """Clip, frame and row of cells."""
    clip = torch.searchsorted(job.offsets, index, right=True) - 1
    place = index - job.offsets[clip]
    return clip, place // job.rows[clip], place % job.rows[clip]


def keep(job, index) -> Tensor:
    """Dropout's mask of cells, (n, H): a 32-bit hash of seed, cell and channel against p.

    The hash is two rounds of Wellons' `lowbias32` (nullprogram.com, 2018): the cell's number and
    the seed give a key, the key and the channel a uniform number.
    """
    key = _mix(index & _WORD ^ job.seed & _WORD) ^ job.seed >> 32
    channel = torch.arange(job.enc.shape[1], device=index.device)
    bits = _mix(key[:, None] + channel * 0x9E3779B9 & _WORD)
    return bits >= dropout_threshold(job.dropout)


def dropout_threshold(probability: float) -> int:
    return round(probability * 2**32)


def _mix(x):  # products wrap around at 64 bits, which leaves their low 32 alone
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16


def hidden(job, tile, dtype=None) -> Tensor:
    index = tile.index
    clip, frame, row = locate(job, index)
    wide = job.enc.dtype if job.enc.dtype == torch.float64 else torch.float32
    total = job.enc[clip * job.n_frames + frame].to(wide) + job.pred[clip * job.n_rows + row]
    activated = _ACT[job.activation](total)
    if job.dropout:
        activated = torch.where(keep(job, index), activated / (1.0 - job.dropout), 0.0)
    return activated.to(dtype or job.weight.dtype)


def scores(job, tile, cells) -> Tensor:
    logits = F.linear(hidden(job, tile), job.weight, job.bias)
    clip, _, row = locate(job, tile.index)
    lo, hi = tile.first, tile.last + 1  # without gaps
    tokens = logits[:, : job.n_classes].to(cells.top.dtype)
    cells.top[lo:hi] = top = tokens.amax(-1)
    cells.total[lo:hi] = total = (tokens - top[:, None]).exp_().sum(-1)
    offset = total.log() + job.sigma
    cells.blank[lo:hi] = tokens[:, job.blank] - top - offset
    label = tokens.gather(1, job.targets[clip, row][:, None])[:, 0]
    cells.label[lo:hi] = label - top - offset
    if job.durations is not None:
        duration = logits[:, job.n_classes : job.n_outputs].to(cells.top.dtype)
        cells.duration[lo:hi] = duration.log_softmax(-1)
    return logits


def lattice(job, cells, needs_grad) -> Tensor:
    index = torch.arange(job.n_cells, device=job.enc.device)
    place = locate(job, index)

    def padded(packed):
        shape = (len(job.frames), job.n_frames, job.n_rows, *packed.shape[1:])
        dense = packed.new_zeros(shape, dtype=torch.float64)
        dense[place] = packed[: job.n_cells].double()
        return dense

    duration = padded(cells.duration) if job.durations is not None else None
    log_likelihood, occupancies = vectorised.occupancies(
        padded(cells.blank), padded(cells.label), duration, job.durations, job.frames, job.rows - 1,
        needs_grad,
    )  # fmt: skip
    for packed, dense in zip(cells[2:], occupancies or ()):
        if dense is not None:
            packed[: job.n_cells] = dense[place].to(packed.dtype)
    return log_likelihood


def gradient(job, tile, cells, weights, fastemit_lambda, clamp, logits):
    index = tile.index
    clip, _, row = locate(job, index)
    blank, label = cells.blank[index], cells.label[index]
    passing, label = blank + label, label * (1.0 + fastemit_lambda)
    scale = weights[clip]
    tokens = logits[:, : job.n_classes].to(blank.dtype)
    grad = (
        (tokens - cells.top[index, None])
        .exp_()
        .mul_(((blank + label) / cells.total[index])[:, None])
    )
    grad[:, job.blank] -= blank
    target = job.targets[clip, row][:, None]
    grad.scatter_add_(1, target, -label[:, None])  # 0 where there is no label
    grad.clamp_(-clamp, clamp).mul_(scale[:, None])
    # A clip that does not count or has no alignment: not even NaN may come through.
    ignored = ((scale == 0.0) | (passing == 0.0))[:, None]
    logits[:, : job.n_classes] = grad.masked_fill_(ignored, 0.0).to(logits.dtype)
    if job.durations is not None:
        share = logits[:, job.n_classes : job.n_outputs].to(blank.dtype).softmax(-1)
        share = share * passing[:, None]
        grad = (share - cells.duration[index]).mul_(scale[:, None])
        logits[:, job.n_classes : job.n_outputs] = grad.masked_fill_(ignored, 0.0).to(logits.dtype)


def scatter(job, tile, hidden, d_hidden, d_enc, d_pred):
    index = tile.index
    clip, frame, row = locate(job, index)
    grad = d_hidden.to(d_enc.dtype)
    value = hidden.to(d_enc.dtype)
    if job.dropout:
        mask = keep(job, index)
        grad = torch.where(mask, grad / (1.0 - job.dropout), 0.0)
        value = value * (1.0 - job.dropout)
    if job.activation == "relu":
        grad = torch.where(value > 0.0, grad, 0.0)
    else:
        grad = grad * (1.0 - value * value if job.activation == "tanh" else value - value * value)
    d_enc.index_add_(0, clip * job.n_frames + frame, grad)
    d_pred.index_add_(0, clip * job.n_rows + row, grad)


def scores_write_logits(job) -> bool:
    return True
