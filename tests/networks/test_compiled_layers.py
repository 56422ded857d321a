"""numba's kernels between a layer's products, beside the plain form and float64."""

import sys

import pytest
import torch

pytest.importorskip("numba")

from fastconformer.networks import compiled_layers, kernels, subsampling
from fastconformer.networks.attention import RelPositionMultiHeadAttention, position_encoding
from fastconformer.networks.conformer_layer import Convolution
from fastconformer.networks.linear import Int8Weight
from fastconformer.networks.local_attention import LocalRelPositionMultiHeadAttention

TYPES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture
def plain(monkeypatch):
    """A call -> what it gives without the kernels."""

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_compiled_layers", lambda: None)
            return function(*arguments)

    return run


def padded(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("lengths", [(1,), (2, 33), (70, 64, 9)])
@pytest.mark.parametrize("context", [(4, 4), (8, 0), (0, 0)])
@torch.no_grad()
def test_convolution(dtype, lengths, context, plain):
    torch.manual_seed(0)
    conv = Convolution(24, sum(context) + 1, context, "batch_norm", True).eval()
    conv.batch_norm.running_mean.normal_()
    conv.batch_norm.running_var.uniform_(0.5, 2)
    conv, x, pad = conv.to(dtype), torch.randn(len(lengths), max(lengths), 24), padded(*lengths)
    found = conv(x.to(dtype), pad)
    exact = plain(conv.double(), x.to(dtype).double(), pad)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=TYPES[dtype], atol=TYPES[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_mels", "lengths"), [(8, (1,)), (13, (40, 9)), (10, (301, 2, 0, 150))])
@torch.no_grad()
def test_subsampling(dtype, causal, n_mels, lengths, plain, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(subsampling, "TILE_BYTES", 1 << 15)  # the last input in two pieces
    module = subsampling.ConvSubsampling("dw_striding", 8, n_mels, 12, 24, causal).eval().to(dtype)
    x, lengths = torch.randn(len(lengths), n_mels, max(lengths)).to(dtype), torch.tensor(lengths)
    found, n_valid = module(x, lengths)
    for b in range(len(x)):  # alone, as in any batch
        alone, _ = module(x[b : b + 1, :, : max(1, lengths[b])], lengths[b : b + 1])
        torch.testing.assert_close(found[b, : n_valid[b]], alone[0, : n_valid[b]])
    with torch.enable_grad():  # the plain form
        exact, expected = module.double()(x.double(), lengths)
    assert found.dtype == dtype and n_valid.tolist() == expected.tolist()
    limit = TYPES[dtype] * exact.abs().max().item()
    torch.testing.assert_close(found.double(), exact.detach(), rtol=TYPES[dtype], atol=limit)


@torch.no_grad()
def test_folded_weights_are_made_anew_when_they_change(plain):
    conv, x = Convolution(8, 3, (1, 1), "batch_norm", False).eval(), torch.randn(1, 9, 8)
    for change in (conv.batch_norm.weight, conv.batch_norm.running_var, conv.depthwise_conv.weight):
        change.mul_(2)
        expected = plain(conv, x, padded(9))
        torch.testing.assert_close(conv(x, padded(9)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [(1,), (5, 3), (300, 200)])  # the last in several blocks
@pytest.mark.parametrize("mask", ["padding", "context"])
@torch.no_grad()
def test_attention(lengths, mask, plain, monkeypatch):
    dtype = torch.bfloat16
    monkeypatch.setattr("fastconformer.networks.attention.SCORE_BYTES", 1 << 18)
    torch.manual_seed(0)
    attention, t = RelPositionMultiHeadAttention(32, 4, 0.0, True).eval(), max(lengths)
    attention.pos_bias_u.normal_()
    attention.pos_bias_v.normal_()
    hidden = padded(*lengths)[:, None, None]
    if mask == "context":  # the last clip's last rows see nothing
        hidden = hidden | (torch.arange(t) > torch.arange(t)[:, None] + 2)
        hidden[-1, :, -1] = True
    x = torch.randn(len(lengths), t, 32)
    positions = position_encoding(torch.arange(t - 1, -t, -1), 32)
    attention, x, positions = (y.to(dtype) for y in (attention, x, positions))
    found = attention(x, positions, hidden)
    exact = plain(attention.double(), x.double(), positions.double(), hidden)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=TYPES[dtype], atol=TYPES[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("lengths", [(1,), (5, 3), (150, 64)])
@pytest.mark.parametrize("context", [1, 7, 90])
@torch.no_grad()
def test_local_attention(dtype, lengths, context, plain):
    torch.manual_seed(0)
    attention = LocalRelPositionMultiHeadAttention(32, 4, 0.0, True, (context, context)).eval()
    attention.pos_bias_u.normal_()
    attention.pos_bias_v.normal_()
    x, pad = torch.randn(len(lengths), max(lengths), 32), padded(*lengths)
    positions = position_encoding(torch.arange(context, -context - 1, -1), 32)
    attention, x, positions = (y.to(dtype) for y in (attention, x, positions))
    found = attention(x, positions, pad)
    exact = plain(attention.double(), x.double(), positions.double(), pad)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=TYPES[dtype], atol=TYPES[dtype])


def test_what_is_not_a_number_shows():
    scores, position = torch.zeros(1, 1, 2, 40), torch.zeros(1, 1, 2, 41)
    scores[0, 0, 1, 7] = torch.nan
    compiled_layers.softmax_of_sums(scores, position, None, 1.0, (40, 40))
    assert torch.equal(scores[0, 0].isnan().all(1), torch.tensor([False, True]))


@pytest.mark.skipif("onednn" not in torch.backends.quantized.supported_engines, reason="no oneDNN")
@pytest.mark.parametrize("after", ["none", "swish", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_eight_bits(after, bias, plain):
    """The same 8 bits, so that only the last rounding differs."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, 100), Int8Weight(torch.randn(48, 100))
    x[0, 0], x[0, 1] = 0, x[0, 1] * 1e9
    b = torch.randn(48) if bias else None
    with torch.inference_mode():
        expected = plain(weight.product, x, b, after)
        torch.testing.assert_close(weight.product(x, b, after), expected, rtol=1e-6, atol=1e-6)
    rows = x.flatten(0, 1)
    eight_bit, scale = compiled_layers.quantized(rows)
    assert torch.equal(scale[:, None], rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127)
    assert torch.equal(eight_bit, ((rows / scale[:, None]).round() + 128).to(torch.uint8))


def test_only_without_gradients_on_plain_tensors():
    x = torch.randn(2, 3)
    assert kernels.for_cpu(x) is None
    with torch.no_grad():
        assert kernels.for_cpu(x) is compiled_layers
        assert kernels.for_cpu(x.double()) is None and kernels.for_cpu(x.to("meta")) is None
        with torch.autocast("cpu"):
            assert kernels.for_cpu(x) is None


def test_a_cpu_without_numba_is_told_what_it_misses(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in ("compiled", "networks.compiled_layers"):
        monkeypatch.delitem(sys.modules, f"fastconformer.{name}")
    monkeypatch.delattr("fastconformer.networks.compiled_layers")
    kernels._compiled_layers.cache_clear()
    try:
        with torch.no_grad():
            assert kernels.for_cpu(torch.ones(1)) is kernels.for_cpu(torch.ones(1)) is None
    finally:
        kernels._compiled_layers.cache_clear()
    (record,) = caplog.records
    assert "numba" in record.getMessage() and "fastconformer[fast]" in record.getMessage()
