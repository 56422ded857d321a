"""Attention's GPU kernels in training, by Triton's interpreter, against the plain form."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="triton is not installed")

from fastconformer.networks import kernels
from fastconformer.networks.attention import (
    RelPositionMultiHeadAttention,
    _relative_shift,
    position_encoding,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them compiled")


@pytest.fixture
def taken(monkeypatch):
    """The kernels take CPU tensors, but for float64."""
    monkeypatch.setattr(kernels, "takes", lambda x: x.dtype != torch.float64)


def inputs(batch, n_frames, n_heads, width, seed=0):
    """q, k, v, p, bias_u, bias_v in float64."""
    generator = torch.Generator().manual_seed(seed)
    d = n_heads * width
    shapes = [(batch, n_frames, d)] * 3 + [(2 * n_frames - 1, d)] + [(n_heads, width)] * 2
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def output_gradient(given):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(given[0].shape, generator=generator, dtype=torch.float64)


def masks(kind, batch, n_frames):
    lengths = torch.linspace(n_frames, 1, batch).long()
    hidden = (torch.arange(n_frames) >= lengths[:, None])[:, None, None]
    chunk = torch.arange(n_frames) // 5
    distance = (chunk - chunk[:, None]).abs()
    if kind == "chunks of all":  # (1, 1, T, T)
        return (distance > 1)[None, None]
    return hidden if kind == "padding" else hidden | (distance > (1 if kind == "chunks" else -1))


def plain(q, k, v, p, bias_u, bias_v, hidden, keep=1.0):
    """With `keep` (B, H, T, T) times the weights."""

    def heads(x):
        return x.unflatten(-1, bias_u.shape).transpose(1, 2)

    q, k, v, p = heads(q), heads(k), heads(v), heads(p[None])
    position = _relative_shift((q + bias_v[:, None]) @ p.transpose(-2, -1), q.shape[2])
    scores = ((q + bias_u[:, None]) @ k.transpose(-2, -1) + position) * q.shape[3] ** -0.5
    weights = scores.masked_fill(hidden, -1e4).softmax(-1) * keep
    return (weights @ v).transpose(1, 2).flatten(2)


def kernel(*given, dropout=0.0, seed=None):
    seed = None if seed is None else torch.tensor(seed)
    return kernels.rel_pos_attention(*given, dropout, seed)[0]


def gradients(function, given, grad, **options):
    *tensors, hidden = given
    tensors = [x.clone().requires_grad_() for x in tensors]
    out = function(*tensors, hidden, **options)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def assert_equal(actual, expected, tolerance=3e-6):
    names = ("out", "q", "k", "v", "p", "bias_u", "bias_v")
    for name, a, e in zip(names, actual, expected, strict=True):
        error, limit = (a.double() - e).abs().max(), tolerance * max(1.0, e.abs().max())
        assert error <= limit, f"{name}: {error:.1e}, at most {limit:.1e}"


@pytest.mark.parametrize(
    ("batch", "n_frames", "n_heads", "width", "mask"),
    [
        (1, 33, 1, 20, "padding"),  # heads no power of two wide, the last block part full
        (1, 1, 2, 16, "padding"),
        (3, 7, 2, 16, "padding"),
        (2, 16, 1, 16, "chunks"),
        (2, 17, 1, 16, "chunks of all"),
        (1, 18, 1, 16, "nothing to see"),
    ],
)
def test_gradients_equal_the_plain_form(batch, n_frames, n_heads, width, mask):
    given = *inputs(batch, n_frames, n_heads, width), masks(mask, batch, n_frames)
    grad = output_gradient(given)
    expected = gradients(plain, given, grad)
    single = [x.float() if x.is_floating_point() else x for x in given]
    assert_equal(gradients(kernel, single, grad.float()), expected)


def test_float16_is_as_near_as_the_plain_form():
    given = *inputs(1, 21, 1, 16), masks("padding", 1, 21)
    grad = output_gradient(given)
    expected = gradients(plain, given, grad)
    half = [x.half() if x.is_floating_point() else x for x in given]
    actual, other = (gradients(f, half, grad.half()) for f in (kernel, plain))
    for a, b, e in zip(actual, other, expected, strict=True):
        assert (a - e).norm() <= 2 * (b - e).norm()  # sums of 16 numbers have lucky maxima


def kept_weights(seed, dropout, batch=2, n_frames=17, n_heads=2, width=32):
    """(B, H, T, T): 0, or what the kernel multiplies a weight by."""
    q, k, _, p, u, w = (x.float() for x in inputs(batch, n_frames, n_heads, width))
    each = torch.eye(n_frames, width).repeat(batch, 1, n_heads)  # the output is the weights
    hidden = masks("padding", 1, n_frames)
    dropped = kernel(q, k, each, p, u, w, hidden, dropout=dropout, seed=seed)
    ratio = dropped / kernel(q, k, each, p, u, w, hidden)
    return ratio.unflatten(-1, (n_heads, width))[..., :n_frames].transpose(1, 2)


def test_dropout_is_the_same_in_both_passes():
    keep = kept_weights(2**61 + 7, 0.3, 1)
    assert set((keep * 0.7).round(decimals=4).flatten().tolist()) == {0.0, 1.0}
    keep = keep.round(decimals=4) / keep.max().round(decimals=4) / 0.7
    given = *inputs(1, 17, 2, 32), masks("chunks", 1, 17)
    grad = output_gradient(given)
    expected = gradients(lambda *x: plain(*x, keep=keep.double()), given, grad)
    single = [x.float() if x.is_floating_point() else x for x in given]
    actual = gradients(kernel, single, grad.float(), dropout=0.3, seed=2**61 + 7)
    assert_equal(actual, expected)


def test_dropout_drops_by_chance():
    keep = torch.stack([kept_weights(seed, 0.3) > 0 for seed in (0, 1, 2**61 + 1)]).double()
    z = (keep - 0.7) / (0.3 * 0.7) ** 0.5
    assert abs(z.mean()) < 4 / z.numel() ** 0.5
    for other in (z.roll(1, -1), z.roll(1, -2), z.roll(1, 1), z.roll(1, 2), z.roll(1, 0)):
        assert abs((z * other).mean()) < 4 / z.numel() ** 0.5  # keys, rows, clips, heads, seeds


def module_and_inputs(dropout, n_frames=12, width=16, n_heads=1):
    torch.manual_seed(0)
    module = RelPositionMultiHeadAttention(width * n_heads, n_heads, dropout, True).train()
    torch.nn.init.normal_(module.pos_bias_u)
    x = torch.randn(1, n_frames, width * n_heads, requires_grad=True)
    positions = position_encoding(torch.arange(n_frames - 1, -n_frames, -1), width * n_heads)
    return module, x, positions, masks("padding", 1, n_frames)


def test_recomputation_drops_the_same(taken):
    module, *given = module_and_inputs(0.4)
    found = []
    for recompute in (False, True, False):
        torch.manual_seed(5 + (len(found) == 2))
        out = checkpoint(module, *given, use_reentrant=False) if recompute else module(*given)
        found.append(torch.autograd.grad(out.square().sum(), list(module.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert not torch.equal(found[0][0], found[2][0])  # another seed


def test_autocast_and_frozen_positions(taken):
    module, x, *given = module_and_inputs(0.0)
    module.linear_pos.requires_grad_(False)
    module.pos_bias_v.requires_grad_(False)
    weights = [w for w in module.parameters() if w.requires_grad]
    with torch.autocast("cpu", dtype=torch.float16):
        actual = torch.autograd.grad(module(x, *given).float().square().sum(), [x, *weights])
    module.double()
    given = x.double(), given[0].double(), given[1]
    expected = torch.autograd.grad(module(*given).square().sum(), [x, *weights])
    for a, e, w in zip(actual, expected, [x, *weights], strict=True):
        assert a.dtype == torch.float32
        # the keys' bias has a gradient of 0
        assert (a - e).abs().max() <= 1e-2 * max(1.0, e.abs().max()), w.shape


def test_the_operator_is_one_of_pytorch():
    """Its schema, and its shapes without data, by which torch.compile follows it."""
    given = [x.float().requires_grad_() for x in inputs(1, 3, 1, 16)]
    arguments = *given, masks("padding", 1, 3), 0.5, torch.tensor(3)
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(kernels.rel_pos_attention, arguments, test_utils=checks)
