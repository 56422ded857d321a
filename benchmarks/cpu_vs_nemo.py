"""Transcription on CPU, ours against real NeMo: one model, one machine, one run.

    python -m benchmarks.cpu_vs_nemo --nemo-python nemo-venv/bin/python [--audio long.wav]

Both sides load the same archive, which our own `write_nemo` wrote: a hybrid TDT-CTC of parakeet-
tdt_ctc-110m's sizes (17 layers x 512, 80 mels, 1-layer LSTM of 640, 1024 pieces) with random
weights (random_model.py). Texts must be equal in float32.

Workers are separate processes with the same number of threads; they take turns (A/B/A/B), so that
a change of the machine's mood hits both. Wall time covers `transcribe` on sample arrays: features,
encoder, decoding, text; reading audio files is outside. Cold start is a fresh process each time,
from its start to its first text: import, load, one clip. Memory is the peak resident set of a fresh
process that does just that, and `load_over_checkpoint` how far loading raised ours, relative to the
weights' bytes.

The last line printed is the result as JSON; it is also written to `--out`.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import SPEECH, add_out, machine, peer_versions, versions, write_result
from benchmarks.random_model import SIZES, TOKENIZER, cut_clips, write_model
from benchmarks.workers import Worker
from fastconformer import cli

SIDES = {"ours-fp32": "ours:float32", "nemo-fp32": "nemo:float32", "ours-bf16": "ours:bfloat16"}
TARGETS = {"fp32_over_nemo": 0.8, "bf16_over_nemo": 0.4, "cold_start_over_nemo": 1 / 3}


def start(side: str, arguments, work_file: Path) -> Worker:
    python = arguments.nemo_python if side == "nemo-fp32" else sys.executable
    words = [str(work_file), SIDES[side]]
    return Worker(side, python, "benchmarks.engines", words, arguments.threads)


def throughput(arguments, work_file: Path) -> dict:
    """Seconds of every round, texts and our stages, by batch size."""
    workers = {}
    try:
        for side in SIDES:
            workers[side] = start(side, arguments, work_file)
            workers[side].answer()
        found = {}
        for batch_size in arguments.batch_sizes:
            rounds = {side: [] for side in SIDES}
            texts = {}
            for side in SIDES:  # warm-up, untimed
                texts[side] = workers[side].ask("memory", batch_size)["texts"]
            for i in range(arguments.rounds):
                for side in list(SIDES) if i % 2 == 0 else list(SIDES)[::-1]:
                    answer = workers[side].ask("memory", batch_size)
                    assert answer["texts"] == texts[side], f"{side} is not deterministic"
                    rounds[side].append(round(answer["seconds"], 4))
                    seconds = f"{answer['seconds']:.2f} s"
                    print(f"batch {batch_size} round {i} {side}: {seconds}", flush=True)
            stages = {
                side: workers[side].ask("stages", batch_size)["stages"]
                for side in SIDES
                if side.startswith("ours")
            }
            found[batch_size] = {"seconds": rounds, "texts": texts, "stages": stages}
        return found
    finally:
        for worker in workers.values():
            worker.close()


def cold_starts(arguments, work_file: Path) -> dict:
    """Seconds to the first text and memory, in fresh processes that take turns."""
    found = {side: {"seconds": [], "peak_mib": [], "load_mib": []} for side in SIDES}
    for i in range(arguments.cold_rounds + 1):
        for side in list(SIDES) if i % 2 == 0 else list(SIDES)[::-1]:
            started = time.perf_counter()
            worker = start(side, arguments, work_file)
            try:
                loading = worker.answer()["load_bytes"]
                worker.ask("memory", 1)
                seconds = time.perf_counter() - started
                peak_mib = worker.peak_bytes() / 2**20
            finally:
                worker.close()
            if i == 0:
                continue  # fills the page cache for all
            found[side]["seconds"].append(round(seconds, 3))
            found[side]["peak_mib"].append(round(peak_mib, 1))
            if loading is not None:
                found[side]["load_mib"].append(round(loading / 2**20, 1))
            print(f"cold start {i} {side}: {seconds:.2f} s, {peak_mib:.0f} MiB", flush=True)
    return found


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


def main(argv=None) -> int:
    parser = cli.parser(
        "benchmarks.cpu_vs_nemo",
        __doc__.split("\n\n")[0],
        "--nemo-python nemo-venv/bin/python",
    )
    parser.add_argument(
        "--nemo-python", required=True, help="Python of an environment that has NeMo"
    )
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
    add_out(parser, "cpu_vs_nemo")
    arguments = parser.parse_args(argv)
    for path in (arguments.audio, arguments.tokenizer):
        if not path.exists():
            parser.error(f"{path} does not exist; name another with --audio or --tokenizer")
    return cli.run("cpu_vs_nemo", lambda: run(arguments))


def run(arguments) -> int:
    import numpy as np
    import torch

    torch.set_num_threads(arguments.threads)
    peer = peer_versions(arguments.nemo_python, "nemo", "torch")
    all_versions = versions() | {"nemo": peer["nemo"], "nemo_torch": peer["torch"]}
    result = {"machine": machine(), "versions": all_versions}
    clips = cut_clips(arguments.audio, arguments.clip_count, arguments.shortest, arguments.longest)
    audio_s = sum(len(c) for c in clips) / 16000
    with tempfile.TemporaryDirectory() as folder:
        model, clips_path = Path(folder) / "model.nemo", Path(folder) / "clips.npz"
        np.savez(clips_path, **{f"clip{i:03d}": clip for i, clip in enumerate(clips)})
        _, *sizes = SIZES["random-110m"]
        parameters, rate = write_model(
            model,
            clips[:8],
            arguments.tokens_per_second,
            (arguments.layers, *sizes),
            arguments.tokenizer,
        )
        task = {"model": str(model), "clips": str(clips_path), "device": "cpu", "head": None}
        work_file, one_clip = Path(folder) / "work.json", Path(folder) / "one_clip.json"
        work_file.write_text(json.dumps(task | {"threads": arguments.threads}))
        np.savez(Path(folder) / "clip.npz", clip=clips[0])
        task |= {"threads": arguments.threads, "clips": str(Path(folder) / "clip.npz")}
        one_clip.write_text(json.dumps(task))
        checkpoint_mib = model.stat().st_size / 2**20
        print(
            f"{parameters / 1e6:.1f} M parameters, {rate:.1f} tokens/s, {audio_s:.0f} s of speech"
        )
        by_batch = throughput(arguments, work_file)
        cold = cold_starts(arguments, one_clip)
    result |= {
        "parameters_m": round(parameters / 1e6, 1),
        "checkpoint_mib": round(checkpoint_mib, 1),
        "tokens_per_second": round(rate, 2),
        "clips": len(clips),
        "audio_s": round(audio_s, 1),
        "threads": arguments.threads,
        "batch": {str(b): summarise(rounds, audio_s) for b, rounds in by_batch.items()},
        "cold_start": {
            side: {k: statistics.median(v) for k, v in values.items() if v}
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
    write_result(arguments.out, result)
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
