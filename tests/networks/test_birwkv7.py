"""BiRWKV7 against the fork's own numbers, and its properties."""

import pytest
import torch
from conftest import load_case

import fastconformer
from fastconformer.networks.birwkv7 import BiRWKV7

BLOCKS = [
    ("c64_h1", 0),
    ("c64_h1", 2),
    ("c64_h1_nomask_t32", 0),
    ("c64_h1_nomask_t32", 1),
    ("c128_h1_head128", 0),  # one head of 128, its recurrence in heads of 64
]


@pytest.mark.parametrize("name, layer_id", BLOCKS)
def test_block_and_gradients(name, layer_id):
    case = load_case("birwkv7_parts")
    about, limits = case.expected["module"][name], case.expected["suggested_tolerance"]
    t = {key: case.tensors[f"module/{name}/{key}"] for key in ("dout",)}
    prefix = f"module/{name}/layer{layer_id}/"
    t |= {k.removeprefix(prefix): v for k, v in case.tensors.items() if k.startswith(prefix)}
    block = BiRWKV7(about["C"], about["n_head"], layer_id, about["n_layer"])
    block.load_state_dict({k[6:]: v for k, v in t.items() if k.startswith("state.")}, strict=True)
    x = t["x"].clone().requires_grad_()
    pad_mask = case.tensors.get(f"module/{name}/pad_mask")
    pad_mask = None if pad_mask is None else pad_mask.bool()
    out, v_first = block(x, t.get("v_first_in"), pad_mask)
    assert (out - t["out"]).abs().max() <= limits["module_out"]
    assert (v_first - t["v_first_out"]).abs().max() <= limits["module_out"]
    if pad_mask is not None:
        assert pad_mask.any() and out[pad_mask].abs().max() == 0
    (out * t["dout"]).sum().backward()
    parameters = dict(block.named_parameters())
    grads = {k: v for k, v in t.items() if k.startswith("grad")}
    assert len(grads) > 5
    for key, expected in grads.items():
        actual = x.grad if key == "grad_x" else parameters[key.removeprefix("grad.")].grad
        limit = limits["module_grad_relative_to_max"] * expected.abs().max()
        assert (actual - expected).abs().max() <= limit, key


@torch.no_grad()
def test_encoder_of_the_forks_checkpoint():
    case = load_case("birwkv7_encoder")
    t, limit = case.tensors, case.expected["suggested_tolerance"]
    model = fastconformer.load_model(case.folder / "model.nemo", stft_pad="reflect")
    longest = int(t["audio_len"].argmax())
    row = slice(longest, longest + 1)  # NeMo 2.4: a padded batch changes the shorter ones' front
    features, lengths = model.featurize(t["audio"][row], t["audio_len"][row])
    n = int(lengths)
    assert n == int(t["features_len"][longest])
    assert (features[0, :, :n] - t["features"][longest, :, :n]).abs().max() <= limit["features"]
    encoded, lengths = model.encode(t["features"][row], t["features_len"][row])
    n = int(lengths)
    assert (encoded[0, :n] - t["encoded"][longest, :n]).abs().max() <= limit["encoded"]
    lengths = t["encoded_len"]
    x, _, _, pad_mask = model.encoder.prepare(t["subsampled"], lengths)
    v_first = None
    for i, layer in enumerate(model.encoder.layers):
        x, v_first = layer(x, None, None, pad_mask, v_first)
        expected = t["layer0_out"] if i == 0 else t["encoded"]
        assert (x - expected)[~pad_mask].abs().max() <= limit["encoded"]
    log_probs = model.ctc_log_probs(x)
    assert (log_probs - t["ctc_log_probs"])[~pad_mask].abs().max() <= limit["ctc_log_probs"]
    for head, part in (("tdt", "transducer"), ("ctc", "ctc")):
        hypotheses = model.decode_greedy(x, lengths, head)
        expected = case.expected[part]["decoding"]["greedy_batch"]["hyps"]
        for hypothesis, item in zip(hypotheses, expected, strict=True):
            assert hypothesis.tokens == item["ids"]
            assert hypothesis.frames == item["timestamp"]


def small_block(layer_id=1, n_layers=3, d_model=96, n_heads=2) -> BiRWKV7:
    """A block whose every parameter matters."""
    torch.manual_seed(layer_id)
    block = BiRWKV7(d_model, n_heads, layer_id, n_layers).double().eval()
    for parameter in block.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return block


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[37, 1, 16, 36], [5, 50, 33, 2]])
def test_a_clip_in_a_batch_equals_the_clip_alone(lengths):
    first, block = small_block(0), small_block(1)
    t = max(lengths)
    x = torch.randn(len(lengths), t, 96, dtype=torch.float64)
    pad_mask = torch.arange(t) >= torch.tensor(lengths)[:, None]
    x[pad_mask] = 1e3  # whatever stands there
    _, v_first = first(x, None, pad_mask)
    out, _ = block(x, v_first, pad_mask)
    for row, n in enumerate(lengths):
        _, v_alone = first(x[row : row + 1, :n])
        alone, _ = block(x[row : row + 1, :n], v_alone)
        assert (out[row, :n] - alone[0]).abs().max() <= 1e-9
        assert n == t or out[row, n:].abs().max() == 0


@torch.no_grad()
def test_both_directions_reach_every_frame():
    block, x = small_block(0), torch.randn(1, 40, 96, dtype=torch.float64)
    out, _ = block(x)
    other = x.clone()
    other[:, 20] += 1.0
    difference = (block(other)[0] - out).abs().amax(-1)[0]
    assert (difference > 1e-9).all()


@torch.no_grad()
def test_pieces_give_what_the_whole_gives(monkeypatch):
    block, x = small_block(1), torch.randn(2, 70, 96, dtype=torch.float64)
    v_first = torch.randn_like(x)
    pad_mask = torch.arange(70) >= torch.tensor([70, 41])[:, None]
    whole, _ = block(x, v_first, pad_mask)
    monkeypatch.setattr("fastconformer.networks.tiles.TILE_FRAMES", 26)
    pieces, v_same = block(x, v_first, pad_mask)
    assert (pieces - whole).abs().max() <= 1e-10 and torch.equal(v_same, v_first)


def test_one_layer_alone():
    block = BiRWKV7(64, 1, 0, 1)
    assert all(p.isfinite().all() for p in block.parameters())
    out, _ = block(torch.randn(1, 5, 64))
    assert out.abs().max() == 0  # the output's weights start at zero


def test_direction_dropout_uses_one_direction_in_training_only():
    block, x = small_block(0), torch.randn(1, 30, 96, dtype=torch.float64)
    both = block(x)[0]
    block.direction_dropout = 1.0
    assert torch.equal(block(x)[0], both)
    block.train()
    torch.manual_seed(0)
    seen = [block(x)[0] for _ in range(12)]
    different = {round(float(y.detach().sum()), 9) for y in seen}
    assert len(different) == 2 and not any(torch.equal(y, both) for y in seen)


def test_bf16_stays_near_float32():
    torch.manual_seed(0)
    block = BiRWKV7(128, 2, 0, 2).eval()
    torch.nn.init.orthogonal_(block.output.weight)
    x = torch.randn(1, 300, 128)
    with torch.no_grad():
        exact = block(x)[0]
        rounded = block.to(torch.bfloat16)(x.bfloat16())[0].float()
    assert (rounded - exact).norm() <= 0.03 * exact.norm()
