"""The first ten minutes on a GPU, by one command: does it work, is it right, how fast is it?

    python -m benchmarks.first_contact --out first.json                     # 240 s at most
    python -m benchmarks.first_contact --out first.json --only machine,check_loss
    python -m benchmarks.first_contact --out dry.json --dry                 # on a CPU, tiny sizes

The most telling steps come first, in processes of their own: what raises, hangs or takes the device
down costs the rest of its step alone, and each result is in the file at once. Checks compare with
the same computation on the CPU (or with NeMo's golden values) and say by how much they differ. Most
of their time compiles kernels, so that several run at once. Timings run alone: medians of ten,
after a warm-up, beside the goals of docs/gpu.md. A table is printed at the end, and `--plot
FILE.svg` draws RTFx over the batch size.

Exit status 1: a step failed or a check is beyond its limit.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import commit, first_contact_tools, machine
from fastconformer.checkpoint.files import atomic_file

SECONDS = 240
TOGETHER = 4  # checks at a time, where there are cores for them


def worker(connection, steps: dict[str, Callable], dry: bool) -> None:
    """Runs the steps that it is told by name, tells their rows as they come, and answers each."""
    kept: dict = {}  # models and the like, from one step to the next
    first_contact_tools.tell = lambda row: connection.send({"row": row})
    while (name := connection.recv()) is not None:
        try:
            connection.send({"result": steps[name](dry, kept)})
        except Exception as error:  # whatever it is, it belongs in the report
            lines = str(error).strip().splitlines() or [""]
            connection.send({"error": f"{type(error).__name__}: {lines[0]}"})


class Worker:
    """A process that runs steps; a new one takes its place where one hangs or dies."""

    def __init__(self, steps: dict[str, Callable], dry: bool):
        self.steps, self.dry, self.process = steps, dry, None

    def run(self, name: str, limit_s: float) -> dict:
        context = multiprocessing.get_context("spawn")  # CUDA does not live through a fork
        if self.process is None:
            self.connection, child = context.Pipe()
            self.process = context.Process(target=worker, args=(child, self.steps, self.dry))
            self.process.start()
            child.close()
        start, rows, answer = time.monotonic(), [], {"row": None}
        try:
            self.connection.send(name)
            while "row" in answer:
                if self.connection.poll(max(0.0, start + limit_s - time.monotonic())):
                    answer = self.connection.recv()
                    rows += [answer["row"]] if "row" in answer else []
                else:
                    answer = {"error": f"not done in {limit_s:.0f} s"}
        except (EOFError, OSError):
            self.process.join()
            answer = {"error": f"its process ended with {self.process.exitcode}"}
        if "error" in answer:
            # After an illegal access nothing on the device works for that process, whoever says so.
            self.close()
            kinds = ("checks", "ok"), ("timings", "unit")
            answer["result"] = {kind: [r for r in rows if key in r] for kind, key in kinds}
        return answer | {"seconds": round(time.monotonic() - start, 2)}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def run(
    steps: dict[str, Callable],
    limits: dict[str, float],
    dry: bool,
    seconds: float,
    report: Path,
    together: int = 1,
) -> dict:
    """Runs the steps within `seconds`, writing the report after each; `together`: so many checks in
    a row run at once, each in a process of its own."""
    result = {"benchmark": "first_contact", "commit": commit(), "machine": machine()}
    result |= {"dry": dry, "steps": {}}
    started, done, lock = time.monotonic(), {}, threading.Lock()

    def step(name: str, helper: Worker) -> None:
        left = seconds - (time.monotonic() - started)
        if left < 2:
            found = {"error": f"not begun: {seconds:.0f} s were over"}
        else:
            print(f"{name} ...", file=sys.stderr, flush=True)
            found = helper.run(name, min(left, limits.get(name, seconds)))
        with lock:
            done[name] = found
            result["steps"] = {name: done[name] for name in steps if name in done}
            result["seconds"] = round(time.monotonic() - started, 1)
            result["failed"] = failures(result["steps"])
            with atomic_file(report) as temporary:
                temporary.write_text(json.dumps(result, indent=1) + "\n")

    def alone(name: str) -> None:
        with contextlib.closing(Worker(steps, dry)) as helper:
            step(name, helper)

    with contextlib.closing(Worker(steps, dry)) as helper:
        for are_checks, names in itertools.groupby(steps, lambda name: name.startswith("check_")):
            if are_checks and together > 1:
                with ThreadPoolExecutor(together) as pool:
                    list(pool.map(alone, names))
            else:
                for name in names:
                    step(name, helper)
    return result


def checks_together() -> int:
    """How many checks may run at a time: the card may be set to take one process alone."""
    with contextlib.suppress(OSError):
        asked = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]
        if "Exclusive" in subprocess.run(asked, capture_output=True, text=True).stdout:
            return 1
    return max(1, min(TOGETHER, (os.cpu_count() or 1) // 2))


def failures(steps: dict[str, dict]) -> list[str]:
    """What went wrong: steps that failed, checks beyond their limit."""
    found = []
    for name, step in steps.items():
        if "error" in step:
            found.append(f"{name}: {step['error']}")
        for row in step.get("result", {}).get("checks", ()):
            if not row["ok"]:
                found.append(f"{name}: {row['what']} is {row['value']}, limit {row['limit']}")
    return found


def table(result: dict) -> str:
    lines = []
    for name, step in result["steps"].items():
        lines.append(
            f"{name} ({step.get('seconds', 0)} s)"
            + (f": {step['error']}" if "error" in step else "")
        )
        of_step = step.get("result", {})
        for row in of_step.get("checks", ()):
            word = "ok  " if row["ok"] else "FAIL"
            lines.append(f"  {word} {row['what']:<52} {row['value']:>10} limit {row['limit']}")
        for row in of_step.get("timings", ()):
            goal = f"goal {row['goal']}" if row.get("goal") is not None else ""
            lines.append(f"  {row['what']:<57} {row['value']:>10} {row['unit']:<7} {goal}")
        for key, value in of_step.get("facts", {}).items():
            lines.append(f"  {key}: {value}")
    return "\n".join(lines)


def plot(result: dict) -> str:
    """RTFx over the batch size, a line for each model and dtype."""
    from benchmarks.charts import line_charts

    series: dict[str, list] = {}
    for step in result["steps"].values():
        for row in step.get("result", {}).get("timings", ()):
            if row["unit"] == "RTFx" and "batch" in row:
                series.setdefault(row["series"], []).append((row["batch"], row["value"]))
    if not series:
        raise ValueError("no RTFx was measured, there is nothing to plot")
    chart = {"title": "Real-time factor", "x": "clips a batch", "y": "RTFx", "log": True}
    return line_charts([chart | {"series": series}])


def main(argv: list[str] | None = None) -> int:
    from benchmarks.first_contact_steps import LIMITS, STEPS

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_contact",
        description=__doc__,
        epilog="example: python -m benchmarks.first_contact --out first.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--only", metavar="STEPS", help=f"of {','.join(STEPS)}")
    parser.add_argument("--dry", action="store_true", help="all of it on a CPU, at tiny sizes")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="at most (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    args = parser.parse_args(argv)
    names = args.only.split(",") if args.only else list(STEPS)
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"--only names {unknown[0]}, which is none of {', '.join(STEPS)}")
    if not args.dry:
        import torch

        if not torch.cuda.is_available():
            print("error: this torch sees no GPU; --dry runs on a CPU", file=sys.stderr)
            return 1
    steps = {name: STEPS[name] for name in names}
    if args.dry:  # before the worker, in which torch may load Triton at any step
        os.environ["TRITON_INTERPRET"] = "1"
    limits, together = ({}, 1) if args.dry else (LIMITS, checks_together())
    result = run(steps, limits, args.dry, args.seconds, args.out, together)
    print(table(result))
    if args.plot:
        args.plot.write_text(plot(result))
    for failure in result["failed"]:
        print(f"error: {failure}", file=sys.stderr)
    print(
        json.dumps(
            {"out": str(args.out), "seconds": result["seconds"], "failed": len(result["failed"])}
        )
    )
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
