"""How much of a call on a CPU is matrix products, and a training step, beside NeMo.

    python -m benchmarks.cpu_share --nemo-python nemo-venv/bin/python

Both sides load one archive: Parakeet's sizes with random weights (random_model.py). Clips of 10 to
20 seconds go in one at a time. In every round each engine takes its turn, then ours does the matrix
products of its encoder again with nothing between them; `products_share` is their time over the
whole call's, the median of the rounds. The step of training is CTC's, over clips of 6 and
8 seconds, with dropout and SpecAugment as the config has them.

The last line printed is the result as JSON; it is also written to `--out`.
"""

import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks import SPEECH, add_out, machine, peer_versions, versions, write_result
from benchmarks.random_model import SIZES, cut_clips, write_model
from benchmarks.workers import Worker
from fastconformer import cli

NEMO = "nemo:float32"
GOALS = {  # of random-110m: (the least, the most)
    "products_share": (0.6, None),
    "bfloat16_over_nemo": (None, 0.33),
    "decoding_share": (None, 0.1),
    "nemo_step_over_ours": (1.15, None),
}


def rounds_of(workers: dict, n_rounds: int) -> dict:
    """Every engine in turn; {engine: {"whole", "products": seconds of each round, ...}}."""
    found = {engine: {"whole": [], "products": []} for engine in workers}
    for i in range(n_rounds + 1):
        for engine in list(workers) if i % 2 == 0 else list(workers)[::-1]:
            told = workers[engine].ask("whole")
            products = workers[engine].ask("products") if engine != NEMO else None
            row = found[engine]
            if i == 0:  # warm-up
                row["texts"] = told["texts"]
                if products:
                    row["gflop"] = round(products["gflop"], 1)
                continue
            row["whole"].append(round(told["seconds"], 4))
            if products:
                row["products"].append(round(products["seconds"], 4))
            print(f"round {i} {engine}: {row['whole'][-1]} {row['products'][-1:]}", flush=True)
    return found


def steps_of(workers: dict, n_rounds: int) -> dict:
    """Seconds of a training step, ours and NeMo's, in turns; the first of each is a warm-up."""
    engines, seconds, losses = ["ours:float32", NEMO], {}, {}
    for i in range(n_rounds + 1):
        for engine in engines if i % 2 == 0 else engines[::-1]:
            told = workers[engine].ask("step")
            if i == 0:
                losses[engine] = round(told["loss"], 2)
                continue
            seconds.setdefault(engine, []).append(round(told["seconds"], 4))
            print(f"step {i} {engine}: {seconds[engine][-1]}", flush=True)
    ours, nemo = (seconds[engine] for engine in engines)
    return {
        "seconds": seconds,
        "first_loss": losses,
        "nemo_step_over_ours": round(statistics.median(b / a for a, b in zip(ours, nemo)), 3),
    }


def summary(engine: str, row: dict, nemo: dict, stages: dict | None, audio_s: float) -> dict:
    seconds = row["whole"]
    told = {
        "median_s": round(statistics.median(seconds), 3),
        "rtfx": round(audio_s / statistics.median(seconds), 1),
        "over_nemo": round(statistics.median(a / b for a, b in zip(seconds, nemo["whole"])), 3),
        "texts_as_nemo": sum(a == b for a, b in zip(row["texts"], nemo["texts"])),
    }
    if engine != NEMO:
        products, whole = row["products"], sum(stages.values())
        told |= {
            "products_share": round(statistics.median(p / s for p, s in zip(products, seconds)), 3),
            "products_gflop_per_s": round(row["gflop"] / statistics.median(products)),
            "products_gflop": row["gflop"],
            "stages_s": {name: round(value, 4) for name, value in stages.items()},
            "decoding_share": round(stages["decoding"] / whole, 3),
            "products_s": products,
        }
    return told | {"seconds": seconds}


def measure(name: str, arguments, folder: Path) -> dict:
    """One size of model, all engines."""
    import numpy as np

    small = name == "random-110m"
    count = arguments.clip_count if small else max(1, arguments.clip_count // 2)
    clips = cut_clips(arguments.audio, count, arguments.shortest, arguments.longest)
    trained = [clips[i % count][: int(16000 * s)] for i, s in enumerate(arguments.trained_seconds)]
    random = np.random.default_rng(1)
    targets = [random.integers(0, 1024, len(clip) // 4000) for clip in trained]
    arrays = {f"clip{i:02d}": x for i, x in enumerate(clips)}
    arrays |= {f"trained{i:02d}": x for i, x in enumerate(trained)}
    arrays |= {f"targets{i:02d}": x for i, x in enumerate(targets)}
    np.savez(folder / f"{name}.npz", **arrays)
    model, sizes = folder / f"{name}.nemo", (arguments.layers or SIZES[name][0], *SIZES[name][1:])
    if not model.exists():
        write_model(model, clips[:2], 4.0, sizes)
    work = folder / f"{name}.json"
    task = {"model": str(model), "arrays": str(folder / f"{name}.npz")}
    work.write_text(json.dumps(task | {"threads": arguments.threads}))
    audio_s = sum(map(len, clips)) / 16000
    dtypes = ("float32", "bfloat16", "int8") if small else ("float32", "bfloat16")
    with contextlib.ExitStack() as stack:
        workers = {}
        for engine in (*(f"ours:{dtype}" for dtype in dtypes), NEMO):
            python = arguments.nemo_python if engine == NEMO else sys.executable
            words = [str(work), engine]
            worker = Worker(
                engine, python, "benchmarks.cpu_share_engines", words, arguments.threads
            )
            stack.callback(worker.close)
            worker.answer()
            workers[engine] = worker
        rows = rounds_of(workers, arguments.rounds)
        stages = {e: workers[e].ask("stages")["stages"] for e in workers if e != NEMO}
        result = {
            "audio_s": round(audio_s, 1),
            "clips": count,
            "engines": {
                e: summary(e, row, rows[NEMO], stages.get(e), audio_s) for e, row in rows.items()
            },
        }
        if small:
            result["training"] = steps_of(workers, arguments.rounds)
    return result


def goals_met(result: dict) -> dict:
    """{goal: [what was measured, whether it is met]} of the small size."""
    engines = result["engines"]
    values = {
        "bfloat16_over_nemo": engines["ours:bfloat16"]["over_nemo"],
        "nemo_step_over_ours": result["training"]["nemo_step_over_ours"],
    }
    for engine, row in engines.items():
        for name in ("products_share", "decoding_share"):
            if name in row:
                values[f"{name} {engine}"] = row[name]
    found = {}
    for name, value in values.items():
        least, most = GOALS[name.split()[0]]
        found[name] = [value, value >= least if most is None else value <= most]
    found["texts"] = [
        f"{engines['ours:float32']['texts_as_nemo']}/{result['clips']}",
        engines["ours:float32"]["texts_as_nemo"] == result["clips"],
    ]
    return found


def main(argv=None) -> int:
    parser = cli.parser(
        "benchmarks.cpu_share",
        __doc__.split("\n\n")[0],
        "--nemo-python nemo-venv/bin/python",
    )
    parser.add_argument("--nemo-python", required=True, help="of an environment that has NeMo")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--audio", type=Path, default=SPEECH, help="that clips are cut from")
    parser.add_argument("--clip-count", type=int, default=8, help="half as many for random-0.6b")
    parser.add_argument("--shortest", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--longest", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--trained-seconds", type=float, nargs="+", default=[6.0, 8.0])
    parser.add_argument("--layers", type=int, help="fewer than the size has")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keeps the random models for the next run")
    add_out(parser, "cpu_share")
    arguments = parser.parse_args(argv)
    if not arguments.audio.exists():
        parser.error(f"{arguments.audio} does not exist; name another with --audio")
    if min(arguments.clip_count, arguments.threads, arguments.rounds) < 1:
        parser.error("--clip-count, --threads and --rounds are at least 1")
    return cli.run("cpu_share", lambda: run(arguments))


def run(arguments) -> int:
    import torch

    torch.set_num_threads(arguments.threads)
    peer = peer_versions(arguments.nemo_python, "nemo", "torch")
    known = versions() | {"nemo": peer["nemo"], "nemo_torch": peer["torch"]}
    result = {"machine": machine(), "versions": known, "threads": arguments.threads}
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.models:
            result[name] = measure(name, arguments, folder)
    if "random-110m" in result:
        result["goals"] = goals_met(result["random-110m"])
    write_result(arguments.out, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
