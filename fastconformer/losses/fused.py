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

This file holds the function itself; fused_operator.py the two operators that it is for PyTorch,
fused_cells.py cells and tiles, products.py the matrix products. The arithmetic between the products
stands three times: in fused_cpu.py (numba, CPU), fused_triton.py (CUDA) and fused_vectorised.py
(plain PyTorch, anywhere).

Sources: Graves 2012 (arXiv:1211.3711); Xu et al. 2023 (arXiv:2304.06795); Yu et al. 2021 (FastEmit,
arXiv:2010.11148); the gradient past the softmax: Li et al. 2019 (arXiv:1909.12415); one sample at
a time: Braun et al. 2022 (arXiv:2211.16270); tiles and recomputation over packed cells for RNNT:
NeMo pull request 16040; the numbers: NeMo 3.0's RNNTLoss and TDTLossNumba.

Letters besides the style guide's: H joint width, R = U+1 rows of a frame, C cells.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..transfers import on_host, sent
from .checks import (
    check_classes,
    check_durations,
    check_options,
    check_reduction,
    describe,
    reduce,
)
from .fused_cells import Options

ACTIVATIONS = ("relu", "tanh", "sigmoid")

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
    # Here: it makes operators known to torch, which takes as long as all other imports together.
    from .fused_operator import transducer_forward

    logit_lengths, target_lengths = on_host(logit_lengths, target_lengths)  # read often
    losses, activity, *_ = transducer_forward(
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
    return reduce(losses, sent(target_lengths, device), reduction)


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
