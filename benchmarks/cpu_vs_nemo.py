"""Transcription on CPU, ours against real NeMo: one model, one machine, one run.

    python -m benchmarks.cpu_vs_nemo --nemo-python nemo-venv/bin/python [--audio long.wav]

Both sides load the same archive, which our own `write_nemo` wrote: a hybrid TDT-CTC of parakeet-
tdt_ctc-110m's sizes (17 layers x 512, 80 mels, 1-layer LSTM of 640, 1024 pieces) with random
weights. Untrained, its TDT head would emit at random, so two biases of the joint's output layer
are set: the duration classes' to favour 2 and 4 frames over 0, 1 and 3, as trained Parakeets do,
and the blank's by bisection until the greedy decoder emits about 4 tokens a second of speech,
English's rate with 1024 pieces. The decoder then does a real model's work; the texts mean nothing
but must be equal in float32.

Workers are separate processes with the same number of threads; they take turns (A/B/A/B), so that
a change of the machine's mood hits both. Wall time covers `transcribe` on sample arrays: features,
encoder, decoding, text; reading audio files is outside. Cold start is a fresh process each time,
from its start to its first text: import, load, one clip. Memory is the peak resident set of a fresh
process that does just that, and `load_over_checkpoint` how far loading raised it, relative to the
weights' bytes.

The last line printed is the result as JSON; it is also written to `--out`.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
SPEECH = REPOSITORY / "samples" / "talk.ogg"
TOKENIZER = REPOSITORY / "tests" / "golden" / "hybrid_tdt_ctc_bpe" / "model.nemo"
SIDES = ("ours-fp32", "nemo-fp32", "ours-bf16")
TARGETS = {"fp32_over_nemo": 0.8, "bf16_over_nemo": 0.4, "cold_start_over_nemo": 1 / 3}
REPLY = "@reply "  # marks a worker's answers among what NeMo prints


# ---- in the workers: only the standard library, numpy and torch beside the library under test


def load_side(side: str, model_path: str):
    """A function (clips, batch_size) -> texts, and our model (None for NeMo)."""
    import torch

    if side == "nemo-fp32":
        import logging

        from nemo.collections.asr.models import ASRModel
        from nemo.utils import logging as nemo_logging

        nemo_logging.setLevel(logging.ERROR)
        model = ASRModel.restore_from(model_path, map_location="cpu").eval()

        def transcribe(clips, batch_size):
            found = model.transcribe(clips, batch_size=batch_size, verbose=False)
            found = found[0] if isinstance(found, tuple) else found
            return [getattr(h, "text", h) for h in found]

        return transcribe, None

    import fastconformer

    dtype = torch.bfloat16 if side == "ours-bf16" else torch.float32
    model = fastconformer.load_model(model_path, dtype=dtype)

    def transcribe(clips, batch_size):
        return [t.text for t in model.transcribe(clips, batch_size=batch_size)]

    return transcribe, model


def status_kib(key: str) -> int:
    """A line of this process's memory accounting (VmRSS: now, VmHWM: peak), 0 where unknown."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1])
    return 0


def reply(**values):
    print(REPLY + json.dumps(values), flush=True)


def stages(model, clips, batch_size: int) -> dict:
    """Seconds our model spends in each stage over all clips."""
    import torch

    seconds = {"features": 0.0, "encoder": 0.0, "decoding": 0.0}
    for first in range(0, len(clips), batch_size):
        batch = [torch.from_numpy(c) for c in clips[first : first + batch_size]]
        audio = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        lengths = torch.tensor([len(c) for c in batch])
        with torch.inference_mode():
            times = [time.perf_counter()]
            features, frames = model.featurize(audio, lengths)
            times.append(time.perf_counter())
            encoded, frames = model.encode(features, frames)
            times.append(time.perf_counter())
            model.decode_greedy(encoded, frames)
            times.append(time.perf_counter())
        for stage, (start, end) in zip(seconds, pairwise(times), strict=True):
            seconds[stage] += end - start
    return seconds


def work(side: str, model_path: str, clips_path: str, cold: bool, threads: int):
    """A worker's life. Cold: one clip, then gone. Else: serves batch sizes from stdin."""
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    clips = list(np.load(clips_path).values())
    if side != "nemo-fp32":
        import fastconformer  # noqa: F401
    imported_kib = status_kib("VmRSS")
    transcribe, model = load_side(side, model_path)
    loaded_kib = status_kib("VmHWM") - imported_kib
    if cold:
        text = transcribe(clips[:1], 1)[0]
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reply(text=text, peak_mib=peak_kib / 1024, load_mib=loaded_kib / 1024)
        return
    reply(ready=True)
    for line in sys.stdin:
        task, batch_size = line.split()
        if task == "stages":
            reply(stages=stages(model, clips, int(batch_size)))
            continue
        start = time.perf_counter()
        texts = transcribe(clips, int(batch_size))
        reply(seconds=time.perf_counter() - start, texts=texts)


# ---- in the parent


def parakeet(tokenizer_archive: Path, layers: int, width: int, mels: int, lstm_layers: int):
    """(config, tokenizer files) of a hybrid of these sizes with the archive's 1024 pieces."""
    from fastconformer.checkpoint.nemo_archive import read_nemo

    checkpoint = read_nemo(tokenizer_archive)
    config = checkpoint.config
    config["preprocessor"]["features"] = mels
    config["encoder"] |= {
        "feat_in": mels,
        "n_layers": layers,
        "d_model": width,
        "n_heads": 8,
        "subsampling_conv_channels": 256,
        "conv_kernel_size": 9,
        "ff_expansion_factor": 4,
        "xscaling": False,
    }
    config["model_defaults"] |= {"enc_hidden": width, "pred_hidden": 640, "joint_hidden": 640}
    config["decoder"]["prednet"] |= {"pred_hidden": 640, "pred_rnn_layers": lstm_layers}
    config["joint"]["jointnet"] |= {
        "joint_hidden": 640,
        "encoder_hidden": width,
        "pred_hidden": 640,
    }
    config["aux_ctc"]["decoder"]["feat_in"] = width
    return config, checkpoint.tokenizer_files


def write_model(
    path: Path,
    tokenizer_archive: Path,
    clips,
    tokens_per_second: float,
    layers: int = 17,
    width: int = 512,
    mels: int = 80,
    lstm_layers: int = 1,
):
    """Writes a random model, by default of parakeet-tdt_ctc-110m's sizes; returns (parameters,
    tokens per second that its decoder emits)."""
    import torch

    from fastconformer import ASRModel, ModelConfig
    from fastconformer.checkpoint.nemo_archive import write_nemo
    from fastconformer.text.tokenizer import load_tokenizer

    torch.manual_seed(1)
    raw, files = parakeet(tokenizer_archive, layers, width, mels, lstm_layers)
    config = ModelConfig.from_nemo(raw)
    model = ASRModel(config, load_tokenizer(raw, files), files).eval()
    seconds = sum(len(c) for c in clips) / model.sample_rate
    audio = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(c) for c in clips], batch_first=True)
    with torch.inference_mode():
        encoded, lengths = model.encode(
            *model.featurize(audio, torch.tensor([len(c) for c in clips]))
        )
    output = model.joint.joint_net[-1]
    blank, durations = model.blank_id, config.loss.durations
    with torch.no_grad():
        output.bias[blank + 1 :] += torch.tensor([{2: 1.0, 4: 1.5}.get(d, 0.0) for d in durations])
    start, low, high = output.bias[blank].item(), -10.0, 30.0
    rate = 0.0
    for _ in range(22):  # more blank, fewer tokens
        middle = (low + high) / 2
        with torch.no_grad():
            output.bias[blank] = start + middle
        rate = sum(len(h.tokens) for h in model.decode_greedy(encoded, lengths, "tdt")) / seconds
        low, high = (middle, high) if rate > tokens_per_second else (low, middle)
    write_nemo(path, model.to_checkpoint())
    return sum(p.numel() for p in model.parameters()), rate


def cut_clips(audio: Path, n_clips: int, shortest_s: float, longest_s: float):
    """Consecutive pieces of a long recording, float32 at 16 kHz, lengths spread evenly; from its
    start again where it ends."""
    from fastconformer.audio.files import audio_duration, load_audio

    clips, offset, total = [], 0.0, audio_duration(audio)
    for i in range(n_clips):
        # strided, so that neighbours differ in length as in real batches
        step = (i * 5 % n_clips) / max(1, n_clips - 1)
        duration = min(total, shortest_s + (longest_s - shortest_s) * step)
        offset = offset if offset + duration <= total else 0.0
        clips.append(load_audio(audio, 16000, offset_s=offset, duration_s=duration))
        offset += duration
    return clips


class Worker:
    """A process that transcribes on demand."""

    def __init__(self, side: str, arguments, model: Path, clips: Path, cold: bool = False):
        python = arguments.nemo_python if side == "nemo-fp32" else sys.executable
        command = [python, str(Path(__file__).resolve()), "--worker", side]
        command += [
            "--model",
            str(model),
            "--clips",
            str(clips),
            "--threads",
            str(arguments.threads),
        ]
        threads = {k: str(arguments.threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = os.environ | threads | {"PYTHONPATH": str(REPOSITORY)}
        self.side = side
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the worker
        self.start = time.perf_counter()
        self.process = subprocess.Popen(
            command + (["--cold"] if cold else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            text=True,
        )

    def answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith(REPLY):
                return json.loads(line[len(REPLY) :])
        self.log.seek(0)
        raise SystemExit(f"the {self.side} worker died:\n{self.log.read()[-3000:]}")

    def ask(self, task: str, batch_size: int) -> dict:
        self.process.stdin.write(f"{task} {batch_size}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


def throughput(arguments, model: Path, clips: Path) -> dict:
    """Seconds of every round, texts and our stages, by batch size."""
    workers = {}
    try:
        for side in SIDES:
            workers[side] = Worker(side, arguments, model, clips)
            workers[side].answer()
        found = {}
        for batch_size in arguments.batch_sizes:
            rounds = {side: [] for side in SIDES}
            texts = {}
            for side in SIDES:  # warm-up, untimed
                texts[side] = workers[side].ask("transcribe", batch_size)["texts"]
            for i in range(arguments.rounds):
                for side in SIDES if i % 2 == 0 else SIDES[::-1]:
                    answer = workers[side].ask("transcribe", batch_size)
                    assert answer["texts"] == texts[side], f"{side} is not deterministic"
                    rounds[side].append(round(answer["seconds"], 4))
                    print(
                        f"batch {batch_size} round {i} {side}: {answer['seconds']:.2f} s",
                        flush=True,
                    )
            found[batch_size] = {
                "seconds": rounds,
                "texts": texts,
                "stages": {
                    side: workers[side].ask("stages", batch_size)["stages"]
                    for side in SIDES
                    if side.startswith("ours")
                },
            }
        return found
    finally:
        for worker in workers.values():
            worker.close()


def cold_starts(arguments, model: Path, clips: Path) -> dict:
    """Seconds to the first text and memory, in fresh processes that take turns."""
    found = {side: {"seconds": [], "peak_mib": [], "load_mib": []} for side in SIDES}
    for i in range(arguments.cold_rounds + 1):
        for side in SIDES if i % 2 == 0 else SIDES[::-1]:
            worker = Worker(side, arguments, model, clips, cold=True)
            answer = worker.answer()
            seconds = time.perf_counter() - worker.start
            worker.close()
            if i == 0:
                continue  # fills the page cache for all
            found[side]["seconds"].append(round(seconds, 3))
            found[side]["peak_mib"].append(round(answer["peak_mib"], 1))
            found[side]["load_mib"].append(round(answer["load_mib"], 1))
            print(
                f"cold start {i} {side}: {seconds:.2f} s, {answer['peak_mib']:.0f} MiB", flush=True
            )
    return found


def machine() -> dict:
    told = ""
    with contextlib.suppress(OSError):
        told = Path("/proc/cpuinfo").read_text()
    names = [x.split(":", 1)[1].strip() for x in told.splitlines() if x.startswith("model name")]
    name = names[0] if names else platform.processor()
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "bf16": [f for f in ("avx512_bf16", "amx_bf16") if f" {f}" in told],
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def versions(nemo_python: str) -> dict:
    import torch

    script = "import nemo, torch; print('@', nemo.__version__, torch.__version__)"
    done = subprocess.run([nemo_python, "-c", script], capture_output=True, text=True, check=False)
    line = [x for x in done.stdout.splitlines() if x.startswith("@")]
    if not line:
        raise SystemExit(f"{nemo_python} cannot import nemo:\n{done.stderr[-1000:]}")
    _, nemo, nemo_torch = line[-1].split()
    from benchmarks import commit

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nemo": nemo,
        "nemo_torch": nemo_torch,
        "commit": commit(),
    }


def summarise(rounds: dict, audio_s: float) -> dict:
    """Medians, real-time factors and paired ratios of one batch size."""
    seconds = rounds["seconds"]
    medians = {side: statistics.median(values) for side, values in seconds.items()}

    def ratio(side):  # of neighbours in time, so that drift cancels
        pairs = zip(seconds[side], seconds["nemo-fp32"], strict=True)
        return statistics.median(ours / nemo for ours, nemo in pairs)

    texts = rounds["texts"]
    same = [a == b for a, b in zip(texts["ours-fp32"], texts["nemo-fp32"], strict=True)]
    near = [a == b for a, b in zip(texts["ours-bf16"], texts["ours-fp32"], strict=True)]
    return {
        "median_s": {k: round(v, 3) for k, v in medians.items()},
        "rtfx": {k: round(audio_s / v, 1) for k, v in medians.items()},
        "fp32_over_nemo": round(ratio("ours-fp32"), 3),
        "bf16_over_nemo": round(ratio("ours-bf16"), 3),
        "texts_equal_fp32": f"{sum(same)}/{len(same)}",
        "texts_bf16_equal_ours_fp32": f"{sum(near)}/{len(near)}",
        "stages_s": {
            s: {k: round(x, 3) for k, x in v.items()} for s, v in rounds["stages"].items()
        },
        "seconds": seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_vs_nemo",
        description=__doc__.split("\n\n")[0],
        epilog="example: python -m benchmarks.cpu_vs_nemo --nemo-python nemo-venv/bin/python",
    )
    parser.add_argument("--nemo-python", help="Python of an environment that has NeMo")
    parser.add_argument(
        "--audio", type=Path, default=SPEECH, help="long recording that clips are cut from"
    )
    parser.add_argument(
        "--tokenizer", type=Path, default=TOKENIZER, help="hybrid TDT archive with 1024 pieces"
    )
    parser.add_argument("--clip-count", type=int, default=16)
    parser.add_argument("--shortest", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--longest", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--tokens-per-second", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold-rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_vs_nemo.json")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--clips", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.model, arguments.clips, arguments.cold, arguments.threads)
        return 0
    if not arguments.nemo_python:
        parser.error("--nemo-python is needed: the Python of an environment that has NeMo")
    for path in (arguments.audio, arguments.tokenizer):
        if not path.exists():
            parser.error(f"{path} does not exist; name another with --audio or --tokenizer")

    import numpy as np
    import torch

    torch.set_num_threads(arguments.threads)
    result = {"machine": machine(), "versions": versions(arguments.nemo_python)}
    clips = cut_clips(arguments.audio, arguments.clip_count, arguments.shortest, arguments.longest)
    audio_s = sum(len(c) for c in clips) / 16000
    with tempfile.TemporaryDirectory() as folder:
        model, clips_path = Path(folder) / "model.nemo", Path(folder) / "clips.npz"
        np.savez(clips_path, **{f"clip{i:03d}": clip for i, clip in enumerate(clips)})
        parameters, rate = write_model(
            model, arguments.tokenizer, clips[:8], arguments.tokens_per_second, arguments.layers
        )
        checkpoint_mib = model.stat().st_size / 2**20
        print(
            f"{parameters / 1e6:.1f} M parameters, {rate:.1f} tokens/s, {audio_s:.0f} s of speech"
        )
        by_batch = throughput(arguments, model, clips_path)
        cold = cold_starts(arguments, model, clips_path)
    result |= {
        "parameters_m": round(parameters / 1e6, 1),
        "checkpoint_mib": round(checkpoint_mib, 1),
        "tokens_per_second": round(rate, 2),
        "clips": len(clips),
        "audio_s": round(audio_s, 1),
        "threads": arguments.threads,
        "batch": {str(b): summarise(rounds, audio_s) for b, rounds in by_batch.items()},
        "cold_start": {
            side: {k: statistics.median(v) for k, v in values.items()}
            | {"all_seconds": values["seconds"]}
            for side, values in cold.items()
        },
    }
    starts = result["cold_start"]
    result["cold_start_over_nemo"] = round(
        starts["ours-fp32"]["seconds"] / starts["nemo-fp32"]["seconds"], 3
    )
    result["load_over_checkpoint"] = round(starts["ours-fp32"]["load_mib"] / checkpoint_mib, 3)
    met = {
        f"batch_{b}_{k}": r[k] <= TARGETS[k]
        for b, r in result["batch"].items()
        for k in TARGETS
        if k in r
    }
    met["cold_start_over_nemo"] = result["cold_start_over_nemo"] <= TARGETS["cold_start_over_nemo"]
    result["targets"] = TARGETS
    result["targets_met"] = met
    text = json.dumps(result, indent=1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.out.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(arguments.out)
    print(json.dumps(result))
    unequal = [
        b for b, r in result["batch"].items() if len(set(r["texts_equal_fp32"].split("/"))) > 1
    ]
    if unequal:
        print(
            f"cpu_vs_nemo: fp32 texts differ from NeMo's at batch {', '.join(unequal)}",
            file=sys.stderr,
        )
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
