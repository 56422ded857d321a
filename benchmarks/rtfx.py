"""How many times faster than real time a model transcribes, with peers beside it in the same run.

    python -m benchmarks.rtfx --model model.nemo --manifest test.jsonl --batch-sizes 1 16
    python -m benchmarks.rtfx --model random-110m --peer nemo=nemo-venv/bin/python

RTFx is what the Open ASR Leaderboard reports: seconds of audio over seconds of work, all clips
together, after a warm-up. It is measured twice: with the samples in memory, and from files
(reading, decoding and resampling included). Beside it: where our time goes (features, encoder,
decoding), the peak memory, and with a manifest that has texts, the WER.

`--model random-110m` and `random-0.6b` need no checkpoint: Parakeet's sizes with random weights,
whose TDT head is biased by bisection until it emits `--tokens-per-second` (random_model.py), so
that the decoder has a real model's work; the texts mean nothing, but equal weights must give equal
texts, which the table says.

Every engine is a process of its own with the same number of threads, and they take turns. Peers,
each with the Python of an environment that has it: `nemo` (the same archive), `nano-parakeet` (the
same weights in its modules; batches of 1 only; TDT), `transformers` (ParakeetForCTC of the same
sizes with weights of its own: compare with `--head ctc`), `onnx-asr` and `sherpa-onnx` (TDT; ONNX
files that NeMo, so `--peer nemo=` too, exports from the same archive, and for int8 onnxruntime's
dynamic quantization of every matrix product; their environments need onnx and onnxruntime beside
them). Peers run in float32 on a CPU, the two of ONNX also in int8 where `--dtypes` has it, and in
bfloat16 on a GPU.

The result goes to `--out` as JSON, with machine, versions and commit; `--plot FILE.svg` draws it.
"""

import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks import SPEECH, add_out, machine, versions, write_result
from benchmarks.random_model import SIZES, cut_clips, write_model
from benchmarks.workers import Worker
from fastconformer import cli
from fastconformer.audio.files import load_audio
from fastconformer.checkpoint.nemo_archive import write_nemo
from fastconformer.checkpoint.read import read_checkpoint
from fastconformer.formats.manifest import read_manifest
from fastconformer.text.metrics import word_errors

DTYPES = ("float32", "bfloat16", "float16", "int8")
PEERS = ("nemo", "nano-parakeet", "transformers", "onnx-asr", "sherpa-onnx")


def describe(path: Path) -> dict:
    """The model's sizes; beside the archive, its weights and tokenizer as the peers take them."""
    import torch

    from fastconformer import ModelConfig
    from fastconformer.checkpoint.read import read_checkpoint

    checkpoint = read_checkpoint(path)
    config = ModelConfig.from_nemo(checkpoint.config)
    sizes = {
        "layers": config.encoder.n_layers,
        "width": config.encoder.d_model,
        "mels": config.preprocessor.features,
        "lstm_layers": config.decoder.pred_rnn_layers if config.joint else 0,
        "vocabulary": config.vocab_size,
        "parameters": sum(t.numel() for t in checkpoint.state_dict.values()),
    }
    path.with_suffix(".sizes.json").write_text(json.dumps(sizes))
    weights = {k: v.float() for k, v in checkpoint.state_dict.items()}
    torch.save({"weights": weights, "sizes": sizes}, path.with_suffix(".weights.pt"))
    tokenizer = checkpoint.tokenizer_files.get("tokenizer.model", b"")
    path.with_suffix(".tokenizer").write_bytes(tokenizer)
    return sizes


def read_clips(arguments) -> tuple[list, list[str | None]]:
    """Samples at 16 kHz and reference texts."""
    if arguments.manifest is None:
        count, shortest_s, longest_s = arguments.clip_count, arguments.shortest, arguments.longest
        clips = cut_clips(arguments.audio or SPEECH, count, shortest_s, longest_s)
        return clips, [None] * len(clips)
    found, _ = read_manifest(arguments.manifest, arguments.lang)
    found = found[: arguments.clip_count]
    clips = [load_audio(c.path, 16000, c.offset_s or 0.0, c.duration_s) for c in found]
    return clips, [c.text for c in found]


def prepare_model(folder: Path, arguments, clips) -> Path:
    """The archive that all engines load; a random one is kept from the run before."""
    model = folder / "model.nemo"
    if arguments.model not in SIZES:
        write_nemo(model, read_checkpoint(arguments.model))
    elif not model.exists():
        write_model(model, clips[:4], arguments.tokens_per_second, SIZES[arguments.model])
    return model


def prepare_onnx(model: Path, arguments) -> None:
    """Exports and quantizes the model where a peer needs it and it has not been done."""
    peers = [name for name in arguments.peers if "onnx" in name]
    folder = model.with_suffix(".onnx")
    if not peers or (folder / "sherpa_encoder.int8.onnx").exists():
        return
    folder.mkdir(exist_ok=True)
    for step, peer in (("export", "nemo"), ("quantize", peers[0])):
        words, python = [step, str(model)], arguments.peers[peer]
        worker = Worker(step, python, "benchmarks.onnx_engines", words, arguments.threads)
        try:
            worker.answer()
        finally:
            worker.close()


def engines_of(arguments) -> list[tuple[str, str]]:
    """(name:dtype, its Python) of every engine, ours first."""
    found = [(f"ours:{dtype}", sys.executable) for dtype in arguments.dtypes]
    for name, python in arguments.peers.items():
        dtypes = ["float32"] if arguments.device == "cpu" else ["bfloat16"]
        if "onnx" in name:
            dtypes = [dtype for dtype in arguments.dtypes if dtype in ("float32", "int8")]
        found += [(f"{name}:{dtype}", python) for dtype in dtypes]
    return found


def measure(workers: dict, arguments, audio_s: float, references) -> list[dict]:
    """A row for every engine and batch size: RTFx from memory and from files, ratios, WER."""
    rows, first = [], next(iter(workers))
    for batch_size in arguments.batch_sizes:
        engines = [e for e in workers if batch_size == 1 or not e.startswith("nano-parakeet")]
        texts = {e: workers[e].ask("memory", batch_size)["texts"] for e in engines}  # warm-up
        seconds = {(e, what): [] for e in engines for what in ("memory", "files")}
        peak = dict.fromkeys(engines, 0.0)
        for i in range(arguments.rounds):
            for what in ("memory", "files"):
                for engine in engines if i % 2 == 0 else engines[::-1]:
                    answer = workers[engine].ask(what, batch_size)
                    seconds[engine, what].append(answer["seconds"])
                    of_gpu, of_process = answer.get("peak_mib"), workers[engine].peak_bytes()
                    peak[engine] = max(peak[engine], of_gpu or of_process / 2**20)
        for engine in engines:
            row = {"engine": engine, "batch_size": batch_size}
            for what in ("memory", "files"):
                row[f"rtfx_{what}"] = round(audio_s / statistics.median(seconds[engine, what]), 1)
                pairs = zip(seconds[engine, what], seconds[first, what], strict=True)
                # of neighbours in time, so that drift cancels
                ratio = statistics.median(base / own for own, base in pairs)
                row[f"times_{first}_{what}"] = round(ratio, 3)
            row["peak_mib"] = round(peak[engine])
            if not engine.startswith("transformers"):
                same = [a == b for a, b in zip(texts[engine], texts[first], strict=True)]
                row[f"texts_as_{first}"] = f"{sum(same)}/{len(same)}"
            known = [i for i, reference in enumerate(references) if reference]
            if known and not engine.startswith("transformers"):
                said = [texts[engine][i] for i in known]
                row["wer"] = round(word_errors([references[i] for i in known], said).rate, 4)
            stages = workers[engine].ask("stages", batch_size)["stages"]
            row["stages_s"] = stages and {k: round(v, 4) for k, v in stages.items()}
            row["seconds"] = {what: seconds[engine, what] for what in ("memory", "files")}
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def _line(row: dict) -> str:
    stages = row["stages_s"] or {}
    total = sum(stages.values()) or 1
    parts = " ".join(f"{k} {v / total:.0%}" for k, v in stages.items())
    wer = f"  WER {row['wer']:.1%}" if "wer" in row else ""
    return (
        f"{row['engine']:24} batch {row['batch_size']:3}  RTFx {row['rtfx_memory']:8.1f} in memory"
        f" {row['rtfx_files']:8.1f} from files  peak {row['peak_mib']} MiB{wer}  {parts}"
    )


def plot(rows: list[dict], path: Path) -> None:
    """Bars of RTFx in memory, as an SVG."""
    widest = max(row["rtfx_memory"] for row in rows)
    lines, y = [], 20
    for row in rows:
        width = 400 * row["rtfx_memory"] / widest
        name = f"{row['engine']}, batch {row['batch_size']}"
        lines.append(f'<text x="5" y="{y + 12}">{name}</text>')
        lines.append(f'<rect x="210" y="{y}" width="{width:.1f}" height="15" fill="#3a7"/>')
        lines.append(f'<text x="{215 + width:.1f}" y="{y + 12}">{row["rtfx_memory"]}</text>')
        y += 22
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="700" height="{y + 10}"'
    head += ' font-family="sans-serif" font-size="12">\n<text x="5" y="14">RTFx in memory</text>'
    path.write_text("\n".join([head, *lines, "</svg>\n"]))


def parse_arguments(argv=None):
    parser = cli.parser(
        "benchmarks.rtfx",
        __doc__.split("\n\n")[0],
        "--model models/base_tiny.nemo --manifest samples/english.jsonl --batch-sizes 1 16",
    )
    parser.add_argument(
        "--model", required=True, help=f".nemo, folder, {' or '.join(SIZES)} (random weights)"
    )
    parser.add_argument("--manifest", type=Path, help="clips, with texts for the WER")
    parser.add_argument("--lang", help="of the manifest's lines")
    parser.add_argument("--audio", type=Path, help="or pieces of this (samples/talk.ogg)")
    parser.add_argument("--clip-count", type=int, default=16)
    parser.add_argument("--shortest", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument("--longest", type=float, default=25.0, metavar="SECONDS")
    parser.add_argument("--head", choices=["tdt", "rnnt", "ctc"], help="the model's first")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens-per-second", type=float, default=4.0)
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON", help=", ".join(PEERS)
    )
    parser.add_argument(
        "--folder", type=Path, help="keeps the random model and its exports here, for the next run"
    )
    add_out(parser, "rtfx")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    arguments = parser.parse_args(argv)
    counts = (arguments.clip_count, arguments.threads, arguments.rounds, *arguments.batch_sizes)
    if min(counts) < 1:
        parser.error("--clip-count, --threads, --rounds and --batch-sizes are at least 1")
    audio = arguments.audio or SPEECH
    if arguments.manifest is None and not audio.is_file():
        parser.error(f"{audio} does not exist; name a recording with --audio, or a --manifest")
    if arguments.manifest and arguments.audio:
        parser.error("--audio and --manifest are two ways to name the clips; give one")
    arguments.peers = dict(peer.partition("=")[::2] for peer in arguments.peer)
    for name, python in arguments.peers.items():
        if name not in PEERS or not python:
            parser.error(
                f"--peer {name}={python}: expected one of {', '.join(PEERS)}, = and a Python"
            )
    if any("onnx" in name for name in arguments.peers) and "nemo" not in arguments.peers:
        parser.error("onnx-asr and sherpa-onnx need --peer nemo= too, which exports the model")
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    return arguments


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    return cli.run("rtfx", lambda: run(arguments))


def run(arguments) -> int:
    import numpy as np
    import soundfile
    import torch

    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device is {arguments.device}, but this torch sees no GPU")
    torch.set_num_threads(arguments.threads)
    clips, references = read_clips(arguments)
    audio_s = sum(len(c) for c in clips) / 16000
    with contextlib.ExitStack() as stack:
        folder = Path(arguments.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        model = prepare_model(folder, arguments, clips)
        sizes = describe(model)
        np.savez(folder / "clips.npz", **{f"{i:05d}": clip for i, clip in enumerate(clips)})
        paths = [str(folder / f"{i:05d}.flac") for i in range(len(clips))]
        for path, clip in zip(paths, clips, strict=True):
            soundfile.write(path, clip, 16000)
        task = {"model": str(model), "clips": str(folder / "clips.npz"), "paths": paths}
        task |= {key: getattr(arguments, key) for key in ("device", "head", "threads")}
        (folder / "work.json").write_text(json.dumps(task))
        prepare_onnx(model, arguments)
        workers = {}
        for engine, python in engines_of(arguments):
            words = [str(folder / "work.json"), engine]
            worker = Worker(engine, python, "benchmarks.engines", words, arguments.threads)
            stack.callback(worker.close)
            worker.answer()  # it is ready
            workers[engine] = worker
        rows = measure(workers, arguments, audio_s, references)
    result = {
        "machine": machine(),
        "versions": versions(),
        "model": arguments.model if arguments.model in SIZES else Path(arguments.model).name,
        "sizes": sizes,
        "head": arguments.head or "default",
        "threads": arguments.threads,
        "clips": len(clips),
        "audio_s": round(audio_s, 1),
        "rows": rows,
    }
    if torch.cuda.is_available():
        result["machine"]["gpu"] = torch.cuda.get_device_name()
    write_result(arguments.out, result)
    if arguments.plot:
        plot(rows, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
