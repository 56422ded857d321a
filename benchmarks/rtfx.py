"""How many times faster than real time a model transcribes, with peers beside it in the same run.

    python -m benchmarks.rtfx --model model.nemo --manifest test.jsonl --batch-sizes 1 16
    python -m benchmarks.rtfx --model random-110m --peer nemo=nemo-venv/bin/python

RTFx is what the Open ASR Leaderboard reports: seconds of audio over seconds of work, all clips
together, after a warm-up. It is measured twice: with the samples in memory, and from files
(reading, decoding and resampling included). Beside it: where our time goes (features, encoder,
decoding), the peak memory, and with a manifest that has texts, the WER.

`--model random-110m` and `random-0.6b` need no checkpoint: Parakeet's sizes with random weights,
whose TDT head is biased by bisection until it emits `--tokens-per-second` (see `cpu_vs_nemo`), so
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

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from benchmarks import commit
from benchmarks import cpu_vs_nemo as common

DTYPES = ("float32", "bfloat16", "float16", "int8")
PEERS = ("nemo", "nano-parakeet", "transformers", "onnx-asr", "sherpa-onnx")
SIZES = {"random-110m": (17, 512, 80, 1), "random-0.6b": (24, 1024, 128, 2)}


# ---- in the workers


def our_engine(model_path, dtype, device, head):
    """(samples, batch_size) -> texts, (paths, batch_size) -> texts, stages."""
    import torch

    import fastconformer
    from fastconformer.formats.inputs import find_clips
    from fastconformer.jobs.rounds import transcribe_clips

    model = fastconformer.load_model(model_path, device, getattr(torch, dtype))

    def from_memory(clips, batch_size):
        return [t.text for t in model.transcribe(clips, head, batch_size)]

    def from_files(paths, batch_size):
        clips = find_clips(paths).clips
        return [t.text for _, t, _ in transcribe_clips(model, clips, head, batch_size)]

    def now():
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def stages(clips, batch_size):
        seconds = {"features": 0.0, "encoder": 0.0, "decoding": 0.0}
        order = sorted(clips, key=len, reverse=True)
        for first in range(0, len(order), batch_size):
            batch = [torch.from_numpy(c) for c in order[first : first + batch_size]]
            audio = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(device)
            lengths = torch.tensor([len(c) for c in batch], device=device)

            with torch.inference_mode():
                times = [now()]
                features, frames = model.featurize(audio, lengths)
                times.append(now())
                encoded, frames = model.encode(features, frames)
                times.append(now())
                model.decode_greedy(encoded, frames, head)
                times.append(now())
            for stage, (start, end) in zip(seconds, pairwise(times), strict=True):
                seconds[stage] += end - start
        return seconds

    return from_memory, from_files, stages


def nemo_engine(model_path, dtype, device, head):
    import logging

    import torch
    from nemo.collections.asr.models import ASRModel
    from nemo.utils import logging as nemo_logging
    from omegaconf import open_dict

    nemo_logging.setLevel(logging.ERROR)
    model = ASRModel.restore_from(model_path, map_location=device).eval()
    with open_dict(model.cfg):  # its transcription of files asks this section
        model.cfg.validation_ds = model.cfg.get("validation_ds") or {"use_start_end_token": False}
    if head == "ctc":
        model.change_decoding_strategy(decoder_type="ctc", verbose=False)
    kind = getattr(torch, dtype)

    def transcribe(inputs, batch_size):
        with torch.autocast(torch.device(device).type, kind, enabled=kind != torch.float32):
            found = model.transcribe(inputs, batch_size=batch_size, verbose=False)
        found = found[0] if isinstance(found, tuple) else found
        return [getattr(h, "text", h) for h in found]

    return transcribe, transcribe, None


def nano_engine(model_path, dtype, device, head):
    import numpy as np
    import sentencepiece
    import soundfile
    import torch
    from nano_parakeet._loader import remap_state_dict
    from nano_parakeet.model import FastConformerEncoder, ParakeetTDT, RNNTDecoder, TDTJoint

    archive = torch.load(Path(model_path).with_suffix(".weights.pt"), weights_only=True)
    weights, sizes = archive["weights"], archive["sizes"]
    model = ParakeetTDT()  # its sizes are fixed, so its parts are made again in the model's
    layers, width, mels, lstm_layers, vocabulary = (
        sizes[k] for k in ("layers", "width", "mels", "lstm_layers", "vocabulary")
    )
    model.preprocessor.register_buffer("fb", torch.zeros(1, mels, 257))
    model.encoder = FastConformerEncoder(width, layers, 8, 4 * width, mels)
    model.decoder = RNNTDecoder(vocabulary, 640, lstm_layers)
    model.joint = TDTJoint(width, 640, 640, vocabulary)
    model.BLANK_ID = model.VOCAB_SIZE = vocabulary
    missing, _ = model.load_state_dict(remap_state_dict(weights), strict=False)
    if missing:
        raise SystemExit(f"nano-parakeet lacks {missing[:5]}")
    model = model.to(device).eval()
    if dtype != "float32":
        for part in (model.encoder, model.decoder, model.joint):
            part.to(getattr(torch, dtype))
    pieces = sentencepiece.SentencePieceProcessor(
        model_proto=Path(model_path).with_suffix(".tokenizer").read_bytes()
    )

    def from_memory(clips, batch_size):
        texts = []
        for clip in clips:
            clip = np.pad(clip, max(0, 16000 - len(clip)) // 2)
            texts.append(pieces.decode(model.transcribe_audio(torch.from_numpy(clip))))
        return texts

    def from_files(paths, batch_size):
        return from_memory([soundfile.read(p, dtype="float32")[0] for p in paths], 1)

    return from_memory, from_files, None


def transformers_engine(model_path, dtype, device, head):
    import soundfile
    import torch
    from transformers import ParakeetCTCConfig, ParakeetFeatureExtractor, ParakeetForCTC

    sizes = json.loads(Path(model_path).with_suffix(".sizes.json").read_text())
    torch.manual_seed(1)
    encoder = {
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "intermediate_size": 4 * sizes["width"],
        "num_mel_bins": sizes["mels"],
        "scale_input": False,
        "attention_bias": True,
    }
    blank = sizes["vocabulary"]
    config = ParakeetCTCConfig(vocab_size=blank + 1, pad_token_id=blank, encoder_config=encoder)
    model = ParakeetForCTC(config).to(device, getattr(torch, dtype)).eval()
    extract = ParakeetFeatureExtractor(feature_size=sizes["mels"])

    def from_memory(clips, batch_size):
        texts = []
        order = sorted(clips, key=len, reverse=True)
        for first in range(0, len(order), batch_size):
            inputs = extract(
                order[first : first + batch_size], sampling_rate=16000, return_tensors="pt"
            ).to(device)
            features = inputs["input_features"].to(model.dtype)
            with torch.inference_mode():
                logits = model(features, attention_mask=inputs["attention_mask"]).logits
            for row in logits.argmax(-1):
                ids = torch.unique_consecutive(row)
                texts.append(" ".join(map(str, ids[ids != blank].tolist())))
        return texts

    def from_files(paths, batch_size):
        return from_memory([soundfile.read(p, dtype="float32")[0] for p in paths], batch_size)

    return from_memory, from_files, None


def onnx_asr_engine(model_path, dtype, device, head):
    import onnx_asr
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(common.os.environ["OMP_NUM_THREADS"])
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
        num_threads=int(common.os.environ["OMP_NUM_THREADS"]),
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


ENGINES = {
    "nano-parakeet": nano_engine,
    "nemo": nemo_engine,
    "onnx-asr": onnx_asr_engine,
    "sherpa-onnx": sherpa_engine,
    "transformers": transformers_engine,
}


def work(arguments) -> None:
    """A worker's life: loads its engine, then answers `memory N`, `files N` and `stages N`; or
    exports the model for onnxruntime, or quantizes the export, and is done."""
    import numpy as np

    task = json.loads(Path(arguments.work).read_text())
    clips = list(np.load(task["clips"]).values())
    if arguments.engine in ("export", "quantize"):
        folder = Path(task["model"]).with_suffix(".onnx")
        if arguments.engine == "export":
            export_onnx(task["model"], folder)
        else:
            quantize_onnx(folder)
        common.reply(load_s=0.0)
        return
    name, dtype = arguments.engine.rsplit(":", 1)
    on_gpu = arguments.device != "cpu"
    if "onnx" not in name:  # whose environments need not have torch
        import torch

        torch.set_num_threads(arguments.threads)
    make = ENGINES.get(name, our_engine)
    started = time.perf_counter()
    memory, files, stages = make(task["model"], dtype, arguments.device, arguments.head)
    common.reply(load_s=time.perf_counter() - started)
    for line in sys.stdin:
        what, batch_size = line.split()
        if what == "stages":
            common.reply(stages=stages(clips, int(batch_size)) if stages else None)
            continue
        inputs = clips if what == "memory" else task["paths"]
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        texts = (memory if what == "memory" else files)(inputs, int(batch_size))
        seconds = time.perf_counter() - start
        peak = common.status_kib("VmHWM") / 1024
        if on_gpu:
            peak = torch.cuda.max_memory_allocated() / 2**20
        common.reply(seconds=seconds, texts=texts, peak_mib=peak)


# ---- in the parent


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
    from fastconformer.audio.files import load_audio
    from fastconformer.formats.manifest import read_manifest

    if arguments.manifest is None:
        clips = common.cut_clips(
            arguments.audio, arguments.clip_count, arguments.shortest, arguments.longest
        )
        return clips, [None] * len(clips)
    found, _ = read_manifest(arguments.manifest, arguments.lang)
    found = found[: arguments.clip_count]
    clips = [load_audio(c.path, 16000, c.offset_s or 0.0, c.duration_s) for c in found]
    return clips, [c.text for c in found]


class Worker:
    """An engine in a process of its own."""

    def __init__(self, engine: str, python: str, arguments, work_file: Path):
        command = [python, "-m", "benchmarks.rtfx", "--work", str(work_file), "--engine", engine]
        command += ["--threads", str(arguments.threads), "--device", arguments.device]
        command += ["--head", arguments.head] if arguments.head else []
        self.engine, self.log = engine, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=common.REPOSITORY,
            env=common.os.environ
            | {k: str(arguments.threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
        )
        self.load_s = self.answer()["load_s"]

    def answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith(common.REPLY):
                return json.loads(line[len(common.REPLY) :])
        self.log.seek(0)
        lines = self.log.read().split("\n")
        reason = next((line for line in reversed(lines) if line.strip()), "it ended without a word")
        raise SystemExit(f"rtfx: {self.engine} failed: {reason}")

    def ask(self, what: str, batch_size: int) -> dict:
        self.process.stdin.write(f"{what} {batch_size}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def prepare_model(folder: Path, arguments, clips) -> Path:
    """The archive that all engines load; a random one is kept from the run before."""
    model = folder / "model.nemo"
    if arguments.model not in SIZES:
        from fastconformer.checkpoint.nemo_archive import write_nemo
        from fastconformer.checkpoint.read import read_checkpoint

        write_nemo(model, read_checkpoint(arguments.model))
    elif not model.exists():
        rate = arguments.tokens_per_second
        common.write_model(model, common.TOKENIZER, clips[:4], rate, *SIZES[arguments.model])
    return model


def prepare_onnx(model: Path, arguments, work_file: Path) -> None:
    """Exports and quantizes the model where a peer needs it and it has not been done."""
    peers = [name for name in arguments.peers if "onnx" in name]
    folder = model.with_suffix(".onnx")
    if not peers or (folder / "sherpa_encoder.int8.onnx").exists():
        return
    folder.mkdir(exist_ok=True)
    for step, python in (
        ("export", arguments.peers["nemo"]),
        ("quantize", arguments.peers[peers[0]]),
    ):
        Worker(step, python, arguments, work_file).close()


def engines(arguments) -> list[tuple[str, str]]:
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
    from fastconformer.text.metrics import word_errors

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
                    peak[engine] = max(peak[engine], answer["peak_mib"])
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


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rtfx",
        description=__doc__.split("\n\n")[0],
        epilog="example: python -m benchmarks.rtfx --model model.nemo --manifest test.jsonl "
        "--dtypes float32 bfloat16 --batch-sizes 1 16",
    )
    parser.add_argument("--model", help=".nemo, folder, random-110m or random-0.6b")
    parser.add_argument("--manifest", type=Path, help="clips, with texts for the WER")
    parser.add_argument("--lang", help="of the manifest's lines")
    parser.add_argument("--audio", type=Path, default=common.SPEECH, help="or pieces of this")
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
    parser.add_argument("--out", type=Path, default=common.RESULTS / "rtfx.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.work and not arguments.model:
        parser.error("--model is needed")
    counts = (arguments.clip_count, arguments.threads, arguments.rounds, *arguments.batch_sizes)
    if min(counts) < 1:
        parser.error("--clip-count, --threads, --rounds and --batch-sizes are at least 1")
    if not arguments.work and arguments.manifest is None and not arguments.audio.is_file():
        parser.error(
            f"{arguments.audio} does not exist; name a recording with --audio, or a --manifest"
        )
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
    if arguments.work:
        work(arguments)
        return 0
    import numpy as np
    import soundfile
    import torch

    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"rtfx: --device is {arguments.device}, but this torch sees no GPU", file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    try:
        clips, references = read_clips(arguments)
    except (OSError, ValueError) as error:
        print(f"rtfx: {error}", file=sys.stderr)
        return 1
    audio_s = sum(len(c) for c in clips) / 16000
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory())
        folder = Path(folder)
        try:
            model = prepare_model(folder, arguments, clips)
            sizes = describe(model)
        except (OSError, ValueError) as error:
            print(f"rtfx: {error}", file=sys.stderr)
            return 1
        np.savez(folder / "clips.npz", **{f"{i:05d}": clip for i, clip in enumerate(clips)})
        paths = [str(folder / f"{i:05d}.flac") for i in range(len(clips))]
        for path, clip in zip(paths, clips, strict=True):
            soundfile.write(path, clip, 16000)
        work_file = folder / "work.json"
        task = {"model": str(model), "clips": str(folder / "clips.npz"), "paths": paths}
        work_file.write_text(json.dumps(task))
        prepare_onnx(model, arguments, work_file)
        workers = {}
        try:
            for engine, python in engines(arguments):
                workers[engine] = Worker(engine, python, arguments, work_file)
            rows = measure(workers, arguments, audio_s, references)
        finally:
            for worker in workers.values():
                worker.close()
    machine = common.machine()
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    result = {
        "machine": machine,
        "versions": {"torch": torch.__version__, "commit": commit()},
        "model": arguments.model if arguments.model in SIZES else Path(arguments.model).name,
        "sizes": sizes,
        "head": arguments.head or "default",
        "threads": arguments.threads,
        "clips": len(clips),
        "audio_s": round(audio_s, 1),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)
    print(f"{arguments.out} has the seconds of every round")
    return 0


if __name__ == "__main__":
    sys.exit(main())
