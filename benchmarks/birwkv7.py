"""What an encoder frame costs as recordings grow: BiRWKV7 beside relative-position attention.

    python -m benchmarks.birwkv7 --plot docs/birwkv7_cost.svg
    python -m benchmarks.birwkv7 --audio talk.ogg --hours 1 --model models/base_tiny.nemo
    python -m benchmarks.birwkv7 --audio talk.ogg --decode 20000 100000 400000
    python -m benchmarks.birwkv7 --memory 1 10 60 --model models/base_tiny.nemo
    python -m benchmarks.birwkv7 --curves test/attention=runs/a test/random=runs/b --plot c.svg

First form: an encoder with random weights takes random features of each length, one clip, in one
pass, in a process of its own. Time is the process's CPU seconds (the best of `--repeats`), which
other work on the machine changes little; with one thread it is wall time on a quiet machine. Memory
is the peak of the resident set beyond what was there before the pass, features included. Per
encoder frame (80 ms of audio with 8-fold subsampling).

Second form: a recording, repeated to so many hours, through `model.transcribe` in one pass; an
attention model is converted first. Prints seconds, times real time and peak memory beside what
`memory_estimate` said.

Third form: greedy decoding alone, of so many encoder frames: those of the recording's first minute,
repeated. CPU seconds of the decoder, and of text, words and segments with times.

Fourth form: peak memory of `model.transcribe` in one pass of so many minutes of noise, in a process
of its own, beside what `memory_estimate` said; a model with attention also after conversion. It is
cut to `--layers` layers, since only one layer is at work at a time.

Fifth form: word error rates of training runs, by step, from the `ledger.jsonl` of their folders, a
chart for each set.

The last line printed is the result as JSON; it is also written to `--out`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import REPOSITORY, RUNS, add_out, commit, machine, write_result
from benchmarks.charts import line_charts
from fastconformer import cli
from fastconformer.process_memory import forget_peak, give_back, peak_bytes, resident_bytes

NAMES = {
    "rwkv7_attn": "BiRWKV7",
    "rel_pos": "full attention",
    "rel_pos_local_attn": "local attention (128 frames)",
}
LONGEST = {"rel_pos": 16000}  # frames; beyond, time grows with the square and tells nothing new


def measure(attention: str, frames: int, size: dict, repeats: int) -> dict:
    """In a process of its own: {"cpu_s", "wall_s", "bytes"} of one pass over `frames` frames."""
    import torch

    from fastconformer.config import EncoderConfig
    from fastconformer.networks.conformer import ConformerEncoder

    torch.manual_seed(0)
    torch.set_num_threads(size["threads"])
    context = [128, 128] if attention == "rel_pos_local_attn" else None
    config = EncoderConfig(
        feat_in=80,
        n_layers=size["layers"],
        d_model=size["d_model"],
        n_heads=max(1, size["d_model"] // 64),
        subsampling="dw_striding",
        subsampling_factor=8,
        subsampling_conv_channels=size["d_model"] // 2,
        self_attention_model=attention,
        att_context_size=context,
        conv_kernel_size=9,
        xscaling=False,
    )
    encoder = ConformerEncoder(config).eval()
    for layer in encoder.layers:
        if attention == "rwkv7_attn":  # its initial output weights are zero
            torch.nn.init.orthogonal_(layer.self_attn.output.weight)
    features = torch.randn(1, 80, 8 * frames)
    lengths = torch.tensor([8 * frames])
    best = {}
    with torch.no_grad():
        encoder(features[:, :, :4096], lengths.clamp(max=4096))  # warm-up
        give_back()
        before = resident_bytes()
        forget_peak()
        for _ in range(repeats):
            cpu, wall = time.process_time(), time.monotonic()
            encoded, _ = encoder(features, lengths)
            cpu, wall = time.process_time() - cpu, time.monotonic() - wall
            best = best if best and best["cpu_s"] <= cpu else {"cpu_s": cpu, "wall_s": wall}
            assert encoded.shape[1] == frames and bool(encoded.isfinite().all())
            del encoded
    return best | {"bytes": peak_bytes() - before + features.nbytes}


def in_a_process(arguments, attention: str, words: list[str]) -> dict:
    words = [*words, "--worker", attention]
    for name in ("layers", "d_model", "threads"):
        words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.birwkv7", *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": str(arguments.threads)},
    )
    return json.loads(done.stdout.splitlines()[-1])


def cost_by_length(arguments) -> dict:
    table = {}
    for attention in arguments.attention:
        for frames in arguments.frames:
            if frames > LONGEST.get(attention, frames):
                continue
            words = ["--frames", str(frames), "--repeats", str(arguments.repeats)]
            found = in_a_process(arguments, attention, words)
            row = {"frames": frames} | found
            row["us_per_frame"] = round(found["cpu_s"] / frames * 1e6, 2)
            row["bytes_per_frame"] = round(found["bytes"] / frames)
            table.setdefault(attention, []).append(row)
            print(
                f"{NAMES[attention]:30} {frames:8,} frames  {row['us_per_frame']:9.1f} us"
                f"  {row['bytes_per_frame']:9,} bytes a frame",
                flush=True,
            )
    size = {name: getattr(arguments, name) for name in ("layers", "d_model", "threads")}
    return {"machine": machine(), "encoder": size, "by_length": table}


def plot(result: dict) -> str:
    charts = []
    for key, label, scale in (
        ("us_per_frame", "microseconds of CPU an encoder frame", 1),
        ("bytes_per_frame", "kilobytes at the peak an encoder frame", 1000),
    ):
        series = {
            NAMES[attention]: [(row["frames"], row[key] / scale) for row in rows]
            for attention, rows in result["by_length"].items()
        }
        title = f"{result['encoder']['layers']} layers of {result['encoder']['d_model']}, CPU"
        x = "encoder frames in one pass (80 ms each)"
        charts.append({"title": title, "x": x, "y": label, "series": series, "log": True})
    return line_charts(charts)


def long_recording(arguments) -> dict:
    """`model.transcribe` on the recording repeated to `hours`, in one pass."""
    import numpy as np
    import torch

    from fastconformer import load_model
    from fastconformer.audio.files import load_audio
    from fastconformer.load import model_of
    from fastconformer.recordings.memory import memory_estimate
    from fastconformer.surgery.birwkv7 import to_birwkv7

    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model)
    if model.config.encoder.self_attention_model != "rwkv7_attn":
        model = model_of(to_birwkv7(model.to_checkpoint()))
    audio = load_audio(arguments.audio, model.sample_rate)
    samples = int(arguments.hours * 3600 * model.sample_rate)
    audio = np.resize(audio, samples)
    seconds = samples / model.sample_rate
    result = {"machine": machine(), "hours": arguments.hours, "threads": arguments.threads}
    result["estimated_bytes"] = memory_estimate(model.config, seconds, torch.float32)
    for head in model.heads:
        model.transcribe([audio[: 10 * model.sample_rate]], head=head)  # what is compiled once
        before = resident_bytes()
        forget_peak()
        cpu, wall = time.process_time(), time.monotonic()
        (transcript,) = model.transcribe([audio], head=head, timestamps=True)
        wall = time.monotonic() - wall
        result[head] = {
            "wall_s": round(wall, 2),
            "cpu_s": round(time.process_time() - cpu, 2),
            "rtfx": round(seconds / wall, 1),
            "bytes": peak_bytes() - before,
            "tokens": len(transcript.tokens),
            "words": len(transcript.words),
        }
        print(f"{head}: {result[head]}", flush=True)
    return result


def transcription_memory(attention: str, dtype: str, minutes: float, arguments) -> dict:
    """In a process of its own: {"bytes", "estimated_bytes"} of one pass beyond the weights."""
    import numpy as np
    import torch

    from fastconformer import load_model
    from fastconformer.load import model_of
    from fastconformer.recordings.memory import memory_estimate
    from fastconformer.surgery.birwkv7 import to_birwkv7

    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model)
    if attention == "rwkv7_attn" != model.config.encoder.self_attention_model:
        model = model_of(to_birwkv7(model.to_checkpoint()))
    assert model.config.encoder.self_attention_model == attention
    model.encoder.layers = model.encoder.layers[: arguments.layers]
    dtype = getattr(torch, dtype)
    model = model.to(dtype).eval()
    samples = np.random.default_rng(0).standard_normal(round(minutes * 60 * model.sample_rate))
    samples = (0.05 * samples).astype(np.float32)
    model.transcribe([samples[: 5 * model.sample_rate]], timestamps=True)  # what is made once
    give_back()
    before = resident_bytes()
    forget_peak()
    model.transcribe([samples], timestamps=True, long="full")
    seconds = len(samples) / model.sample_rate
    return {
        "bytes": peak_bytes() - before,
        "estimated_bytes": memory_estimate(model.config, seconds, dtype),
    }


def memory_by_length(arguments) -> dict:
    rows = []
    for attention in [x for x in arguments.attention if x != "rel_pos_local_attn"]:
        for dtype in ("float32", "bfloat16"):
            for minutes in arguments.memory:
                words = ["--dtype", dtype, "--memory", str(minutes), "--model", arguments.model]
                row = {"attention": attention, "dtype": dtype, "minutes": minutes}
                row |= in_a_process(arguments, attention, words)
                row["estimated_over_measured"] = round(row["estimated_bytes"] / row["bytes"], 2)
                rows.append(row)
                print(row, flush=True)
    result = {"machine": machine(), "model": Path(arguments.model).name, "memory": rows}
    return result | {"layers": arguments.layers}


def long_decoding(arguments) -> dict:
    """{head: [a row for each number of frames]} of greedy decoding and of words with times."""
    import torch

    from fastconformer import load_model
    from fastconformer.audio.files import load_audio

    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model)
    audio = torch.from_numpy(load_audio(arguments.audio, model.sample_rate))
    audio = audio[None, : 60 * model.sample_rate]
    with torch.no_grad():
        features, lengths = model.featurize(audio, torch.tensor([audio.shape[1]]))
        minute, lengths = model.encode(features, lengths)
    minute = minute[:, : int(lengths[0])]
    rows = {head: [] for head in model.heads}
    for frames in arguments.decode:
        encoded = minute.repeat(1, -(-frames // minute.shape[1]), 1)[:, :frames]
        for head in model.heads:
            before = resident_bytes()
            forget_peak()
            start = time.process_time()
            (hypothesis,) = model.decode_greedy(encoded, torch.tensor([frames]), head)
            decoded = time.process_time()
            seconds = frames * model.config.frame_seconds
            transcript = model.transcript(hypothesis, head, seconds, timestamps=True)
            row = {
                "frames": frames,
                "tokens": len(hypothesis.tokens),
                "words": len(transcript.words),
                "decode_cpu_s": round(decoded - start, 3),
                "times_cpu_s": round(time.process_time() - decoded, 3),
                "bytes": peak_bytes() - before,
            }
            rows[head].append(row)
            print(f"{head}: {row}", flush=True)
            del hypothesis, transcript
    return {"machine": machine(), "threads": arguments.threads, "decoding": rows}


def learning_curves(runs: list[str]) -> dict:
    """{set: {name: {head: [(step, WER in %), ...]}}} of `set/name=folder` each."""
    curves = {}
    for run in runs:
        name, _, folder = run.partition("=")
        of_set, _, name = name.rpartition("/")
        lines = [json.loads(x) for x in (Path(folder) / "ledger.jsonl").read_text().splitlines()]
        sets = {line["step"]: line["sets"] for line in lines}
        for step, by_set in sets.items():
            for head in next(iter(by_set.values())):
                rates = [rates[head]["wer"] for rates in by_set.values()]
                point = step, round(100 * sum(rates) / len(rates), 2)
                by_head = curves.setdefault(of_set, {}).setdefault(name, {})
                by_head.setdefault(head, []).append(point)
    return {"curves": curves}


def plot_curves(result: dict) -> str:
    charts = []
    for of_set, by_name in result["curves"].items():
        head = next(iter(next(iter(by_name.values()))))
        series = {name: by_head[head] for name, by_head in by_name.items()}
        y = f"WER of the {head} head, %"
        charts.append({"title": of_set, "x": "labelled steps", "y": y, "series": series})
    return line_charts(charts)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(
        "benchmarks.birwkv7",
        "Time and memory an encoder frame as recordings grow.",
        "--frames 1000 10000 --layers 2",
    )
    parser.add_argument("--frames", type=int, nargs="+", metavar="T", help="encoder frames")
    parser.add_argument("--attention", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--layers", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--d-model", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--audio", type=Path, help="a recording: transcribe it instead")
    parser.add_argument("--hours", type=float, default=1.0, help="its length (%(default)s)")
    parser.add_argument("--memory", type=float, nargs="+", metavar="MINUTES", help="of passes")
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--decode", type=int, nargs="+", metavar="T", help="decode T frames of it")
    parser.add_argument("--curves", nargs="+", metavar="SET/NAME=FOLDER", help="of runs")
    parser.add_argument("--model", default="models/base_tiny.nemo", help="(%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    add_out(parser)
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.frames = arguments.frames or [1000, 3000, 10000, 30000, 100000]
    if arguments.audio and not arguments.audio.is_file():
        parser.error(f"--audio {arguments.audio} is not a file")
    if arguments.decode and not arguments.audio:
        parser.error("--decode needs --audio, a recording whose frames it repeats")
    return cli.run("birwkv7", lambda: run(arguments))


def run(arguments) -> None:
    if arguments.worker:
        size = {name: getattr(arguments, name) for name in ("layers", "d_model", "threads")}
        if arguments.memory:
            given = arguments.worker, arguments.dtype, arguments.memory[0], arguments
            found = transcription_memory(*given)
        else:
            found = measure(arguments.worker, arguments.frames[0], size, arguments.repeats)
        print(json.dumps(found))
        return
    if arguments.curves:
        result, name = learning_curves(arguments.curves), "birwkv7_learning.json"
        if arguments.plot:
            arguments.plot.write_text(plot_curves(result))
    elif arguments.memory:
        result, name = memory_by_length(arguments), "birwkv7_memory.json"
    elif arguments.audio:
        if arguments.decode:
            result, name = long_decoding(arguments), "birwkv7_decoding.json"
        else:
            result, name = long_recording(arguments), "birwkv7_long.json"
    else:
        result, name = cost_by_length(arguments), "birwkv7.json"
        if arguments.plot:
            arguments.plot.write_text(plot(result))
    result |= {"commit": commit()}
    write_result(arguments.out or RUNS / name, result)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
