"""Products on a CPU: 8 bits, their error, batches, what is refused; packed bfloat16 weights."""

import copy
import pickle

import pytest
import torch
from conftest import golden
from torch.nn import functional as F

import fastconformer
from fastconformer.checkpoint.read import read_checkpoint
from fastconformer.load import model_of
from fastconformer.networks.linear import Int8Weight, linear

MODEL = "hybrid_tdt_ctc_bpe"

pytestmark = pytest.mark.skipif(
    "onednn" not in torch.backends.quantized.supported_engines, reason="torch without oneDNN"
)


@pytest.mark.parametrize("shape", [(1, 8), (3, 7, 64), (1, 1, 1, 33)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("after", ["none", "swish", "relu"])
def test_product_beside_float64(shape, bias, after):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(48, shape[-1])
    b = torch.randn(48) if bias else None
    exact = linear(x.double(), weight.double(), b if b is None else b.double(), after)
    found = linear(x, Int8Weight(weight), b, after)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    error = (found - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.02  # 8 bits: not exact, but near


def test_the_product_is_of_the_rounded_numbers():
    """With inputs and weights that 8 bits hold exactly, the result is exact."""
    x = torch.tensor([[127.0, -3, 0, 64], [1, 127, -127, 5], [0, 0, 0, 0]])
    weight = torch.tensor([[127.0, 1, 2, 3], [-127, 0, 127, 9]])
    torch.testing.assert_close(linear(x, Int8Weight(weight)), x @ weight.T, rtol=0, atol=0)


def test_a_row_does_not_depend_on_the_others():
    weight = Int8Weight(torch.randn(32, 16))
    x = torch.randn(5, 16) * torch.tensor([1e-3, 1, 1e3, 1e6, 0])[:, None]
    alone = torch.cat([linear(row[None], weight) for row in x])
    torch.testing.assert_close(linear(x, weight), alone, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("width_1", [(), (1,)])  # of a convolution
def test_bfloat16_weights_are_packed_anew_when_they_change(rows, width_1):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 64).bfloat16(), torch.randn(96, 64, *width_1).bfloat16()
    with torch.no_grad():
        for _ in range(2):
            expected = F.silu(x.double() @ weight.flatten(1).double().T).float()
            found = linear(x, weight, after="swish").float()
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=0.1)
            weight.mul_(-3)


def test_decoder_in_int8():
    """The prediction network step by step as at once, near the exact one."""
    path = golden(MODEL) / "model.nemo"
    exact, model = fastconformer.load_model(path), fastconformer.load_model(path, dtype=torch.int8)
    tokens = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    with torch.no_grad():
        expected, found = exact.decoder(tokens), model.decoder(tokens)
        output, state = model.decoder.start(2)
        steps = [output]
        for column in tokens.unbind(1):
            output, state = model.decoder.step(column, state)
            steps.append(output)
    torch.testing.assert_close(torch.stack(steps, 1), found, rtol=1e-5, atol=1e-6)
    assert 1e-5 < (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("name", [MODEL, "birwkv7_encoder"])
def test_model_in_int8(name):
    path = golden(name) / "model.nemo"
    exact, model = fastconformer.load_model(path), fastconformer.load_model(path, dtype=torch.int8)
    torch.manual_seed(0)
    audio = torch.randn(2, 32000) * 0.1
    lengths = torch.tensor([32000, 20000])
    with torch.no_grad():
        expected, frames = exact.encode(*exact.featurize(audio, lengths))
        found, _ = model.encode(*model.featurize(audio, lengths))
        alone, _ = model.encode(*model.featurize(audio[1:, :20000], lengths[1:]))
    n = int(frames[1])
    assert 1e-4 < (found[1, :n] - expected[1, :n]).norm() / expected[1, :n].norm() < 0.1
    # beside another clip sums may differ in their last digit, which can turn a rounding to 8 bits
    assert (found[1, :n] - alone[0, :n]).norm() / alone[0, :n].norm() < 0.03
    for long in ("full", "chunks", "local"):
        assert isinstance(model.transcribe(audio[0], long=long)[0].text, str)


def test_copies_and_logits():
    """Copied and pickled, packed weights stay the same; gradients that are on change nothing."""
    model = fastconformer.load_model(golden(MODEL) / "model.nemo", dtype=torch.int8)
    encoded = torch.randn(1, 9, model.config.encoder.d_model)
    arguments = encoded, torch.tensor([[3, 1, 4]]), torch.tensor([3])
    with torch.no_grad():
        expected = model.joint_logits(*arguments)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(same.joint_logits(*arguments), expected, rtol=0, atol=0)


def test_what_int8_cannot_do(tmp_path):
    model = fastconformer.load_model(golden(MODEL) / "model.nemo", dtype=torch.int8)
    one = torch.ones(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="an int8 model has no losses"):
        model.losses(torch.zeros(1, 9, model.config.encoder.d_model), 9 * one[0], one, one[0])
    with pytest.raises(ValueError, match="an int8 model cannot be saved"):
        model.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="int8 is for CPUs"):
        model_of(read_checkpoint(golden(MODEL) / "model.nemo"), "meta", torch.int8)
