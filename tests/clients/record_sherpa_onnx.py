"""Exports models with NeMo itself, in sherpa-onnx's layout: what our own exports are held against.

    python record_sherpa_onnx.py export MODEL.nemo FOLDER      in an environment with NeMo
    python record_sherpa_onnx.py texts NAME=FOLDER ... AUDIO ... > sherpa_onnx_of_nemo.json
                                                                in one with sherpa-onnx

Imports nothing of this project. The metadata are those of sherpa-onnx's own scripts/nemo.
"""

import json
import sys
from pathlib import Path


def export(archive: str, folder: Path) -> None:
    """encoder, decoder and joiner in FOLDER/transducer, model.onnx in FOLDER/ctc."""
    import onnx
    import torch
    from nemo.collections.asr.models import ASRModel

    legacy = torch.onnx.export
    torch.onnx.export = lambda *a, **k: legacy(*a, **{**k, "dynamo": False})
    model = ASRModel.restore_from(archive, map_location="cpu").eval()
    normalize = model.cfg.preprocessor.normalize
    metadata = {
        "vocab_size": model.tokenizer.vocab_size,
        "normalize_type": "" if normalize == "NA" else normalize,
        "subsampling_factor": model.cfg.encoder.subsampling_factor,
        "feat_dim": model.cfg.preprocessor.features,
        "is_giga_am": 0,
        "version": "1",
        "model_author": "NeMo",
        "comment": "exported by NeMo itself",
    }
    tokens = model.tokenizer.ids_to_tokens(list(range(model.tokenizer.vocab_size)))
    lines = "".join(f"{piece} {i}\n" for i, piece in enumerate([*tokens, "<blk>"]))

    stream, encoder = {}, model.encoder
    if model.cfg.encoder.get("att_context_style") == "chunked_limited":
        encoder.set_default_att_context_size(list(encoder.att_context_size_all[0]))
        encoder.setup_streaming_params()
        cfg = encoder.streaming_cfg
        shapes = [cache.shape for cache in encoder.get_initial_cache_state(batch_size=1)[:2]]
        stream["window_size"] = cfg.chunk_size[1] + cfg.pre_encode_cache_size[1]
        stream["chunk_shift"] = cfg.shift_size[1]
        for name, (layers, _, first, second) in zip(("channel", "time"), shapes):
            for i, size in enumerate((layers, first, second)):
                stream[f"cache_last_{name}_dim{i + 1}"] = size
        model.set_export_config({"cache_support": True})

    def annotate(path: Path, more: dict) -> None:
        document = onnx.load(path)
        for key, value in {**metadata, **stream, **more}.items():
            document.metadata_props.add(key=key, value=str(value))
        onnx.save(document, path)

    if hasattr(model, "joint"):
        target = folder / "transducer"
        target.mkdir(parents=True)
        model.encoder.export(str(target / "encoder.onnx"))
        model.decoder.export(str(target / "decoder.onnx"))
        model.joint.export(str(target / "joiner.onnx"))
        is_tdt = bool(model.cfg.joint.get("num_extra_outputs"))
        more = {
            "pred_rnn_layers": model.cfg.decoder.prednet.pred_rnn_layers,
            "pred_hidden": model.cfg.decoder.prednet.pred_hidden,
            "model_type": "EncDecRNNTBPEModel",
            "url": f"https://huggingface.co/nvidia {'tdt' if is_tdt else 'rnnt'}",
        }
        annotate(target / "encoder.onnx", more)
        (target / "tokens.txt").write_text(lines)
    is_hybrid = hasattr(model, "ctc_decoder")
    if is_hybrid or not hasattr(model, "joint"):
        target = folder / "ctc"
        target.mkdir(parents=True)
        if is_hybrid:
            model.set_export_config({"decoder_type": "ctc", "cache_support": bool(stream)})
        model.export(str(target / "model.onnx"))
        more = {"model_type": "EncDecCTCModelBPE", "url": "https://huggingface.co/nvidia"}
        annotate(target / "model.onnx", more)
        (target / "tokens.txt").write_text(lines)


def texts(folder: Path, audio: list[str]) -> dict:
    """What sherpa-onnx says of each file, by the file's name."""
    import onnx
    import sherpa_onnx
    import soundfile

    is_ctc = (folder / "model.onnx").exists()
    first = folder / ("model.onnx" if is_ctc else "encoder.onnx")
    metadata = {p.key: p.value for p in onnx.load(first).metadata_props}
    common = {"tokens": str(folder / "tokens.txt"), "feature_dim": int(metadata["feat_dim"])}
    online = "window_size" in metadata
    kind = sherpa_onnx.OnlineRecognizer if online else sherpa_onnx.OfflineRecognizer
    if is_ctc:
        client = kind.from_nemo_ctc(model=str(first), **common)
    else:
        parts = {name: str(folder / f"{name}.onnx") for name in ("encoder", "decoder", "joiner")}
        if not online:
            common["model_type"] = "nemo_transducer"
        client = kind.from_transducer(**parts, **common)
    found = {}
    for path in audio:
        samples, rate = soundfile.read(path, dtype="float32")
        stream = client.create_stream()
        stream.accept_waveform(rate, samples)
        if online:
            stream.accept_waveform(rate, [0.0] * rate)  # the last windows need it behind them
            stream.input_finished()
            while client.is_ready(stream):
                client.decode_stream(stream)
            found[Path(path).name] = client.get_result(stream)
        else:
            client.decode_stream(stream)
            found[Path(path).name] = stream.result.text
    return found


if __name__ == "__main__":
    if sys.argv[1] == "export":
        export(sys.argv[2], Path(sys.argv[3]))
    else:
        named = dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)
        audio = [word for word in sys.argv[2:] if "=" not in word]
        found = {name: texts(Path(folder), audio) for name, folder in named.items()}
        print(json.dumps(found, ensure_ascii=False, indent=0))
