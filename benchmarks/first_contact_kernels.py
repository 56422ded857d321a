"""The steps of `benchmarks.first_contact` that set each kernel beside the plain form."""

from contextlib import nullcontext
from functools import partial
from unittest import mock

import torch

from benchmarks.first_contact_tools import check, device_of, distance, milliseconds, timing


def check_kernels(dry: bool, kept: dict) -> dict:
    """The encoder's kernels against the plain form in float64."""
    rows, limits = [], {torch.float32: 2e-5, torch.bfloat16: 3e-2}
    for name, module, inputs in _modules(dry, device_of(dry)):
        with torch.no_grad(), in_kernels(False):
            expected = _frames(module.double()(*_cast(inputs, torch.float64)))
        for dtype, limit in limits.items():
            if dry and dtype == torch.bfloat16:
                continue  # the interpreter has no such products
            with torch.no_grad(), in_kernels(True):
                value = distance(_frames(module.to(dtype)(*_cast(inputs, dtype))), expected)
            rows.append(check(f"{name} {dtype}".replace("torch.", ""), value, limit))
        if name.startswith("attention"):
            dtype, limit = (torch.float32, 2e-5) if dry else (torch.bfloat16, 5e-2)
            expected = _gradients(module, inputs, torch.float64, False)
            pairs = zip(_gradients(module, inputs, dtype, True), expected, strict=True)
            # the keys' bias has a gradient of 0
            least = 1e-6 * expected[0].abs().max()
            value = max(distance(a, e) for a, e in pairs if e.abs().max() > least)
            what = f"{name} with gradients {dtype}".replace("torch.", "")
            rows.append(check(what, value, limit))
    return {"checks": rows}


def time_kernels(dry: bool, kept: dict) -> dict:
    """The same, and attention with its gradients, by kernels and in the plain form."""
    rows, dtypes = [], (torch.float32,) if dry else (torch.bfloat16, torch.float32)
    for name, module, inputs in _modules(dry, device_of(dry)):
        for dtype in dtypes:
            given = _cast(inputs, dtype)
            module.to(dtype)
            works = {"": torch.no_grad()(partial(module, *given))}
            if name.startswith("attention") and dtype == torch.bfloat16:
                works[" with gradients"] = partial(_gradients, module, inputs, dtype)
            for what, work in works.items():
                for form, kernels in (("", True), (", plain", False)):
                    with in_kernels(kernels):
                        ms = milliseconds(work, dry)
                    label = f"{name}{what} {dtype}{form}".replace("torch.", "")
                    rows.append(timing(label, ms, "ms"))
    return {"timings": rows}


def in_kernels(kernels: bool):
    """Whether the encoder's layers take their kernels, inside."""
    return mock.patch("fastconformer.networks.kernels.takes", lambda x: kernels)


def _gradients(module, inputs, dtype: torch.dtype, kernels: bool | None = None) -> list:
    given = _cast(inputs, dtype)
    given[0].requires_grad_()
    with nullcontext() if kernels is None else in_kernels(kernels):
        out = module.to(dtype)(*given)
    return torch.autograd.grad(out, [given[0], *module.parameters()], out.detach())


def _modules(dry: bool, device: torch.device):
    """(name, module with random numbers, inputs): attention with two kinds of mask, convolution,
    subsampling; the sizes of 0.6B, 16 clips of 30 s."""
    from fastconformer.networks.attention import RelPositionMultiHeadAttention, position_encoding
    from fastconformer.networks.conformer_layer import Convolution
    from fastconformer.networks.subsampling import ConvSubsampling

    batch, n_frames, width, heads = (1, 17, 16, 1) if dry else (16, 376, 1024, 8)
    torch.manual_seed(0)
    x = torch.randn(batch, n_frames, width, device=device)
    frame = torch.arange(n_frames, device=device)
    pad_mask = frame >= torch.linspace(n_frames, 1, batch, device=device).long()[:, None]
    positions = position_encoding(torch.arange(n_frames - 1, -n_frames, -1, device=device), width)
    attention = RelPositionMultiHeadAttention(width, heads, 0.0, True).to(device).eval()
    for bias in (attention.pos_bias_u, attention.pos_bias_v):
        torch.nn.init.normal_(bias, std=0.3)
    padding = pad_mask[:, None, None]
    chunks = padding | ((frame // 14 - frame[:, None] // 14).abs() > 1)
    yield "attention, padding", attention, (x, positions, padding)
    yield "attention, chunks", attention, (x, positions, chunks)
    convolution = Convolution(width, 9, (4, 4), "batch_norm", True).to(device).eval()
    yield "convolution", convolution, (x, pad_mask)
    n_bins, channels, n_features = (8, 16, 41) if dry else (128, 256, 3001)
    features = torch.randn(batch, n_bins, n_features, device=device)
    lengths = torch.linspace(n_features, 1, batch, device=device).long()
    subsampling = ConvSubsampling("dw_striding", 8, n_bins, width, channels, False)
    yield "subsampling", subsampling.to(device).eval(), (features, lengths)


def _frames(result) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def _cast(inputs, dtype: torch.dtype) -> list:
    return [x.detach().to(dtype) if x.is_floating_point() else x for x in inputs]
