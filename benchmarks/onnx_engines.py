"""onnx-asr and sherpa-onnx as engines, and the ONNX files that they take.

    python -m benchmarks.onnx_engines export MODEL.nemo       with NeMo's Python
    python -m benchmarks.onnx_engines quantize MODEL.nemo     with onnxruntime's

The files lie in MODEL.onnx/.
"""

import json
import os
import sys
from pathlib import Path

from benchmarks.workers import reply


def onnx_asr_engine(model_path, dtype, device, head):
    import onnx_asr
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    model = onnx_asr.load_model(
        "nemo-conformer-tdt",
        Path(model_path).with_suffix(".onnx"),
        quantization="int8" if dtype == "int8" else None,
        sess_options=options,
        providers=["CPUExecutionProvider"],
    )

    def transcribe(inputs, batch_size):
        texts = []
        for first in range(0, len(inputs), batch_size):
            texts += model.recognize(inputs[first : first + batch_size])
        return texts

    def from_files(paths, batch_size):
        import soundfile

        return transcribe([soundfile.read(p, dtype="float32")[0] for p in paths], batch_size)

    return transcribe, from_files, None


def sherpa_engine(model_path, dtype, device, head):
    import sherpa_onnx
    import soundfile

    folder = Path(model_path).with_suffix(".onnx")
    names = ("sherpa_encoder", "sherpa_decoder", "sherpa_joiner")
    suffix = ".int8.onnx" if dtype == "int8" else ".onnx"
    encoder, decoder, joiner = (str(folder / f"{name}{suffix}") for name in names)
    recognizer = sherpa_onnx.OfflineRecognizer.from_transducer(
        encoder=encoder,
        decoder=decoder,
        joiner=joiner,
        tokens=str(folder / "vocab.txt"),
        num_threads=int(os.environ["OMP_NUM_THREADS"]),
        feature_dim=json.loads((folder / "config.json").read_text())["features_size"],
        model_type="nemo_transducer",
    )

    def from_memory(clips, batch_size):
        texts = []
        for first in range(0, len(clips), batch_size):
            streams = [recognizer.create_stream() for _ in clips[first : first + batch_size]]
            for stream, clip in zip(streams, clips[first:], strict=False):
                stream.accept_waveform(16000, clip)
            recognizer.decode_streams(streams)
            texts += [stream.result.text.strip() for stream in streams]
        return texts

    def from_files(paths, batch_size):
        return from_memory([soundfile.read(p, dtype="float32")[0] for p in paths], batch_size)

    return from_memory, from_files, None


def export_onnx(model_path: str, folder: Path) -> None:
    """Writes what onnx-asr and sherpa-onnx take, with real NeMo: the encoder, the decoder with the
    joint (and each alone, for sherpa-onnx), tokens and sizes."""
    from nemo.collections.asr.models import ASRModel

    model = ASRModel.restore_from(model_path, map_location="cpu").eval()
    model.export(str(folder / "model.onnx"))
    model.decoder.export(str(folder / "sherpa_decoder.onnx"))
    model.joint.export(str(folder / "sherpa_joiner.onnx"))
    tokens = [*model.tokenizer.vocab, "<blk>"]
    lines = "".join(f"{token} {i}\n" for i, token in enumerate(tokens))
    (folder / "vocab.txt").write_text(lines, encoding="utf-8")
    sizes = {
        "model_type": "nemo-conformer-tdt",
        "features_size": model.cfg.preprocessor.features,
        "subsampling_factor": model.cfg.encoder.subsampling_factor,
        "max_tokens_per_step": 10,
        "normalize_type": model.cfg.preprocessor.normalize,
        "vocab_size": model.decoder.vocab_size,
        "pred_rnn_layers": model.decoder.pred_rnn_layers,
        "pred_hidden": model.decoder.pred_hidden,
    }
    (folder / "config.json").write_text(json.dumps(sizes))


def quantize_onnx(folder: Path) -> None:
    """int8 beside every exported file, and sherpa-onnx's encoder, which wants the sizes inside.

    Signed weights of matrix products only: convolutions too, as sherpa-onnx's scripts do it, took
    onnxruntime 1.5 times as long.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for name in ("encoder-model", "decoder_joint-model", "sherpa_decoder", "sherpa_joiner"):
        quantize_dynamic(
            folder / f"{name}.onnx",
            folder / f"{name}.int8.onnx",
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"] if name == "encoder-model" else None,
        )
    config = json.loads((folder / "config.json").read_text())
    about = config | {"model_type": "EncDecRNNTBPEModel", "feat_dim": config["features_size"]}
    about["url"] = "tdt"  # by which sherpa-onnx tells TDT from RNNT
    for suffix in (".onnx", ".int8.onnx"):
        encoder = onnx.load(str(folder / f"encoder-model{suffix}"))
        for key, value in about.items():
            encoder.metadata_props.add(key=key, value=str(value))
        onnx.save(encoder, str(folder / f"sherpa_encoder{suffix}"))


if __name__ == "__main__":
    step, model_path = sys.argv[1:]
    if step == "export":
        export_onnx(model_path, Path(model_path).with_suffix(".onnx"))
    else:
        quantize_onnx(Path(model_path).with_suffix(".onnx"))
    reply(done=step)
