"""The folder that transformers' from_pretrained loads as ParakeetForCTC, ForRNNT or ForTDT.

Source: transformers 5.24, models/parakeet. Its features, encoder and greedy decoding are NeMo's,
so its texts are ours.
"""

import json
from pathlib import Path

from safetensors.torch import save_file

from ..checkpoint.contents import CONFIG_FILE, WEIGHTS_FILE
from ..checkpoint.files import filled_folder
from ..checkpoint.hugging_face import CTC_NAMES, PROCESSOR_FILE, TRANSDUCER_NAMES, renamed
from ..config import ModelConfig
from ..model import ASRModel
from ..text.sentencepiece_model import SentencePieceModel
from ..text.tokenizer_json import tokenizer_json
from .client import check_encoder, check_front_end, check_heads, check_unprompted

BLANK = "<blank>"
# By the head's family: names of its tensors, and of model classes, which end in the head's name.
NAMES = {"ctc": CTC_NAMES, "transducer": TRANSDUCER_NAMES}

FRONT_END = {
    "sample_rate": (16000,),
    "window": ("hann",),
    "normalize": ("per_feature",),
    "lowfreq": (0,),
    "highfreq": (None, 8000),
    "log": (True,),
    "log_zero_guard_type": ("add",),
    "log_zero_guard_value": (2**-24, 5.960464477539063e-08),
    "frame_splicing": (1,),
    "exact_pad": (False,),
    "mag_power": (2.0,),
    "mel_norm": ("slaney",),
}


def export(model: ASRModel, head: str, folder: Path, card: str | None = None) -> str | None:
    """Writes the folder for one head, with `card` as its README.md. Returns what transformers
    decodes otherwise than NeMo, if anything.

    ValueError: transformers cannot run it, with the reason; nothing is written then.
    """
    family = model.head(head).family
    if family not in NAMES:
        raise ValueError(
            f"transformers' Parakeet has heads of {' and '.join(NAMES)}, {head} is none; its "
            "Canary begins the prompt otherwise than NeMo's"
        )
    config = model.config
    check_front_end("transformers", config.preprocessor, FRONT_END)
    check_unprompted("transformers' Parakeet", config)
    check_encoder("transformers", config.encoder)
    if model.tokenizer.kind != "bpe":
        raise ValueError(
            f"the tokenizer is {model.tokenizer.kind!r}; transformers' Parakeet takes one "
            "SentencePiece model"
        )
    documents = {CONFIG_FILE: _common(config, head)}
    if config.joint and family == "transducer":
        _check_transducer(model)
        documents |= _transducer(config, head)
    sentencepiece = model.tokenizer.processor.serialized_model_proto()
    documents["tokenizer.json"] = tokenizer_json(
        SentencePieceModel.from_bytes(sentencepiece), BLANK
    )
    documents["tokenizer_config.json"] = {
        "tokenizer_class": "ParakeetTokenizer",
        "processor_class": "ParakeetProcessor",
        "pad_token": BLANK,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    documents[PROCESSOR_FILE] = _processor(config, head)
    tensors = _tensors(model, head, NAMES[family])
    with filled_folder(folder) as new:
        save_file(tensors, new / WEIGHTS_FILE, {"format": "pt"})
        for name, document in documents.items():
            text = json.dumps(document, ensure_ascii=False, indent=2)
            (new / name).write_text(text + "\n", encoding="utf-8")
        if card is not None:
            (new / "README.md").write_text(card, encoding="utf-8")
    if family != "transducer" or not config.max_symbols or 0 not in config.loss.durations:
        return None
    return (
        f"transformers' TDT has no max_symbols ({config.max_symbols} here): where as many tokens "
        "of duration 0 follow one another, it stays on the frame and its text goes on otherwise; "
        "converters.check_export names such clips"
    )


def _tensors(model: ASRModel, head: str, names) -> dict:
    """The encoder's and the head's, under transformers' names; the front end is computed there."""
    parts = {"encoder": "encoder", **model.head(head).modules}
    tensors = {}
    for part in dict.fromkeys(parts.values()):
        is_head = part != "encoder"
        for name, tensor in model.get_submodule(part).state_dict().items():
            # of a hybrid, the CTC head is `ctc_decoder`; of a CTC model, `decoder`
            part_name = part.removeprefix("ctc_") if is_head else part
            new = renamed(f"{part_name}.{name}", names)
            if new.startswith("joint.joint_net."):  # without dropout its index is 1
                new = f"joint.head.{name.rpartition('.')[2]}"
            tensors[new] = (
                tensor.detach().float().contiguous().clone()
                if (tensor.is_floating_point())
                else tensor.clone()
            )
    return tensors


def _check_transducer(model: ASRModel) -> None:
    config = model.config
    check_heads(config)
    embed = model.decoder.prediction["embed"]
    if config.decoder.pred_hidden != config.joint.joint_hidden:
        raise ValueError(
            f"pred_hidden is {config.decoder.pred_hidden} and joint_hidden "
            f"{config.joint.joint_hidden}; transformers' Parakeet has one width for both"
        )
    if not config.decoder.blank_as_pad or embed.weight[-1].any():
        raise ValueError("decoder.blank_as_pad is off: transformers starts from the blank's row")
    if hasattr(embed, "norm"):
        raise ValueError("decoder.prediction.embed has a norm, which transformers' Parakeet lacks")


def _common(config: ModelConfig, head: str) -> dict:
    encoder, n_tokens = config.encoder, config.vocab_size + 1
    channels = encoder.subsampling_conv_channels
    return {
        "architectures": [f"ParakeetFor{head.upper()}"],
        "model_type": f"parakeet_{head}",
        "dtype": "float32",
        "vocab_size": n_tokens,
        "pad_token_id": config.vocab_size,
        "encoder_config": {
            "model_type": "parakeet_encoder",
            "hidden_size": encoder.d_model,
            "num_hidden_layers": encoder.n_layers,
            "num_attention_heads": encoder.n_heads,
            "intermediate_size": encoder.d_model * encoder.ff_expansion_factor,
            "hidden_act": "silu",
            "attention_bias": encoder.use_bias,
            "convolution_bias": encoder.use_bias,
            "conv_kernel_size": encoder.conv_kernel_size,
            "subsampling_factor": encoder.subsampling_factor,
            "subsampling_conv_channels": encoder.d_model if channels == -1 else channels,
            "num_mel_bins": encoder.feat_in,
            "subsampling_conv_kernel_size": 3,
            "subsampling_conv_stride": 2,
            "dropout": encoder.dropout,
            "dropout_positions": encoder.dropout_emb,
            "layerdrop": 0.0,
            "activation_dropout": encoder.dropout,
            "attention_dropout": encoder.dropout_att,
            "max_position_embeddings": 5000,
            "scale_input": encoder.xscaling,
        },
    }


def _transducer(config: ModelConfig, head: str) -> dict:
    """config.json and generation_config.json of a transducer."""
    blank, durations = config.vocab_size, config.loss.durations
    document = _common(config, head) | {
        "blank_token_id": blank,
        "decoder_hidden_size": config.decoder.pred_hidden,
        "num_decoder_layers": config.decoder.pred_rnn_layers,
        "hidden_act": config.joint.activation,
        "max_symbols_per_step": config.max_symbols or 1000,
        "is_encoder_decoder": True,
    }
    generation = {"decoder_start_token_id": blank, "pad_token_id": blank}
    if durations:
        document["durations"] = list(durations)
        # the duration classes stand behind the tokens, and are none
        generation["suppress_tokens"] = list(range(blank + 1, blank + 1 + len(durations)))
    return {CONFIG_FILE: document, "generation_config.json": generation}


def _processor(config: ModelConfig, head: str) -> dict:
    preprocessor = config.preprocessor
    return {
        "processor_class": "ParakeetProcessor",
        "blank_token": BLANK,
        "decoder_type": head,
        "feature_extractor": {
            "feature_extractor_type": "ParakeetFeatureExtractor",
            "feature_size": preprocessor.features,
            "sampling_rate": preprocessor.sample_rate,
            "hop_length": preprocessor.hop_samples,
            "win_length": preprocessor.window_samples,
            "n_fft": preprocessor.fft_size,
            "preemphasis": preprocessor.preemph,
            "padding_value": 0.0,
            "padding_side": "right",
            "return_attention_mask": True,
        },
    }
