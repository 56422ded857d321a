"""Attention to BiRWKV7: what goes, what stays, what the new parts start from."""

import pytest
import torch
from conftest import golden

import converters.to_birwkv7
from fastconformer import load_model
from fastconformer.checkpoint.read import read_checkpoint
from fastconformer.load import model_of
from fastconformer.surgery.birwkv7 import default_head_size, to_birwkv7
from training.recipe.sections import EncoderRecipe, LossRecipe, ModelRecipe
from training.setup.start import build_model


@pytest.mark.parametrize("case", ["ctc_bpe", "tdt_bpe", "local_attn_g1", "hybrid_rnnt_ctc_bpe"])
def test_all_but_the_attention_stays(case, tmp_path):
    path = golden(case) / "model.nemo"
    out = tmp_path / ("b.nemo" if case == "ctc_bpe" else "b")
    assert converters.to_birwkv7.main([str(path), "-o", str(out)]) == 0
    before, after = read_checkpoint(path), read_checkpoint(out)
    scaled = before.config["encoder"]["xscaling"]
    for name, tensor in before.state_dict.items():
        if ".self_attn." in name:
            part = name.split(".self_attn.")[1]
            assert name not in after.state_dict, part
        elif not (scaled and "pre_encode.out" in name):
            assert torch.equal(tensor, after.state_dict[name]), name
    assert not any("linear_pos" in n or "pos_bias" in n for n in after.state_dict)
    model = load_model(out)
    config = model.config.encoder
    assert config.self_attention_model == "rwkv7_attn" and not config.xscaling
    assert config.d_model // config.n_heads == model.encoder.layers[0].self_attn.wkv_head_size
    assert model.transcribe(torch.randn(20000).numpy() * 0.1)[0].duration == 1.25
    with pytest.raises(ValueError, match="BiRWKV7 already"):
        to_birwkv7(after)


@torch.no_grad()
def test_scaling_moves_into_the_subsampling():
    path = golden("ctc_bpe") / "model.nemo"
    before = load_model(path)
    assert before.config.encoder.xscaling
    after = model_of(to_birwkv7(read_checkpoint(path)))
    features, lengths = torch.randn(2, 80, 90), torch.tensor([90, 71])
    frames = {}
    for name, model in (("before", before), ("after", after)):
        x, n = model.encoder.pre_encode(features, lengths)
        frames[name] = model.encoder.prepare(x, n)[0]
    assert torch.allclose(frames["before"], frames["after"], rtol=1e-5, atol=1e-5)


def test_warm_start_takes_the_projections():
    checkpoint = read_checkpoint(golden("tdt_bpe") / "model.nemo")
    prefix = "encoder.layers.1.self_attn."
    warm, cold = (to_birwkv7(checkpoint, warm_start=w).state_dict for w in (True, False))
    again = to_birwkv7(checkpoint, warm_start=False).state_dict
    other = to_birwkv7(checkpoint, warm_start=False, seed=1).state_dict
    for new, old in (("key", "linear_k"), ("value", "linear_v"), ("output", "linear_out")):
        attention = checkpoint.state_dict[f"{prefix}{old}.weight"]
        assert torch.equal(warm[f"{prefix}{new}.weight"], attention)
        assert not torch.equal(cold[f"{prefix}{new}.weight"], attention)
    ratio = warm[f"{prefix}receptance.weight"] / checkpoint.state_dict[f"{prefix}linear_q.weight"]
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio))
    # random starts give nothing, so that the residual branches alone speak
    assert cold[f"{prefix}output.weight"].abs().max() == 0
    key = f"{prefix}receptance.weight"
    assert torch.equal(cold[key], again[key]) and not torch.equal(cold[key], other[key])
    # the output gate of a warm start is 1
    gate = torch.sigmoid(torch.zeros(warm[f"{prefix}g2"].shape[0])) @ warm[f"{prefix}g2"]
    assert torch.allclose(gate, torch.ones_like(gate), atol=1e-5)


@pytest.mark.parametrize(
    "d_model, n_heads, width",
    [(1024, 8, 64), (512, 8, 64), (256, 4, 64), (144, 4, 36), (176, 4, 44), (48, 4, 48)],
)
def test_default_head_sizes(d_model, n_heads, width):
    assert default_head_size(d_model, n_heads) == width


def test_bad_usage(tmp_path, capsys):
    path = str(golden("ctc_bpe") / "model.nemo")
    with pytest.raises(SystemExit) as caught:
        converters.to_birwkv7.main([path])
    assert caught.value.code == 2
    assert converters.to_birwkv7.main([path, "-o", str(tmp_path / "x"), "--head-size", "37"]) == 1
    error = capsys.readouterr().err
    assert "the head size is 37, expected a divisor of d_model" in error.splitlines()[-1]
    assert not (tmp_path / "x").exists()


def test_recipe_key(tmp_path):
    """`encoder.attention: birwkv7` converts on the way into training."""
    path = str(golden("tdt_bpe") / "model.nemo")
    loss = LossRecipe()

    def built(init_from=path, **keys):
        return build_model(ModelRecipe(init_from=init_from), loss, 0, EncoderRecipe(**keys))

    assert built().config.encoder.self_attention_model == "rel_pos"
    warm = built(attention="birwkv7", direction_dropout=0.25)
    cold = built(attention="birwkv7", warm_start=False)
    assert warm.config.encoder.self_attention_model == "rwkv7_attn"
    assert all(layer.self_attn.direction_dropout == 0.25 for layer in warm.encoder.layers)
    assert warm.encoder.layers[0].self_attn.output.weight.abs().max() > 0
    assert cold.encoder.layers[0].self_attn.output.weight.abs().max() == 0
    warm.save(tmp_path / "warm")
    again = built(str(tmp_path / "warm"), attention="birwkv7")  # has it: stays as it is
    assert torch.equal(
        again.encoder.layers[1].self_attn.key.weight, warm.encoder.layers[1].self_attn.key.weight
    )
    with pytest.raises(ValueError, match="direction_dropout belongs to BiRWKV7"):
        built(direction_dropout=0.1)
