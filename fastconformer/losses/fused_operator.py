"""The fused loss as two operators of PyTorch: losses with what is kept of each cell, and gradients.

An operator shows torch.compile, DDP and activation checkpointing a function of its inputs; the
passes over tiles inside are fused.py's three steps, their arithmetic a backend's.
"""

import contextlib
import functools
import logging
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ..networks import kernels
from . import fused_vectorised
from .checks import check_batch, check_targets
from .fused_cells import (
    Cells,
    Options,
    empty_cells,
    empty_sums,
    make_job,
    sums_of_clips,
    tiles,
    wide_type,
)
from .products import add_outer_product, product

log = logging.getLogger(__name__)


@torch.library.custom_op("fastconformer::transducer_forward", mutates_args=())
def transducer_forward(
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
        job = make_job(
            enc, pred, weight, bias, targets, logit_lengths, target_lengths, coin, seed, durations,
            blank, activation, options, dtype,
        )  # fmt: skip
        backend = _backend(enc.device)
        cells = empty_cells(enc, len(job.enc) * job.n_rows, len(durations or ()), dtype)
        needs_grad = wants_states or wants_output
        wanted = (wants_states, wants_output) if kept_cells else (False, False)
        sums = empty_sums((enc, pred, weight, bias), *wanted, dtype)
        if kept_cells:
            for total in sums:
                total.zero_()
            log_likelihood = _visit_once(job, backend, cells, options, tile_cells, kept_cells, sums)
        else:
            for tile in tiles(job, tile_cells, logits=backend.scores_write_logits(job)):
                backend.scores(job, tile, cells)
            log_likelihood = backend.lattice(job, cells, needs_grad)
    activity = torch.stack((cells.top.new_ones(batch), cells.top.new_zeros(batch)))
    if needs_grad and options.eps > 0.0:
        passing = (cells.blank + cells.label)[: job.n_cells]
        skipped = passing < options.eps
        lost = sums_of_clips(job, passing * skipped) / sums_of_clips(job, passing)
        share = 1.0 - sums_of_clips(job, skipped) / (job.frames * job.rows)
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
        for tile in tiles(job, tile_cells, lo, hi):
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
        for tile in tiles(job, tile_cells, lo, hi, skipped):
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
    n = job.n_outputs  # omega's branch leaves the durations alone
    if of_weight.numel():
        add_outer_product(of_weight[:n], logits[:, :n], hidden)
        of_bias[:n] += logits[:, :n].sum(0, dtype=of_bias.dtype)
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


def _device_of(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@transducer_forward.register_fake
def _(
    enc, pred, weight, bias, targets, logit_lengths, target_lengths, coin, seed, durations, blank,
    activation, options, dtype, tile_cells, kept_cells, wants_states, wants_output,
):  # fmt: skip
    size = enc.shape[0] * enc.shape[1] * pred.shape[1]
    cells = empty_cells(enc, size, len(durations or ()), dtype)
    losses = cells.top.new_empty(enc.shape[0])
    wanted = (wants_states, wants_output) if kept_cells else (False, False)
    sums = empty_sums((enc, pred, weight, bias), *wanted, dtype)
    return losses, losses.new_empty(2, enc.shape[0]), *cells, *sums


@torch.library.custom_op("fastconformer::transducer_backward", mutates_args=())
def transducer_backward(
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
    options, cells, wide = Options(*options), Cells(*cells), wide_type(dtype)
    inputs = (enc, pred, weight, bias)
    factor = grad_losses[0].to(wide)
    # Not for a weight of 0, which is to hide NaN.
    if known[0].numel() + known[2].numel() and factor and (grad_losses == factor).all():
        return tuple((x * factor).to(of.dtype) for x, of in zip(known, inputs, strict=True))
    with torch.autocast(enc.device.type, enabled=False), _device_of(enc):
        job = make_job(
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
        sums = empty_sums(inputs, wants_states, wants_output, dtype)
        for total in sums:
            total.zero_()
        for tile in tiles(job, tile_cells, skipped=skipped):
            hidden = backend.hidden(job, tile)
            logits = product(hidden, job.weight, job.bias)
            _add_gradients(job, backend, tile, cells, weights, options, hidden, logits, sums)
    return tuple(x.mul_(largest).to(of.dtype) for x, of in zip(sums, inputs, strict=True))


@transducer_backward.register_fake
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
    grads = transducer_backward(
        grad_losses, cells, known, *tensors, ctx.durations, ctx.blank, ctx.activation, ctx.options,
        ctx.dtype, ctx.tile_cells, *ctx.wants,
    )  # fmt: skip
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad)), *(None,) * 14


transducer_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _backend(device: torch.device) -> ModuleType:
    if device.type == "cpu":
        return _cpu_backend()
    if device.type == "cuda" and kernels.triton_works(device):
        from . import fused_triton

        return fused_triton
    return fused_vectorised


@functools.cache
def _cpu_backend() -> ModuleType:
    try:
        from . import fused_cpu
    except ImportError as error:
        log.warning("the fused transducer loss runs on plain PyTorch, slower: %s", error)
        return fused_vectorised
    return fused_cpu
