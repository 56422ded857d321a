"""The transducer loss from the joint's two projected inputs, without the joint tensor.

    hidden(t, u) = dropout(act(enc_proj[t] + pred_proj[u]))          (H,)
    z(t, u)      = out_weight hidden(t, u) + out_bias                (V+1+N,)

z for all (t, u) is the tensor of (B, T', U+1, V+1+N) that fills the memory in training. Neither the
loss nor its gradient needs all of it at once. The valid cells (t <= T-1, u <= U of each clip) stand
in one line over the batch, by clip, frame, row, and tiles of at most `tile_cells` of them are
visited twice:

1. Forward. A tile's hidden and z are made; of each cell remain the maximum of the token logits and
   their sum of exponentials, log p(blank), log p(label) and log q(duration_i): 4 + N numbers, where
   z has V+1+N. p is the softmax over tokens and blank, q that over the durations.
2. The lattice, on these numbers alone. With a(t, u) the log-probability of arriving at a cell and
   b(t, u) that of reaching the end from it (reference.py has the recursion), each arc k from
   a cell c has the probability of lying on the alignment, its occupancy:
       g_k(c) = exp(a(c) + score_k(c) + b(end of k) - log p(targets))
   Summed by kind they replace the scores: blank g_b, label g_l, duration class g_i.
3. Backward. The tile's hidden and z are made again, the logits become their gradient in place
       d loss / d z_v = (g_b + g_l) p_v - [v is blank] g_b - [v is label] g_l
       d loss / d z_i = (g_b + g_l) q_i - g_i
   (g_l times 1 + lambda for FastEmit among tokens; then clamp; then the clip's weight) and three
   products follow: d out_weight += dz^T hidden, d hidden = dz out_weight, and with act' and the
   same dropout mask d hidden summed over u and over t gives the gradients of the two inputs.

Memory beside inputs and gradients is one tile and about 4 * (8 + N) bytes a cell. The price is the
first product made twice: four products where the joint tensor needs three.

On a CPU, where the products are nearly all of the time, clips whose logits fit in `_KEPT_BYTES` are
worked through one group after another, and the group's logits kept from step 1 to step 3: three
products. The gradients are then made in the forward pass, before the weights of the clips in the
loss are known: those of the plain sum are made, and the backward pass multiplies by the weight if
it is the same for all clips, or else visits the tiles again.

Dropout's mask is a hash of seed, cell and channel (`keep` in fused_vectorised.py), so that the two
visits agree without storing it. No sum depends on scheduling: the same call gives the same bits.

Skipping cells: with eps > 0 the backward pass visits only cells with occupancy g_b + g_l >= eps
(g is at most 1, and sums to at least 1 over a clip's cells). The error is bounded: a skipped cell's
dz has an L1 norm below 4 (1 + lambda) eps, as each of its two softmaxes moves at most twice the
cell's occupancy, so that a clip of T frames and U tokens loses at most 4 (1 + lambda) eps T (U+1)
of dz in L1 (before its weight in the loss), and |out_weight|_max times that of d hidden. What was
skipped in fact is reported. Clips that are trained already have a few active cells per frame.

The same arithmetic stands in fused_cpu.py (numba, CPU), fused_triton.py (CUDA) and
fused_vectorised.py (plain PyTorch, anywhere).

Sources: Graves 2012 (arXiv:1211.3711); Xu et al. 2023 (arXiv:2304.06795); Yu et al. 2021 (FastEmit,
arXiv:2010.11148); the gradient past the softmax: Li et al. 2019 (arXiv:1909.12415); one sample at
a time: Braun et al. 2022 (arXiv:2211.16270); tiles and recomputation over packed cells for RNNT:
NeMo pull request 16040; the numbers: NeMo 3.0's RNNTLoss and TDTLossNumba.

Letters besides the style guide's: H joint width, R = U+1 rows of a frame, C cells.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import fused_vectorised
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

log = logging.getLogger(__name__)

ACTIVATIONS = ("relu", "tanh", "sigmoid")

# Logits of a tile: large enough for full speed of the products, small beside everything else, and
# on a CPU within its caches.
_TILE_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}
_TILE_CELLS = {"cpu": 1024, "cuda": 32768}
# Logits that a CPU keeps between the two visits, a clip's or several clips' (module docstring).
_KEPT_BYTES = 48 << 20


def fused_transducer_loss(
    enc_proj: Tensor,
    pred_proj: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    durations: Sequence[int] | None = None,
    blank: int | None = None,
    sigma: float = 0.0,
    omega: float = 0.0,
    fastemit_lambda: float = 0.0,
    clamp: float = -1.0,
    activation: str = "relu",
    dropout: float = 0.0,
    eps: float = 0.0,
    reduction: str | None = "none",
    tile_cells: int | None = None,
    report: dict[str, Tensor] | None = None,
) -> Tensor:
    """The RNNT (`durations` None) or TDT loss of a joint network, its logits never all in memory.

    Equal to `rnnt_loss` or `tdt_loss` of the logits
    `linear(dropout(act(enc_proj[:, :, None] + pred_proj[:, None])), out_weight, out_bias)`.

    Args:
        enc_proj: projected encoder frames, (B, T', H); float32, float64, bfloat16 or float16.
        pred_proj: projected prediction states, (B, U+1, H).
        out_weight, out_bias: the joint's output layer, (V+1+N, H) and (V+1+N,) or None; outputs
            are V tokens, blank, then the durations.
        targets, logit_lengths, target_lengths: as in `rnnt_loss`.
        durations: as in `tdt_loss`; None for RNNT.
        blank: index of blank; None: the last of tokens and blank, as NeMo has it.
        sigma, omega, fastemit_lambda, clamp, reduction: as in `tdt_loss` (sigma and omega are
            TDT's alone); the losses of the clips by default.
        activation: "relu", "tanh" or "sigmoid".
        dropout: probability of a hidden channel being zeroed, in every call (give 0 outside
            training). The seed is one draw from torch's default CPU generator; none for 0.
        eps: gradients skip cells less occupied than this; 0 skips none. Bound: module docstring.
        tile_cells: cells whose logits are in memory at once; None: by the device, at most 128 MiB.
        report: gets "active_share" (of a clip's cells, those that the gradient visits) and
            "skipped_occupancy" (share of the clip's occupancy in the others), (B,) each.
    Returns:
        float32 (float64 for float64 inputs), (B,) or a scalar. The products are in the inputs'
        common type, or autocast's; everything between them in float32 (float64). Gradients come in
        each input's own type.
    Raises:
        ValueError: as in `tdt_loss`, or the inputs' shapes, types or devices do not fit together,
            or an option is out of range.
    """
    check_reduction(reduction)
    check_options(sigma, omega, fastemit_lambda, clamp)
    if durations is not None:
        durations = check_durations(durations)
    elif sigma or omega:
        raise ValueError(f"sigma is {sigma} and omega {omega} without durations; they are TDT's")
    _check_inputs(enc_proj, pred_proj, out_weight, out_bias, activation, dropout, eps, tile_cells)
    n_outputs = len(out_weight)
    if blank is None:
        blank = n_outputs - len(durations or ()) - 1
    check_classes(n_outputs, durations, blank)

    device = enc_proj.device
    dtype = torch.promote_types(
        torch.promote_types(enc_proj.dtype, pred_proj.dtype), out_weight.dtype
    )
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    if dtype == torch.float16 and device.type == "cpu":
        dtype = torch.float32
    if out_bias is None:
        out_bias = out_weight.new_zeros(n_outputs)
    needs = [
        torch.is_grad_enabled() and x.requires_grad
        for x in (enc_proj, pred_proj, out_weight, out_bias)
    ]
    # From the padded shape, so that shapes of inputs alone decide the shapes of what is saved.
    # The weights of clips in "mean" are not equal.
    kept_cells = tile_cells or _KEPT_BYTES // (n_outputs * dtype.itemsize)
    fits = enc_proj.shape[1] * pred_proj.shape[1] <= kept_cells
    if not fits or not any(needs) or reduction == "mean" or device.type != "cpu":
        kept_cells = 0
    options = Options(
        sigma, omega, fastemit_lambda, clamp if clamp > 0.0 else math.inf, dropout, eps
    )
    losses, activity, *_ = _forward(
        enc_proj,
        pred_proj,
        out_weight,
        out_bias,
        targets,
        logit_lengths,
        target_lengths,
        # Drawn here and not inside: an operator that draws would not be a function of its inputs.
        torch.rand((), dtype=torch.float32, device="cpu") if omega > 0.0 else None,
        torch.randint(0, 2**62, (), device="cpu") if dropout > 0.0 else None,
        durations,
        blank,
        activation,
        list(options),
        dtype,
        tile_cells or 0,
        kept_cells,
        needs[0] or needs[1],
        needs[2] or needs[3],
    )
    if report is not None:
        report["active_share"], report["skipped_occupancy"] = activity.detach().unbind()
    return reduce(losses, target_lengths.to(device), reduction)


def _check_inputs(enc_proj, pred_proj, weight, bias, activation, dropout, eps, tile_cells):
    is_float = torch.is_floating_point
    for name, tensor in (("enc_proj", enc_proj), ("pred_proj", pred_proj)):
        if tensor.dim() != 3 or not is_float(tensor) or 0 in tensor.shape:
            raise ValueError(f"{name} is {describe(tensor)}, expected floats, not empty (B, n, H)")
    width = enc_proj.shape[2]
    if pred_proj.shape[0] != enc_proj.shape[0] or pred_proj.shape[2] != width:
        raise ValueError(
            f"enc_proj is {tuple(enc_proj.shape)} and pred_proj {tuple(pred_proj.shape)}, expected "
            "(B, T', H) and (B, U+1, H) with the same B and H"
        )
    if weight.dim() != 2 or weight.shape[1] != width or not len(weight) or not is_float(weight):
        raise ValueError(f"out_weight is {describe(weight)}, expected floats (V+1+N, {width})")
    if bias is not None and (bias.shape != (len(weight),) or not is_float(bias)):
        raise ValueError(f"out_bias is {describe(bias)}, expected floats ({len(weight)},) or None")
    devices = {str(x.device) for x in (enc_proj, pred_proj, weight, bias) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"inputs lie on {' and '.join(sorted(devices))}, expected one device")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected {', '.join(ACTIVATIONS)}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, expected a probability below 1")
    if not 0.0 <= eps < 1.0:
        raise ValueError(f"eps is {eps}, expected an occupancy from 0 to below 1")
    if tile_cells is not None and not (isinstance(tile_cells, int) and tile_cells >= 1):
        raise ValueError(f"tile_cells is {tile_cells}, expected an integer from 1, or None")


class Options(NamedTuple):
    sigma: float
    omega: float
    fastemit_lambda: float
    clamp: float  # inf for none
    dropout: float
    eps: float


class Job(NamedTuple):
    """What the passes over tiles share. Tensors are contiguous, on one device."""

    enc: Tensor  # (B * T', H)
    pred: Tensor  # (B * R, H), of the same type
    weight: Tensor  # (outputs in use, H), in the type of the products
    bias: Tensor
    targets: Tensor  # (B, R), int64, 0 where there is none
    frames: Tensor  # (B,), int64
    rows: Tensor  # (B,), U+1 of each clip
    offsets: Tensor  # (B,), first cell of each clip
    shapes: tuple[tuple[int, int], ...]  # frames and rows again, known to Python
    n_frames: int  # T' of the tensors
    n_rows: int  # R of the tensors
    n_cells: int
    blank: int
    n_classes: int  # V + 1
    durations: tuple[int, ...] | None
    sigma: float
    activation: str
    dropout: float
    seed: int


class Tile(NamedTuple):
    """Cells that are worked on at once."""

    index: Tensor  # numbers of the cells, ascending, (n,)
    first: int  # of them
    last: int
    start: int = 0  # visited cells before the tile
    before: Tensor | None = None  # visited cells before each cell, (C + 1,); None: all before it


class Cells(NamedTuple):
    """What is kept of each cell, (C,) or (C, N); past the valid ones undefined."""

    top: Tensor  # maximum of the token logits
    total: Tensor  # sum of exp(logit - top)
    blank: Tensor  # log p(blank); after the lattice its occupancy
    label: Tensor
    duration: Tensor


def _job(
    enc, pred, weight, bias, targets, logit_lengths, target_lengths, coin, seed, durations, blank,
    activation, options, dtype,
) -> Job:  # fmt: skip
    device, width, n_rows = enc.device, enc.shape[2], pred.shape[1]
    n_classes = len(weight) - len(durations or ())
    sigma = options.sigma
    if coin is not None and coin.item() < options.omega:
        durations, sigma = None, 0.0
        weight, bias = weight[:n_classes], bias[:n_classes]
    frames = logit_lengths.to(device, torch.int64)
    rows = target_lengths.to(device, torch.int64) + 1
    ends = (frames * rows).cumsum(0)
    shapes = tuple((t, u + 1) for t, u in zip(logit_lengths.tolist(), target_lengths.tolist()))
    targets = F.pad(targets.to(device, torch.int64), (0, max(0, n_rows - targets.shape[1])))
    none = torch.arange(n_rows, device=device) >= rows[:, None] - 1
    # As they are, also under autocast: rounded before their sum, a ReLU might take the other side.
    states = torch.promote_types(enc.dtype, pred.dtype)
    if dtype == torch.float64 or (states == torch.float16 and device.type == "cpu"):
        states = dtype
    return Job(
        enc.to(states).reshape(-1, width).contiguous(),
        pred.to(states).reshape(-1, width).contiguous(),
        weight.to(dtype).contiguous(),
        bias.to(dtype).contiguous(),
        targets[:, :n_rows].masked_fill(none, 0).contiguous(),
        frames,
        rows,
        ends - frames * rows,
        shapes,
        enc.shape[1],
        n_rows,
        sum(t * r for t, r in shapes),
        blank,
        n_classes,
        None if durations is None else tuple(durations),
        sigma,
        activation,
        options.dropout,
        0 if seed is None else int(seed),
    )


@torch.library.custom_op("fastconformer::transducer_forward", mutates_args=())
def _forward(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    coin: Tensor | None,
    seed: Tensor | None,
    durations: Sequence[int] | None,
    blank: int,
    activation: str,
    options: Sequence[float],
    dtype: torch.dtype,
    tile_cells: int,
    kept_cells: int,
    wants_states: bool,
    wants_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The losses (B,); active share and skipped occupancy (2, B); the five tensors of Cells; with
    kept_cells the gradients of the sum of losses for the first four inputs (else empty)."""
    batch, n_frames, _ = enc.shape
    inputs = f"enc_proj is {tuple(enc.shape)}, pred_proj {tuple(pred.shape)}"
    check_batch(
        inputs, batch, n_frames, pred.shape[1], targets, logit_lengths, target_lengths
    )  # fmt: skip
    check_targets(targets, target_lengths, len(weight) - len(durations or ()), blank)
    options = Options(*options)
    with torch.autocast(enc.device.type, enabled=False), _device_of(enc):
        job = _job(
            enc, pred, weight, bias, targets, logit_lengths, target_lengths, coin, seed, durations,
            blank, activation, options, dtype,
        )  # fmt: skip
        backend = _backend(enc.device)
        cells = _empty_cells(enc, len(job.enc) * job.n_rows, len(durations or ()), dtype)
        needs_grad = wants_states or wants_output
        wanted = (wants_states, wants_output) if kept_cells else (False, False)
        sums = _empty_sums((enc, pred, weight, bias), *wanted, dtype)
        if kept_cells:
            for total in sums:
                total.zero_()
            log_likelihood = _visit_once(job, backend, cells, options, tile_cells, kept_cells, sums)
        else:
            for tile in _tiles(job, tile_cells):
                backend.scores(job, tile, cells)
            log_likelihood = backend.lattice(job, cells, needs_grad)
    activity = cells.top.new_tensor([[1.0], [0.0]]).repeat(1, batch)
    if needs_grad and options.eps > 0.0:
        passing = (cells.blank + cells.label)[: job.n_cells]
        skipped = passing < options.eps
        lost = _sums(job, passing * skipped) / _sums(job, passing)
        share = 1.0 - _sums(job, skipped) / (job.frames * job.rows)
        activity = torch.stack([share, lost]).to(passing.dtype)
    # NeMo has this factor in float32: 1e-8 of the loss in float64.
    factor = torch.tensor(1.0 + options.fastemit_lambda, dtype=torch.float32).item()
    return (-factor * log_likelihood).to(cells.top.dtype), activity, *cells, *sums


def _visit_once(job, backend, cells, options, tile_cells, kept_cells, sums) -> Tensor:
    """Forward and backward of the sum of losses, by groups of clips whose logits are kept between
    the two. Adds to `sums`; returns the log-likelihoods."""
    sizes = [t * r for t, r in job.shapes]
    kept = _memory(min(kept_cells, job.n_cells), len(job.weight), job.weight.dtype)
    weights = torch.ones(len(sizes), dtype=cells.top.dtype)
    log_likelihoods = []
    first_clip = lo = 0
    while first_clip < len(sizes):
        last_clip, hi = first_clip, lo
        while last_clip < len(sizes) and hi + sizes[last_clip] - lo <= kept_cells:
            hi += sizes[last_clip]
            last_clip += 1
        for tile in _tiles(job, tile_cells, lo, hi):
            logits = backend.scores(job, tile, cells)
            kept[tile.first - lo : tile.last + 1 - lo] = logits
        clips = slice(first_clip, last_clip)
        group = job._replace(
            frames=job.frames[clips],
            rows=job.rows[clips],
            offsets=job.offsets[clips] - lo,
            n_cells=hi - lo,
        )
        of_group = Cells(*(x[lo:hi] for x in cells))
        log_likelihoods.append(backend.lattice(group, of_group, True))
        skipped = None
        if options.eps > 0.0:
            skipped = of_group.blank + of_group.label < options.eps
        for tile in _tiles(job, tile_cells, lo, hi, skipped):
            if skipped is None:
                grad = kept[tile.first - lo : tile.last + 1 - lo]
            else:
                grad = kept.index_select(0, tile.index - lo)
            hidden = backend.hidden(job, tile)
            _add_gradients(job, backend, tile, cells, weights, options, hidden, grad, sums)
        first_clip, lo = last_clip, hi
    return torch.cat(log_likelihoods)


def _add_gradients(job, backend, tile, cells, weights, options, hidden, logits, sums):
    """Adds a tile's share to the gradients `sums`, those that are not empty."""
    backend.gradient(job, tile, cells, weights, options.fastemit_lambda, options.clamp, logits)
    of_enc, of_pred, of_weight, of_bias = sums
    n_outputs = len(job.weight)  # omega's branch leaves the durations alone
    if of_weight.numel():
        add_outer_product(of_weight[:n_outputs], logits, hidden)
        of_bias[:n_outputs] += logits.sum(0, dtype=of_bias.dtype)
    if of_enc.numel():
        d_hidden = product(logits, job.weight.t(), None)
        if job.activation != "relu" and job.enc.dtype != hidden.dtype:
            # 1 - y^2 of a y that was rounded for the product would be wrong near saturation
            hidden = backend.hidden(job, tile, job.enc.dtype)
        backend.scatter(job, tile, hidden, d_hidden, of_enc.flatten(0, 1), of_pred.flatten(0, 1))


def _memory(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    # numpy asks the kernel for huge pages and torch does not: a fourth of the time to touch it.
    bits = {torch.bfloat16: np.int16, torch.float64: np.float64}.get(dtype, np.float32)
    return torch.from_numpy(np.empty((rows, columns), bits)).view(dtype)


def _empty_sums(inputs, wants_states, wants_output, dtype) -> list[Tensor]:
    wanted = (wants_states, wants_states, wants_output, wants_output)
    dtype = _wide(dtype)
    return [
        x.new_empty(x.shape if want else 0, dtype=dtype)
        for x, want in zip(inputs, wanted, strict=True)
    ]


def _sums(job: Job, values: Tensor) -> Tensor:
    """Of each clip's cells, (B,), in a fixed order (a cumsum of floats has none on a GPU)."""
    lengths = job.frames * job.rows
    return torch.segment_reduce(values.double(), "sum", lengths=lengths, unsafe=True)


def _device_of(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@_forward.register_fake
def _(
    enc, pred, weight, bias, targets, logit_lengths, target_lengths, coin, seed, durations, blank,
    activation, options, dtype, tile_cells, kept_cells, wants_states, wants_output,
):  # fmt: skip
    size = enc.shape[0] * enc.shape[1] * pred.shape[1]
    cells = _empty_cells(enc, size, len(durations or ()), dtype)
    losses = cells.top.new_empty(enc.shape[0])
    wanted = (wants_states, wants_output) if kept_cells else (False, False)
    sums = _empty_sums((enc, pred, weight, bias), *wanted, dtype)
    return losses, losses.new_empty(2, enc.shape[0]), *cells, *sums


def _empty_cells(enc, size, n_durations, dtype) -> Cells:
    # As many as the padded batch has, so that the shapes follow from those of the inputs; on a CPU
    # memory that is not touched costs nothing.
    dtype = _wide(dtype)
    one = [enc.new_empty(size, dtype=dtype) for _ in range(4)]
    return Cells(*one, enc.new_empty((size, n_durations), dtype=dtype))


@torch.library.custom_op("fastconformer::transducer_backward", mutates_args=())
def _backward(
    grad_losses: Tensor,
    cells: Sequence[Tensor],
    known: Sequence[Tensor],
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    coin: Tensor | None,
    seed: Tensor | None,
    durations: Sequence[int] | None,
    blank: int,
    activation: str,
    options: Sequence[float],
    dtype: torch.dtype,
    tile_cells: int,
    wants_states: bool,
    wants_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first four inputs, empty where not wanted; `known` are those of the sum of
    losses, or empty."""
    options, cells, wide = Options(*options), Cells(*cells), _wide(dtype)
    inputs = (enc, pred, weight, bias)
    factor = grad_losses[0].to(wide)
    # Not for a weight of 0, which is to hide NaN.
    if known[0].numel() + known[2].numel() and factor and (grad_losses == factor).all():
        return tuple((x * factor).to(of.dtype) for x, of in zip(known, inputs, strict=True))
    with torch.autocast(enc.device.type, enabled=False), _device_of(enc):
        job = _job(
            enc, pred, weight, bias, targets, logit_lengths, target_lengths, coin, seed, durations,
            blank, activation, options, dtype,
        )  # fmt: skip
        backend = _backend(enc.device)
        # The products get weights of at most 1, so that a scaled loss does not overflow half types.
        largest = grad_losses.abs().amax().to(wide)
        weights = (grad_losses / largest.masked_fill(largest == 0.0, 1.0)).to(wide).contiguous()
        skipped = None
        if options.eps > 0.0:
            skipped = (cells.blank + cells.label)[: job.n_cells] < options.eps
        sums = _empty_sums(inputs, wants_states, wants_output, dtype)
        for total in sums:
            total.zero_()
        for tile in _tiles(job, tile_cells, skipped=skipped):
            hidden = backend.hidden(job, tile)
            logits = product(hidden, job.weight, job.bias)
            _add_gradients(job, backend, tile, cells, weights, options, hidden, logits, sums)
    return tuple(x.mul_(largest).to(of.dtype) for x, of in zip(sums, inputs, strict=True))


@_backward.register_fake
def _(
    grad_losses, cells, known, enc, pred, weight, bias, targets, logit_lengths, target_lengths,
    coin, seed, durations, blank, activation, options, dtype, tile_cells, wants_states,
    wants_output,
):  # fmt: skip
    wanted = (wants_states, wants_states, wants_output, wants_output)
    return tuple(
        x.new_empty(x.shape if w else 0)
        for x, w in zip((enc, pred, weight, bias), wanted, strict=True)
    )


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    tensors, (ctx.durations, ctx.blank, ctx.activation, ctx.options) = inputs[:9], inputs[9:13]
    ctx.dtype, ctx.tile_cells, _, *ctx.wants = inputs[13:]
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate(ctx, grad_losses, *_):
    if grad_losses is None:
        return (None,) * 18
    saved = ctx.saved_tensors  # asked for once: activation checkpointing unpacks them once
    tensors, cells, known = saved[:9], saved[9:14], saved[14:]
    grads = _backward(
        grad_losses, cells, known, *tensors, ctx.durations, ctx.blank, ctx.activation, ctx.options,
        ctx.dtype, ctx.tile_cells, *ctx.wants,
    )  # fmt: skip
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad)), *(None,) * 14


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tiles(
    job: Job,
    tile_cells: int,
    lo: int = 0,
    hi: int | None = None,
    skipped: Tensor | None = None,
) -> Iterator[Tile]:
    """The cells from lo to hi, those that are not skipped (hi - lo,)."""
    hi = job.n_cells if hi is None else hi
    kind = "cpu" if job.enc.device.type == "cpu" else "cuda"
    row_bytes = len(job.weight) * job.weight.element_size()
    most = min(_TILE_CELLS[kind], max(128, _TILE_BYTES[kind] // row_bytes))
    # On a CPU `tile_cells` may mean more, to be kept.
    tile_cells = min(tile_cells or most, most) if kind == "cpu" else tile_cells or most
    # Kernels have offsets of 32 bits inside a tile.
    tile_cells = min(tile_cells, ((1 << 31) - 1) // max(job.weight.shape))
    if skipped is None:
        for first in range(lo, hi, tile_cells):
            last = min(first + tile_cells, hi) - 1
            yield Tile(torch.arange(first, last + 1, device=job.enc.device), first, last)
        return
    before = F.pad((~skipped).cumsum(0, dtype=torch.int32), (1, 0))
    visited = (~skipped).nonzero()[:, 0] + lo
    starts = range(0, len(visited), tile_cells)
    firsts = visited[::tile_cells].tolist()  # one wait for the device, not one a tile
    lasts = [*(visited[tile_cells - 1 :: tile_cells].tolist()), *visited[-1:].tolist()]
    for start, first, last in zip(starts, firsts, lasts):
        yield Tile(visited[start : start + tile_cells], first, last, start, before)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (C, D), weight (O, D) of any strides, bias (O,) -> (C, O)."""
    if _onednn(
        x, len(weight)
    ):  # several times faster than torch's own choice on some CPUs (linear.py)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def add_outer_product(out: Tensor, grad: Tensor, hidden: Tensor):
    """out (O, H) += grad (C, O)^T hidden (C, H), summed in out's type where the device can."""
    if _onednn(grad, hidden.shape[1]):
        transposed = grad.t().contiguous()
        out += torch.ops.mkldnn._linear_pointwise(transposed, hidden.t(), None, "none", [], "")
    elif out.dtype == grad.dtype:
        torch.addmm(out, grad.t(), hidden, out=out)
    elif grad.device.type == "cuda" and "dtype_out" in torch.ops.aten.addmm.overloads():  # 2.8
        torch.addmm(out, grad.t(), hidden, out_dtype=out.dtype, out=out)
    else:
        out += grad.t() @ hidden


def _onednn(x: Tensor, n: int) -> bool:
    """Whether a product of x with n columns goes there; small ones do not earn its set-up."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() * n > 1 << 22
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@functools.cache
def _backend_of(kind: str) -> ModuleType:
    try:
        if kind == "cpu":
            from . import fused_cpu as backend
        elif kind == "cuda":
            from . import fused_triton as backend
        else:
            return fused_vectorised
    except ImportError as error:
        log.warning("the fused transducer loss runs on plain PyTorch, slower: %s", error)
        return fused_vectorised
    return backend


def _backend(device: torch.device) -> ModuleType:
    return _backend_of(device.type)
