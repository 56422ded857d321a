"""Runs the client that an exported folder is for, beside our own transcription: which texts differ.

Needs the client itself: onnx-asr, sherpa-onnx or transformers.
"""

import importlib
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastconformer import cli

AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a")


@dataclass(frozen=True)
class Export:
    """`texts` takes clips (float32, 16 kHz) to what the client says of each."""

    client: str
    head: str
    texts: Callable[[list], list[str]]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = cli.parser(
        "converters.check_export",
        f"{__doc__} White space\napart every text should be the same, but with sherpa-onnx, which "
        "computes other features.",
        "parakeet-onnx --model parakeet.nemo --audio clips",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what st2onnx or st2hf wrote")
    parser.add_argument("--model", required=True, help="the model that was exported")
    parser.add_argument("--audio", type=Path, required=True, metavar="DIR", help="clips to try")
    parser.add_argument("--target-lang", metavar="NAME", help="what st2onnx was given")
    parser.add_argument("--int8", action="store_true", help="the folder's files of 8 bits")
    args = parser.parse_args(argv)
    rest = args.int8, args.target_lang
    return cli.run("check_export", lambda: check(args.folder, args.model, args.audio, *rest))


def check(
    folder: Path, model: str, audio: Path, int8: bool = False, target_lang: str | None = None
) -> None:
    """Prints each text that differs, and how many agree."""
    from fastconformer import load_model
    from fastconformer.audio.files import load_audio
    from fastconformer.surgery.language import with_language
    from fastconformer.text.metrics import word_errors

    export = read_export(folder, int8)
    paths = sorted(p for p in audio.rglob("*") if p.suffix.lower() in AUDIO)
    if not paths:
        raise ValueError(f"{audio} holds no audio ({', '.join(AUDIO)})")
    loaded = load_model(model)
    with cli.usage():
        loaded = with_language(loaded, target_lang)
    if export.head not in loaded.heads:
        raise ValueError(
            f"{folder} is of head {export.head!r}, {model} has {', '.join(loaded.heads)}"
        )
    clips = [load_audio(path, loaded.sample_rate) for path in paths]
    # clients put no silence around short clips, and do not try again where a head went silent
    found = loaded.transcribe(clips, head=export.head, min_duration_s=0.0, long="full", retry=False)
    ours = [transcript.text for transcript in found]
    theirs = export.texts(clips)
    differing = 0
    for path, our, their in zip(paths, ours, theirs, strict=True):
        if folded(our) != folded(their):
            differing += 1
            print(f"{path}\n  ours    {our}\n  {export.client} {their}")
    print(
        f"{export.client}, head {export.head}: {len(paths) - differing} of {len(paths)} texts are "
        f"ours; {word_errors(ours, theirs).rate:.2%} of our words are others"
    )


def folded(text: str) -> str:
    """Without white space: clients leave out doubled spaces, and those before marks."""
    return "".join(text.split())


def read_export(folder: Path, int8: bool = False) -> Export:
    """The client and the head that a folder was written for. ValueError: it is none."""
    if (folder / "tokens.txt").is_file():
        return _sherpa_onnx(folder, int8)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no folder of st2onnx or st2hf: {error}") from None
    kind = str(config.get("model_type", ""))
    if kind.startswith("nemo-conformer-"):
        return _onnx_asr(folder, kind.removeprefix("nemo-conformer-"), int8)
    if kind.startswith("parakeet"):
        if int8:
            raise cli.UsageError(f"--int8 is for ONNX files, {folder} is transformers'")
        return _transformers(folder, config)
    raise ValueError(f"{folder}/config.json: model_type is {kind!r}, of no client known here")


def _client(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"this needs the client itself: pip install {package}") from None


def _onnx_asr(folder: Path, head: str, int8: bool) -> Export:
    import torch

    onnx_asr = _client("onnx_asr", "onnx-asr[cpu]")
    options = _client("onnxruntime", "onnxruntime").SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # it does not read OMP_NUM_THREADS
    quantization = "int8" if int8 else None
    client = onnx_asr.load_model(
        f"nemo-conformer-{head}", folder, quantization=quantization, sess_options=options
    )
    return Export("onnx-asr", head, lambda clips: [client.recognize(clip) for clip in clips])


def _sherpa_onnx(folder: Path, int8: bool) -> Export:
    onnx, sherpa_onnx = _client("onnx", "onnx"), _client("sherpa_onnx", "sherpa-onnx")

    def file(name: str) -> Path:
        return folder / f"{name}{'.int8' if int8 else ''}.onnx"

    name = "model" if file("model").is_file() else "encoder"
    if not file(name).is_file():
        raise ValueError(f"{folder} holds no {file(name).name}")
    properties = onnx.load(file(name), load_external_data=False).metadata_props
    metadata = {item.key: item.value for item in properties}
    online = "window_size" in metadata
    kind = sherpa_onnx.OnlineRecognizer if online else sherpa_onnx.OfflineRecognizer
    common = {"tokens": str(folder / "tokens.txt"), "feature_dim": int(metadata["feat_dim"])}
    if name == "model":
        head = "ctc"
        client = kind.from_nemo_ctc(model=str(file(name)), **common)
    else:
        # the client's own rule: "tdt" in the address makes it one
        head = "rnnt" if metadata["url"].find("tdt") < 0 else "tdt"
        parts = {part: str(file(part)) for part in ("encoder", "decoder", "joiner")}
        if not online:
            common["model_type"] = "nemo_transducer"
        client = kind.from_transducer(**parts, **common)

    def text(clip) -> str:
        stream = client.create_stream()
        stream.accept_waveform(16000, clip)
        if not online:
            client.decode_stream(stream)
            return stream.result.text
        stream.accept_waveform(16000, [0.0] * 16000)  # the last windows need a second behind them
        stream.input_finished()
        while client.is_ready(stream):
            client.decode_stream(stream)
        return client.get_result(stream)

    return Export("sherpa-onnx", head, lambda clips: [text(clip) for clip in clips])


def _transformers(folder: Path, config: dict) -> Export:
    import torch

    transformers = _client("transformers", "transformers")
    client = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)

    @torch.no_grad()
    def text(clip) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the length that it works out by itself
            found = client.generate(**processor(clip, sampling_rate=16000))
        tokens = getattr(found, "sequences", found)
        return processor.batch_decode(tokens, skip_special_tokens=True)[0]

    head = config["model_type"].removeprefix("parakeet_")
    return Export("transformers", head, lambda clips: [text(clip) for clip in clips])


if __name__ == "__main__":
    sys.exit(main())
