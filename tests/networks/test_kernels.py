"""The encoder's GPU kernels in Triton's interpreter, against the plain form in float64 and NeMo."""

import pytest
import torch
from conftest import load_case

pytest.importorskip("triton", reason="triton is not installed")

import fastconformer
from fastconformer.networks import kernels, subsampling
from fastconformer.networks.attention import RelPositionMultiHeadAttention, position_encoding
from fastconformer.networks.conformer_layer import Convolution
from fastconformer.networks.subsampling import ConvSubsampling

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them compiled")


def scattered(module: torch.nn.Module) -> torch.nn.Module:
    """In float64 and eval mode, all its numbers random."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


def lengths_of(batch: int, n_frames: int) -> torch.Tensor:
    return torch.linspace(n_frames, 1, batch).long()


@interpreted
@pytest.mark.parametrize(
    ("batch", "n_frames", "n_heads", "width", "mask"),
    [
        (2, 37, 1, 20, "padding"),  # heads no power of two wide, the last block part full
        (1, 1, 2, 16, "padding"),
        (2, 32, 1, 64, "chunks"),
        (1, 20, 1, 16, "nothing to see"),
    ],
)
def test_attention_equals_the_plain_form(batch, n_frames, n_heads, width, mask):
    torch.manual_seed(0)
    d_model = n_heads * width
    module = scattered(RelPositionMultiHeadAttention(d_model, n_heads, 0.0, True))
    x = torch.randn(batch, n_frames, d_model, dtype=torch.float64)
    positions = position_encoding(torch.arange(n_frames - 1, -n_frames, -1), d_model).double()
    hidden = (torch.arange(n_frames) >= lengths_of(batch, n_frames)[:, None])[:, None, None]
    if mask != "padding":
        chunk = torch.arange(n_frames) // 5
        hidden = hidden | ((chunk - chunk[:, None]).abs() > (1 if mask == "chunks" else -1))
    with torch.enable_grad():  # the plain form
        expected = module(x, positions, hidden).detach()
    module.float()
    x = x.float()
    with torch.no_grad():
        q, k, v = (f(x) for f in (module.linear_q, module.linear_k, module.linear_v))
        p = module.linear_pos(positions.float())
        biases = module.pos_bias_u, module.pos_bias_v
        actual, _ = kernels.rel_pos_attention(q, k, v, p, *biases, hidden)
        actual = module.linear_out(actual)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6 * expected.abs().max())


@interpreted
@pytest.mark.parametrize(
    ("width", "taps", "context", "has_bias"),
    [(72, 9, (4, 4), True), (16, 5, (4, 0), False)],  # two blocks of channels; causal
)
def test_convolution_equals_the_plain_form(width, taps, context, has_bias):
    torch.manual_seed(0)
    module = scattered(Convolution(width, taps, context, "batch_norm", has_bias))
    norm = module.batch_norm
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 2.0)
    x = torch.randn(3, 19, width, dtype=torch.float64)
    pad_mask = torch.arange(19) >= lengths_of(3, 19)[:, None]
    with torch.enable_grad():
        expected = module(x, pad_mask).detach()
    module.float()
    norms = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    depthwise = module.depthwise_conv
    with torch.no_grad():
        y = module._widened(x.float())
        y = kernels.gated_convolution(
            y, pad_mask, depthwise.weight, depthwise.bias, norms, norm.eps, context[0]
        )
        actual = module.pointwise_conv2(y.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6 * expected.abs().max())


@interpreted
def test_an_encoder_equals_nemo(monkeypatch):
    """Subsampling, and with chunked masks attention, in kernels (its convolutions have another
    norm)."""
    case = load_case("stream_chunked_hybrid_rnnt")
    encoder = fastconformer.load_model(case.folder / "model.nemo").encoder
    calls = []

    def takes(x):
        calls.append(x.shape)
        return True

    monkeypatch.setattr(kernels, "takes", takes)
    rows = slice(1, 3)
    features, lengths, expected = (
        case.tensors[name][rows] for name in ("features", "features_len", "encoded")
    )
    with torch.no_grad():
        encoded, lengths = encoder(features[:, :, : lengths.max()], lengths)
    assert len(calls) == encoder.config.n_layers + 1
    tolerance = case.expected["suggested_tolerance"]["encoded"]
    for actual, wanted, n in zip(encoded, expected, lengths.tolist(), strict=True):
        assert (actual[:n] - wanted[:n]).abs().max() <= tolerance


@interpreted
@pytest.mark.parametrize(
    ("factor", "causal", "channels", "n_bins", "n_frames"),
    [
        (8, False, 24, 13, 67),  # nothing a power of two
        (8, True, 70, 12, 41),  # two blocks of channels
        (4, False, 16, 16, 70),  # two blocks of rows
        (4, True, 16, 7, 9),
        (16, True, 16, 16, 3),
    ],
)
def test_subsampling_equals_the_plain_form(monkeypatch, factor, causal, channels, n_bins, n_frames):
    torch.manual_seed(0)
    module = ConvSubsampling("dw_striding", factor, n_bins, 10, channels, causal)
    module = scattered(module)
    features = torch.randn(3, n_bins, n_frames, dtype=torch.float64)
    lengths = torch.tensor([n_frames, n_frames // 2, 0])
    with torch.enable_grad():
        expected, expected_lengths = module(features, lengths)
    module.float()
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    with torch.no_grad():
        actual, actual_lengths = module(features.float(), lengths)
    assert actual_lengths.tolist() == expected_lengths.tolist()
    expected = expected.detach()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6 * expected.abs().max())


@interpreted
@pytest.mark.parametrize("causal", [False, True])
def test_long_subsampling_is_the_same_in_pieces(monkeypatch, causal):
    torch.manual_seed(0)
    module = scattered(ConvSubsampling("dw_striding", 4, 3, 6, 16, causal)).float()
    features, lengths = torch.randn(1, 3, 270), torch.tensor([257])
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    with torch.no_grad():
        whole, _ = module._piece(features, lengths)
        monkeypatch.setattr(subsampling, "TILE_BYTES", 1)  # the least piece: 32 frames
        pieces, _ = module(features, lengths)
    assert whole.shape == pieces.shape and whole.shape[1] > 64
    assert (whole - pieces).abs().max() <= 1e-6 * whole.abs().max()


def test_no_kernel_on_a_cpu_or_with_gradients():
    assert not kernels.usable(torch.zeros(2))
    with torch.no_grad():
        assert not kernels.usable(torch.zeros(2))
        assert not kernels.usable(torch.zeros(2, device="meta"))


def test_more_clips_than_a_grid_has_rows_take_the_plain_form():
    q = torch.empty(8192, 1, 64, device="meta")
    assert kernels.take_heads(q[:8191], 8) and not kernels.take_heads(q, 8)
    assert kernels.take_heads(q, 64)
