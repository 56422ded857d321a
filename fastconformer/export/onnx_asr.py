"""The folder that onnx-asr loads: its files, their names, and what it cannot run.

Source: onnx-asr 0.12, models/nemo.py. It computes NeMo's own features (of 2.5 and newer), so its
texts are ours.
"""

import json
from pathlib import Path

from ..checkpoint.files import filled_folder
from ..model import ASRModel
from .aed_graphs import aed_decoder_graph, aed_encoder_graph
from .client import check_front_end, check_heads, vocabulary_lines
from .graphs import ctc_graph, decoder_joint_graph, encoder_graph
from .onnx_files import require_packages, write_graph

_TRANSDUCER = {"encoder-model": encoder_graph, "decoder_joint-model": decoder_joint_graph}
GRAPHS = {  # by the head's family
    "ctc": {"model": ctc_graph},
    "transducer": _TRANSDUCER,
    "aed": {"encoder-model": aed_encoder_graph, "decoder-model": aed_decoder_graph},
}
# What it tells a multi-task model: the pieces of its prompt, and the end.
PROMPT = (
    *("▁", "<|startofcontext|>", "<|startoftranscript|>", "<|emo:undefined|>", "<|en|>"),
    *("<|pnc|>", "<|noitn|>", "<|notimestamp|>", "<|nodiarize|>", "<|endoftext|>"),
)

FRONT_END = {
    "sample_rate": (16000,),
    "features": (80, 128),
    "window_samples": (400,),
    "hop_samples": (160,),
    "fft_size": (512,),
    "window": ("hann",),
    "normalize": ("per_feature",),
    "preemph": (0.97,),
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


def export(model: ASRModel, head: str, folder: Path, int8: bool = False) -> None:
    """Writes the folder for one head.

    ValueError: onnx-asr cannot run it, with the reason; nothing is written then.
    """
    require_packages()
    config = model.config
    family = model.head(head).family
    if family not in GRAPHS:
        raise ValueError(f"onnx-asr takes heads of {' and '.join(GRAPHS)}, {head} is none")
    check_front_end("onnx-asr", config.preprocessor, FRONT_END)
    check_heads(config)
    if config.aed:
        lacking = [piece for piece in PROMPT if piece not in model.tokenizer.pieces]
        if lacking:
            raise ValueError(
                f"the vocabulary lacks {', '.join(lacking)}: onnx-asr's prompt is of format "
                f"canary2, the model's is {config.aed.prompt_format}"
            )
    vocabulary = vocabulary_lines(model, spoken_unknown=True)
    graphs = {name: graph(model) for name, graph in GRAPHS[family].items()}
    # it works out a CTC model's frames by itself; a transducer's encoder tells their number
    encoder = config.encoder
    rounds_up = not encoder.causal_downsampling and (
        not encoder.reduces or encoder.reduction == "striding"
    )
    if any("logprobs" in graph.outputs for graph in graphs.values()) and not rounds_up:
        raise ValueError(
            "the encoder's number of frames is not a clip's frames / "
            f"{encoder.frame_factor} rounded up, as onnx-asr counts them for CTC"
        )
    suffix = ".int8" if int8 else ""
    with filled_folder(folder) as new:
        for name, graph in graphs.items():
            write_graph(new / f"{name}{suffix}.onnx", graph, int8=int8)
        (new / "vocab.txt").write_text(vocabulary, encoding="utf-8", newline="\n")
        document = {
            "model_type": f"nemo-conformer-{head}",
            "features_size": config.preprocessor.features,
            "subsampling_factor": encoder.frame_factor,
        }
        if config.aed:
            document["max_sequence_length"] = config.aed.max_sequence_length
        else:
            document["max_tokens_per_step"] = config.max_symbols or 2**31 - 1
        (new / "config.json").write_text(json.dumps(document, indent=1) + "\n")
