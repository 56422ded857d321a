"""Hugging Face folders of transformers' Parakeet models, as checkpoints: names, config, tokenizer.

`config.json` has a `model_type` (parakeet_ctc, parakeet_rnnt or parakeet_tdt) and no NeMo config,
which is made up here from what the folder says; what training alone needs takes NeMo's usual
values. The SentencePiece model is rebuilt from tokenizer.json.
Source: transformers 5.24, models/parakeet.
"""

import json
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..audio.features import Preprocessor
from ..config import ModelConfig
from ..text.tokenizer import sentencepiece_files
from ..text.tokenizer_json import sentencepiece_model
from .contents import CONFIG_FILE, WEIGHTS_FILE, Checkpoint

TOKENIZER_FILE, PROCESSOR_FILE = "tokenizer.json", "processor_config.json"

# NeMo's names and transformers', as parts of a tensor's name
ENCODER_NAMES = (
    ("encoder.pre_encode.conv.", "encoder.subsampling.layers."),
    ("encoder.pre_encode.out.", "encoder.subsampling.linear."),
    (".conv.batch_norm.", ".conv.norm."),
    (".self_attn.linear_q.", ".self_attn.q_proj."),
    (".self_attn.linear_k.", ".self_attn.k_proj."),
    (".self_attn.linear_v.", ".self_attn.v_proj."),
    (".self_attn.linear_out.", ".self_attn.o_proj."),
    (".self_attn.linear_pos.", ".self_attn.relative_k_proj."),
    (".self_attn.pos_bias_", ".self_attn.bias_"),
)
CTC_NAMES = (("decoder.decoder_layers.0.", "ctc_head."),)
TRANSDUCER_NAMES = (
    ("decoder.prediction.embed.", "decoder.embedding."),
    ("decoder.prediction.dec_rnn.lstm.", "decoder.lstm."),
    ("joint.pred.", "decoder.decoder_projector."),
    ("joint.enc.", "encoder_projector."),
    ("joint.joint_net.2.", "joint.head."),
)
KINDS = {  # model_type: names of the head's tensors, NeMo's class
    "parakeet_ctc": (CTC_NAMES, "ctc_bpe_models.EncDecCTCModelBPE"),
    "parakeet_rnnt": (TRANSDUCER_NAMES, "rnnt_bpe_models.EncDecRNNTBPEModel"),
    "parakeet_tdt": (TRANSDUCER_NAMES, "rnnt_bpe_models.EncDecRNNTBPEModel"),
}


def is_hugging_face(folder: Path) -> bool:
    """Whether config.json is one of transformers'."""
    try:
        document = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and "model_type" in document


def read_hugging_face(folder: Path) -> Checkpoint:
    """ValueError: a folder of another kind of model, or damaged."""
    config = _json(folder / CONFIG_FILE)
    kind = config.get("model_type")
    if kind not in KINDS:
        raise ValueError(f"{folder}: model_type is {kind!r}, supported are {', '.join(KINDS)}")
    processor = {}
    if (folder / PROCESSOR_FILE).is_file():
        processor = _json(folder / PROCESSOR_FILE).get("feature_extractor") or {}
    elif (folder / "preprocessor_config.json").is_file():
        processor = _json(folder / "preprocessor_config.json")
    try:
        nemo = _nemo_config(kind, config, processor)
        tokenizer = sentencepiece_model(_json(folder / TOKENIZER_FILE), config["vocab_size"] - 1)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} lacks what its kind needs: {error!r}") from None
    files = sentencepiece_files(tokenizer.to_bytes())
    pieces = [piece.text for piece in tokenizer.pieces]
    nemo["decoder" if kind == "parakeet_ctc" else "joint"]["vocabulary"] = pieces
    state_dict = {}
    for name, tensor in _tensors(folder).items():
        state_dict[renamed(name, KINDS[kind][0], back=True)] = tensor
    front_end = Preprocessor(ModelConfig.from_nemo(nemo).preprocessor).state_dict()
    state_dict |= {f"preprocessor.{name}": tensor for name, tensor in front_end.items()}
    return Checkpoint(nemo, state_dict, files)


def renamed(name: str, head_names, back: bool = False) -> str:
    """A tensor's name in transformers, or back in NeMo."""
    for nemo, there in (*ENCODER_NAMES, *head_names):
        old, new = (there, nemo) if back else (nemo, there)
        if old in name if old.startswith(".") else name.startswith(old):
            return name.replace(old, new)
    return name


def _json(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} holds no {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no mapping")
    return document


def _tensors(folder: Path) -> dict:
    """Of one file, or of the parts that an index names."""
    index = folder / f"{WEIGHTS_FILE}.index.json"
    names = [WEIGHTS_FILE]
    if not (folder / WEIGHTS_FILE).is_file() and index.is_file():
        names = sorted(set(_json(index).get("weight_map", {}).values()))
    tensors = {}
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name) or not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}")
        try:
            tensors |= load_file(folder / name, device="cpu")
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged or truncated: {error}") from None
    return tensors


def _nemo_config(kind: str, config: dict, processor: dict) -> dict:
    encoder, blank = config["encoder_config"], config["vocab_size"] - 1
    if encoder.get("subsampling_conv_kernel_size", 3) != 3:
        raise ValueError("encoder_config.subsampling_conv_kernel_size is not 3")
    if encoder.get("convolution_bias", True) != encoder.get("attention_bias", True):
        raise ValueError("encoder_config: biases in attention or convolutions alone")
    if config.get("blank_token_id", blank) != blank:
        raise ValueError(f"blank_token_id is {config['blank_token_id']}, expected the last token")
    rate = processor.get("sampling_rate", 16000)
    d_model, n_mels = encoder["hidden_size"], encoder.get("num_mel_bins", 80)
    modules = "nemo.collections.asr.modules."
    nemo = {
        "sample_rate": rate,
        "tokenizer": {
            "dir": None,
            "type": "bpe",
            "model_path": "nemo:tokenizer.model",
            "vocab_path": "nemo:vocab.txt",
            "spe_tokenizer_vocab": "nemo:tokenizer.vocab",
        },
        "preprocessor": {
            "_target_": f"{modules}AudioToMelSpectrogramPreprocessor",
            "sample_rate": rate,
            "normalize": "per_feature",
            "window_size": processor.get("win_length", 400) / rate,
            "window_stride": processor.get("hop_length", 160) / rate,
            "window": "hann",
            "features": n_mels,
            "n_fft": processor.get("n_fft", 512),
            "preemph": processor.get("preemphasis", 0.97),
            "log": True,
            "frame_splicing": 1,
            "dither": 1e-05,
            "pad_to": 0,
            "pad_value": 0.0,
        },
        "encoder": {
            "_target_": f"{modules}ConformerEncoder",
            "feat_in": n_mels,
            "feat_out": -1,
            "n_layers": encoder["num_hidden_layers"],
            "d_model": d_model,
            "use_bias": encoder.get("attention_bias", True),
            "subsampling": "dw_striding",
            "subsampling_factor": encoder.get("subsampling_factor", 8),
            "subsampling_conv_channels": encoder.get("subsampling_conv_channels", 256),
            "causal_downsampling": False,
            "ff_expansion_factor": encoder["intermediate_size"] // d_model,
            "self_attention_model": "rel_pos",
            "n_heads": encoder["num_attention_heads"],
            "att_context_size": [-1, -1],
            "att_context_style": "regular",
            "xscaling": encoder.get("scale_input", True),
            "untie_biases": True,
            "pos_emb_max_len": encoder.get("max_position_embeddings", 5000),
            "conv_kernel_size": encoder.get("conv_kernel_size", 9),
            "conv_norm_type": "batch_norm",
            "conv_context_size": None,
            "dropout": encoder.get("dropout", 0.1),
            "dropout_pre_encoder": encoder.get("dropout", 0.1),
            "dropout_emb": encoder.get("dropout_positions", 0.0),
            "dropout_att": encoder.get("attention_dropout", 0.1),
        },
        "target": f"nemo.collections.asr.models.{KINDS[kind][1]}",
    }
    if kind == "parakeet_ctc":
        nemo["decoder"] = {
            "_target_": f"{modules}ConvASRDecoder",
            "feat_in": d_model,
            "num_classes": blank,
        }
        nemo["decoding"] = {"strategy": "greedy_batch"}
        return nemo
    hidden, durations = config["decoder_hidden_size"], list(config.get("durations") or ())
    if kind == "parakeet_rnnt":
        durations = []
    nemo["decoder"] = {
        "_target_": f"{modules}RNNTDecoder",
        "normalization_mode": None,
        "random_state_sampling": False,
        "blank_as_pad": True,
        "prednet": {
            "pred_hidden": hidden,
            "pred_rnn_layers": config.get("num_decoder_layers", 2),
            "t_max": None,
            "dropout": 0.2,
        },
        "vocab_size": blank,
    }
    nemo["joint"] = {
        "_target_": f"{modules}RNNTJoint",
        "log_softmax": None,
        "preserve_memory": False,
        "fuse_loss_wer": True,
        "fused_batch_size": 4,
        "jointnet": {
            "joint_hidden": hidden,
            "activation": config.get("hidden_act", "relu"),
            "dropout": 0.2,  # what all released models have; it gives the output layer its index
            "encoder_hidden": d_model,
            "pred_hidden": hidden,
        },
        "num_classes": blank,
    }
    nemo["model_defaults"] = {"enc_hidden": d_model, "pred_hidden": hidden, "joint_hidden": hidden}
    limit = config.get("max_symbols_per_step", 10)
    nemo["decoding"] = {"strategy": "greedy_batch", "greedy": {"max_symbols": limit}}
    nemo["loss"] = {"loss_name": "default"}
    if durations:
        nemo["joint"]["num_extra_outputs"] = len(durations)
        nemo["model_defaults"] |= {"tdt_durations": durations, "num_tdt_durations": len(durations)}
        nemo["decoding"] |= {"model_type": "tdt", "durations": durations}
        kwargs = {"fastemit_lambda": 0.0, "clamp": -1.0, "durations": durations}
        kwargs |= {"sigma": 0.02, "omega": 0.1}
        nemo["loss"] = {"loss_name": "tdt", "tdt_kwargs": kwargs}
    return nemo
