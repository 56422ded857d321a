"""Records what NeMo's linear adapters do to a golden case, into adapters.{json,safetensors} beside
it: the config's `adapters` section, the adapters' weights, the encoder's output.

    python record_adapters.py CASE_FOLDER        with the Python of an environment with NeMo
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from nemo.collections.asr.models import ASRModel
from nemo.collections.common.parts.adapter_modules import LinearAdapterConfig
from omegaconf import OmegaConf, open_dict
from safetensors.torch import load_file, save_file


def main(folder: Path):
    archive = str(folder / "model.nemo")
    config = ASRModel.restore_from(archive, return_config=True)
    with open_dict(config):
        config.encoder._target_ += "Adapter"
    model = ASRModel.restore_from(archive, override_config_path=config, map_location="cpu")
    width = config.encoder.d_model
    for name, options in {
        "first": {"dim": 4},
        "off": {"dim": 3},
        "encoder:second": {"dim": 5, "activation": "relu", "norm_position": "post", "dropout": 0.1},
    }.items():
        model.add_adapter(name, LinearAdapterConfig(in_features=width, **options))
    model.set_enabled_adapters("off", enabled=False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "adapter_layer" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    with tempfile.TemporaryDirectory() as temporary:  # as NeMo restores what it saved
        model.save_to(f"{temporary}/model.nemo")
        model = ASRModel.restore_from(f"{temporary}/model.nemo", map_location="cpu").eval()
    golden = load_file(folder / "golden.safetensors")
    n = int(golden["audio_len"][0])
    with torch.no_grad():
        features, lengths = model.preprocessor(
            input_signal=golden["audio"][:1, :n], length=golden["audio_len"][:1]
        )
        encoded, _ = model.encoder(audio_signal=features, length=lengths)
    tensors = {k: v.clone() for k, v in model.state_dict().items() if "adapter_layer" in k}
    tensors["encoded"] = encoded[0].T.contiguous()
    save_file(tensors, folder / "adapters.safetensors")
    section = OmegaConf.to_container(model.cfg.adapters, resolve=True)
    (folder / "adapters.json").write_text(json.dumps(section, indent=1) + "\n")


main(Path(sys.argv[1]))
