"""The folder that parakeet-mlx loads on Apple's machines: NeMo's config as JSON, MLX's layouts.

Source: parakeet-mlx 0.7. It keeps NeMo's names, but for the LSTM, and puts the channels last in
convolutions. It computes features its own way (power as the square of a sum of absolute values, a
larger guard in the logarithm), so its texts are near to ours, not equal.
"""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..checkpoint.contents import CONFIG_FILE, WEIGHTS_FILE
from ..checkpoint.files import filled_folder
from ..model import ASRModel
from .client import check_encoder, check_front_end, check_heads, check_unprompted

TARGETS = {  # NeMo's class by the families of the model's heads, as the client picks its own
    ("ctc",): "ctc_bpe_models.EncDecCTCModelBPE",
    ("transducer",): "rnnt_bpe_models.EncDecRNNTBPEModel",
    ("transducer", "ctc"): "hybrid_rnnt_ctc_bpe_models.EncDecHybridRNNTCTCBPEModel",
}
FRONT_END = {
    "window": ("hann", "hamming", "blackman", "bartlett"),
    "normalize": ("per_feature", "all_features"),
    "lowfreq": (0,),
    "log": (True,),
    "frame_splicing": (1,),
    "exact_pad": (False,),
    "mel_norm": ("slaney",),
}
LSTM = "decoder.prediction.dec_rnn.lstm."


def export(model: ASRModel, folder: Path) -> None:
    """Writes config.json and model.safetensors, of all heads that the client has.

    ValueError: parakeet-mlx cannot run it, with the reason; nothing is written then.
    """
    config = model.config
    check_front_end("parakeet-mlx", config.preprocessor, FRONT_END)
    check_unprompted("parakeet-mlx", config)
    check_encoder("parakeet-mlx", config.encoder)
    check_heads(config)
    families = tuple(model.head(name).family for name in model.heads)
    if len(families) == 2 and not config.loss.durations:
        families = families[:1]  # it has no hybrid of RNNT and CTC
    if families not in TARGETS:
        raise ValueError(f"parakeet-mlx has no model with the heads {', '.join(model.heads)}")
    if model.tokenizer.kind == "char":
        raise ValueError("the tokenizer is 'char'; parakeet-mlx takes models of pieces")
    document = _document(model, f"nemo.collections.asr.models.{TARGETS[families]}")
    tensors = _tensors(model.state_dict(), with_ctc="CTC" in TARGETS[families])
    with filled_folder(folder) as new:
        save_file(tensors, new / WEIGHTS_FILE, {"format": "mlx"})
        text = json.dumps(document, ensure_ascii=False, indent=1)
        (new / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _document(model: ASRModel, target: str) -> dict:
    """NeMo's config with each number of the type that the client checks for."""
    config, nemo = model.config, copy.deepcopy(model.config.nemo)
    pre, encoder = config.preprocessor, config.encoder
    channels = encoder.subsampling_conv_channels
    nemo["target"] = target
    nemo["preprocessor"] = {
        "sample_rate": pre.sample_rate,
        "normalize": pre.normalize,
        "window_size": pre.window_samples / pre.sample_rate,
        "window_stride": pre.hop_samples / pre.sample_rate,
        "window": pre.window,
        "features": pre.features,
        "n_fft": pre.fft_size,
        "dither": float(pre.dither),
        "pad_to": 0,  # as in NeMo's `transcribe`
        "pad_value": float(pre.pad_value),
        "preemph": None if pre.preemph is None else float(pre.preemph),
        "mag_power": float(pre.mag_power),
    }
    nemo["encoder"] |= {
        "causal_downsampling": False,
        "ff_expansion_factor": encoder.ff_expansion_factor,
        "subsampling_conv_channels": encoder.d_model if channels == -1 else channels,
        "pos_emb_max_len": nemo["encoder"].get("pos_emb_max_len") or 5000,
        "use_bias": encoder.use_bias,
        "xscaling": encoder.xscaling,
        "subsampling_conv_chunking_factor": 1,
    }
    pieces, durations = model.tokenizer.pieces, list(config.loss.durations)
    nemo["decoding"] = {"greedy": {"max_symbols": config.max_symbols}}
    if config.joint:
        nemo["joint"] = {
            "num_classes": config.vocab_size,
            "vocabulary": pieces,
            "num_extra_outputs": len(durations),
            "jointnet": {
                "joint_hidden": config.joint.joint_hidden,
                "activation": config.joint.activation,
                "encoder_hidden": config.joint.encoder_hidden,
                "pred_hidden": config.joint.pred_hidden,
            },
        }
        nemo["decoder"] = {
            "blank_as_pad": config.decoder.blank_as_pad,
            "vocab_size": config.vocab_size,
            "prednet": {
                "pred_hidden": config.decoder.pred_hidden,
                "pred_rnn_layers": config.decoder.pred_rnn_layers,
            },
        }
        nemo["model_defaults"] = (nemo.get("model_defaults") or {}) | {
            "tdt_durations": durations or None
        }
        if durations:
            nemo["decoding"] |= {"model_type": "tdt", "durations": durations}
    if config.ctc:
        head = {"feat_in": config.ctc.d_in, "num_classes": config.vocab_size, "vocabulary": pieces}
        if config.joint:
            nemo["aux_ctc"] = {"decoder": head}
        else:
            nemo["decoder"] = head
    return nemo


def _tensors(state: dict[str, torch.Tensor], with_ctc: bool) -> dict[str, torch.Tensor]:
    """Channels last in convolutions, one Wx, Wh and bias for each LSTM layer; the front end is
    computed there, and no count of batches kept."""
    tensors = {}
    for name, tensor in state.items():
        if name.startswith("preprocessor.") or name.endswith("num_batches_tracked"):
            continue
        if name.startswith("ctc_decoder.") and not with_ctc:
            continue
        if name.startswith(LSTM):
            kind, layer = name.removeprefix(LSTM).rsplit("_l", 1)
            new = {"weight_ih": "Wx", "weight_hh": "Wh", "bias_ih": "bias"}.get(kind)
            if new is None:
                continue
            if new == "bias":
                tensor = tensor + state[f"{LSTM}bias_hh_l{layer}"]
            name = f"{LSTM}{layer}.{new}"
        elif tensor.dim() >= 3:
            tensor = tensor.movedim(1, -1)
        if name.startswith("joint.joint_net."):  # without dropout its index is 1
            name = f"joint.joint_net.2.{name.rpartition('.')[2]}"
        tensors[name] = tensor.detach().float().contiguous()
    return tensors
