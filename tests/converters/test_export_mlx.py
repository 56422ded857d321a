"""Folders of parakeet-mlx, which tests/clients runs: names, layouts, types, and what is refused."""

import json

import pytest
import torch
from conftest import golden
from safetensors.torch import load_file

import converters.st2mlx
from fastconformer import load_model

TARGETS = {
    "ctc_bpe": "ctc_bpe_models.EncDecCTCModelBPE",
    "rnnt_bpe": "rnnt_bpe_models.EncDecRNNTBPEModel",
    "tdt_bpe": "rnnt_bpe_models.EncDecRNNTBPEModel",
    "hybrid_tdt_ctc_bpe": "hybrid_rnnt_ctc_bpe_models.EncDecHybridRNNTCTCBPEModel",
    "hybrid_rnnt_ctc_bpe": "rnnt_bpe_models.EncDecRNNTBPEModel",  # the CTC head is left out
}


@pytest.mark.parametrize("case", TARGETS)
def test_names_and_layouts(case, tmp_path):
    archive = golden(case) / "model.nemo"
    assert converters.st2mlx.main([str(archive), "-o", str(tmp_path / "x")]) == 0
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["target"] == f"nemo.collections.asr.models.{TARGETS[case]}"
    # the client's types are strict: an integer is no float
    for name in ("window_size", "window_stride", "dither", "pad_value", "mag_power"):
        assert isinstance(config["preprocessor"][name], float), name
    tensors, model = load_file(tmp_path / "x" / "model.safetensors"), load_model(archive)
    state = model.state_dict()
    conv = "encoder.layers.0.conv.depthwise_conv.weight"
    assert torch.equal(tensors[conv], state[conv].transpose(1, 2))
    conv = "encoder.pre_encode.conv.0.weight"
    assert torch.equal(tensors[conv], state[conv].permute(0, 2, 3, 1))
    name = "encoder.layers.0.self_attn.linear_pos.weight"
    assert torch.equal(tensors[name], state[name])
    assert not any("num_batches" in n or n.startswith("preprocessor") for n in tensors)
    assert any(n.startswith("ctc_decoder") for n in tensors) == (case == "hybrid_tdt_ctc_bpe")
    if not model.config.joint:
        assert tensors["decoder.decoder_layers.0.weight"].shape == (97, 1, 48)
        return
    is_tdt = bool(model.config.loss.durations)
    assert (config["model_defaults"]["tdt_durations"] is not None) == is_tdt
    lstm = "decoder.prediction.dec_rnn.lstm."
    layers = model.config.decoder.pred_rnn_layers
    names = {f"{lstm}{i}.{kind}" for i in range(layers) for kind in ("Wx", "Wh", "bias")}
    assert names == {n for n in tensors if n.startswith(lstm)}
    bias = state[f"{lstm}bias_ih_l0"] + state[f"{lstm}bias_hh_l0"]
    assert torch.equal(tensors[f"{lstm}0.bias"], bias)


@pytest.mark.parametrize(
    "case, reason",
    [
        ("local_attn_g1", "self_attention_model is 'rel_pos_local_attn'"),
        ("stream_chunked_hybrid_rnnt", "normalize is 'NA'"),
        ("striding4_ctc_char", "subsampling is 'striding'"),
    ],
)
def test_refused_before_a_byte_is_written(case, reason, tmp_path, capsys):
    words = [str(golden(case) / "model.nemo"), "-o", str(tmp_path / "x")]
    assert converters.st2mlx.main(words) == 1
    message = capsys.readouterr().err
    assert reason in message and message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
