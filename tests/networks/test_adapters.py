"""NeMo's linear adapters behind the encoder's layers, against NeMo (golden/record_adapters.py)."""

import json

import pytest
import torch
from conftest import golden
from safetensors.torch import load_file

from converters import nemo2st, st2mlx
from fastconformer import load_model
from fastconformer.checkpoint.nemo_archive import read_nemo, write_nemo

FOLDER = golden("tdt_bpe")
ADAPTERS = load_file(FOLDER / "adapters.safetensors")
SECTION = json.loads((FOLDER / "adapters.json").read_text())


@pytest.fixture
def archive(tmp_path):
    """Writes the golden model with NeMo's adapters, and `section` for `adapters`."""

    def write(section):
        checkpoint = read_nemo(FOLDER / "model.nemo")
        checkpoint.config["encoder"]["_target_"] += "Adapter"
        checkpoint.config["adapters"] = section
        checkpoint.state_dict |= {k: v for k, v in ADAPTERS.items() if k != "encoded"}
        write_nemo(tmp_path / "adapted.nemo", checkpoint)
        return tmp_path / "adapted.nemo"

    return write


def test_the_encoder_is_nemos(archive, tmp_path, capsys, caplog):
    model = load_model(archive(SECTION))
    assert "with the adapters first, second behind" in caplog.text
    expected = json.loads((FOLDER / "expected.json").read_text())["suggested_tolerance"]
    tensors = load_file(FOLDER / "golden.safetensors")
    n = int(tensors["audio_len"][0])
    with torch.inference_mode():
        features = model.featurize(tensors["audio"][:1, :n], tensors["audio_len"][:1])
        encoded, lengths = model.encode(*features)
    wanted = ADAPTERS["encoded"][: int(lengths[0])]
    assert (encoded[0, : int(lengths[0])] - wanted).abs().max() < expected["encoded"]
    plain = tensors["encoded"][0, : int(lengths[0])]
    assert (wanted - plain).abs().max() > 0.1

    assert nemo2st.main([str(tmp_path / "adapted.nemo"), "-o", str(tmp_path / "folder")]) == 0
    out = capsys.readouterr().out
    assert "with adapters behind each layer: first, second\n" in out
    assert "not kept, the model does not use them: the disabled adapter off\n" in out
    again = load_model(tmp_path / "folder")
    assert again.config.nemo["adapters"] == {k: v for k, v in SECTION.items() if k != "off"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert st2mlx.main([str(tmp_path / "folder"), "-o", str(tmp_path / "mlx")]) == 1
    assert "encoder.adapters is ('first', 'second')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second": {"_target_": "a.b.RelPositionMultiHeadAttentionAdapter"}}, "adapters.second"),
        ({"second": SECTION["second"] | {"activation": "tanh"}}, "adapters.second.activation"),
        ({"first": SECTION["first"] | {"in_features": 7}}, "adapters.first.in_features is 7"),
        (
            {"global_cfg": {"adapter_meta_cfg": {"modules": {"first": "decoder"}}}},
            "adapters.first belongs to decoder",
        ),
        ({"first": SECTION["first"] | {"enabled": None, "dim": 9}}, "adapter_layer.first"),
    ],
)
def test_others_are_named(archive, change, message):
    with pytest.raises(ValueError, match=f"adapted.nemo: .*{message}"):
        load_model(archive(SECTION | change))
