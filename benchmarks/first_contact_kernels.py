"""The step of `benchmarks.first_contact` that sets each kernel beside the plain form."""

from functools import partial
from unittest import mock

import torch

from benchmarks.first_contact_tools import check, device_of, distance, milliseconds, timing


def check_kernels(dry: bool, kept: dict) -> dict:
    """The encoder's kernels against the plain form in float64, and the time of both; the step of
    decoding in few kernels beside the plain one."""
    from fastconformer.networks import kernels

    rows, times, device = [], [], device_of(dry)
    limits = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
    for name, module, inputs in _modules(dry, device):
        with torch.no_grad(), mock.patch.object(kernels, "takes", lambda x: False):
            expected = _frames(module.double()(*_cast(inputs, torch.float64)))
        for dtype, limit in limits.items():
            if dry and dtype == torch.bfloat16:
                continue  # the interpreter has no such products
            module.to(dtype)
            given = _cast(inputs, dtype)
            with torch.no_grad(), mock.patch.object(kernels, "takes", lambda x: True):
                value = distance(_frames(module(*given)), expected)
                what = f"{name} {dtype}".replace("torch.", "")
                rows.append(check(what, value, limit))
                times.append(timing(what, milliseconds(lambda: module(*given), dry), "ms"))  # noqa: B023
            with torch.no_grad(), mock.patch.object(kernels, "takes", lambda x: False):
                ms = milliseconds(lambda: module(*given), dry)  # noqa: B023
                times.append(timing(f"{what}, plain", ms, "ms"))
        if name.startswith("attention"):
            found = _check_gradients(name, module, inputs, dry)
            rows.append(found["check"])
            times.extend(found["timings"])
    return {"checks": rows, "timings": times}


def _check_gradients(name: str, module, inputs, dry: bool) -> dict:
    """Forward and backward in the kernels, against the plain form in float64 and in time."""
    from fastconformer.networks import kernels

    dtype, limit = (torch.float32, 2e-5) if dry else (torch.bfloat16, 5e-2)
    what = f"{name} with gradients {dtype}".replace("torch.", "")

    def gradients(dtype: torch.dtype, in_kernels: bool) -> list:
        given = _cast(inputs, dtype)
        given[0].requires_grad_()
        with mock.patch.object(kernels, "takes", lambda x: in_kernels):
            out = module.to(dtype)(*given)
        return torch.autograd.grad(out, [given[0], *module.parameters()], out.detach())

    expected = gradients(torch.float64, False)
    pairs = zip(gradients(dtype, True), expected, strict=True)
    # the keys' bias has a gradient of 0
    value = max(distance(a, e) for a, e in pairs if e.abs().max() > 1e-6 * expected[0].abs().max())
    times = (
        []
        if dry
        else [
            timing(label, milliseconds(partial(gradients, dtype, in_kernels), dry), "ms")
            for label, in_kernels in ((what, True), (f"{what}, plain", False))
        ]
    )
    return {"check": check(what, value, limit), "timings": times}


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
