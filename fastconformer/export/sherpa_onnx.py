"""The folders that sherpa-onnx loads: files, metadata, vocabulary, and what it cannot run.

Source: sherpa-onnx 2.0.1. It reads what it needs from the files' metadata, and ends the process
where a key is missing or wrong, so nothing here is left out. Its features are Kaldi's, whatever
the model was trained with: its texts can differ from ours with any export, NeMo's own included.
"""

import json
from pathlib import Path

from ..checkpoint.files import filled_folder
from ..config import ModelConfig
from ..model import ASRModel
from .client import check_front_end, check_heads, vocabulary_lines
from .graphs import ctc_graph, decoder_graph, encoder_graph, joiner_graph
from .onnx_files import require_packages, write_graph
from .streaming import streaming_ctc_graph, streaming_encoder_graph, windows_of

_TRANSDUCER = {"encoder": encoder_graph, "decoder": decoder_graph, "joiner": joiner_graph}
# By the head's family: the graphs, and the class that sherpa-onnx tells the kind by.
GRAPHS = {"ctc": {"model": ctc_graph}, "transducer": _TRANSDUCER}
ONLINE_GRAPHS = {
    "ctc": {"model": streaming_ctc_graph},
    "transducer": {**_TRANSDUCER, "encoder": streaming_encoder_graph},
}
CLASSES = {"ctc": "EncDecCTCModelBPE", "transducer": "EncDecRNNTBPEModel"}

FRONT_END = {"sample_rate": (16000,), "window_samples": (400,), "hop_samples": (160,)}
NORMALIZATIONS = {"per_feature": "per_feature", "NA": "", None: ""}


def is_online(config: ModelConfig) -> bool:
    """Whether the encoder is cache-aware, and so goes to sherpa-onnx's OnlineRecognizer."""
    try:
        windows_of(config.encoder)
    except ValueError:
        return False
    return True


def export(
    model: ASRModel, head: str, folder: Path, int8: bool = False, offline: bool = False
) -> None:
    """Writes the folder for one head: of a cache-aware encoder for the OnlineRecognizer, unless
    `offline`; of all others for the OfflineRecognizer.

    ValueError: sherpa-onnx cannot run it, with the reason; nothing is written then.
    """
    require_packages()
    family = model.head(head).family
    if family not in GRAPHS:
        raise ValueError(f"sherpa-onnx takes heads of {' and '.join(GRAPHS)}, {head} is none")
    config = model.config
    check_front_end("sherpa-onnx", config.preprocessor, FRONT_END)
    check_heads(config)
    vocabulary = vocabulary_lines(model)
    metadata = _metadata(config, head, CLASSES[family])
    online = is_online(config) and not offline
    if online:
        metadata |= _online_metadata(config)
        if family == "transducer" and config.prompts and config.prompts.are_several:
            metadata["prompt_dictionary"] = json.dumps(config.prompts.names)
            metadata["auto_prompt_id"] = config.prompts.index({})
    table = ONLINE_GRAPHS if online else GRAPHS
    graphs = {name: graph(model) for name, graph in table[family].items()}
    suffix = ".int8" if int8 else ""
    with filled_folder(folder) as new:
        for name, graph in graphs.items():
            write_graph(new / f"{name}{suffix}.onnx", graph, metadata, int8)
        (new / "tokens.txt").write_text(vocabulary, encoding="utf-8", newline="\n")
        (new / "bpe.vocab").write_text(_scores(model), encoding="utf-8", newline="\n")


def _metadata(config: ModelConfig, head: str, class_name: str) -> dict[str, str | int]:
    normalize = config.preprocessor.normalize
    if not isinstance(normalize, str | None) or normalize not in NORMALIZATIONS:
        raise ValueError(
            f"preprocessor.normalize is {normalize!r}; sherpa-onnx knows per_feature and NA (none)"
        )
    metadata = {
        "vocab_size": config.vocab_size,
        "subsampling_factor": config.encoder.frame_factor,
        "normalize_type": NORMALIZATIONS[normalize],
        "model_type": class_name,
        "feat_dim": config.preprocessor.features,
        "is_giga_am": 0,
        "version": 1,
        "model_author": "NeMo",
        "url": f"https://huggingface.co/nvidia {head}",  # "tdt" in it makes a transducer a TDT
        "comment": f"exported by fastconformer, head {head}",
    }
    if config.decoder:
        metadata["pred_rnn_layers"] = config.decoder.pred_rnn_layers
        metadata["pred_hidden"] = config.decoder.pred_hidden
    return metadata


def _online_metadata(config: ModelConfig) -> dict[str, int]:
    if NORMALIZATIONS[config.preprocessor.normalize]:
        raise ValueError(
            f"preprocessor.normalize is {config.preprocessor.normalize!r}: a stream has no whole "
            "clip to normalise by; with --offline it goes to the OfflineRecognizer"
        )
    windows = windows_of(config.encoder)
    sizes = {"window_size": windows.size, "chunk_shift": windows.shift}
    for name, shape in (("channel", windows.channel), ("time", windows.time)):
        sizes |= {f"cache_last_{name}_dim{i + 1}": n for i, n in enumerate(shape)}
    return sizes


def _scores(model: ASRModel) -> str:
    """ "piece<TAB>score", for hotwords; a character vocabulary's scores are all 0."""
    processor = getattr(model.tokenizer, "processor", None)
    score = processor.get_score if processor else lambda index: 0.0
    pieces = enumerate(model.tokenizer.pieces)
    return "".join(f"{piece}\t{score(index):g}\n" for index, piece in pieces)
