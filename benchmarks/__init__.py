"""Measurements, side by side with peers: what all of them share."""

import argparse
import contextlib
import json
import os
import platform
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SPEECH = REPOSITORY / "samples" / "talk.ogg"  # four minutes
RUNS = Path("runs/benchmarks")  # results by default; `--out` names a published one to renew it


def add_out(parser: argparse.ArgumentParser, name: str | None = None) -> None:
    """`--out`; without a name the benchmark has several forms, each with a name of its own."""
    default = name and RUNS / f"{name}.json"
    text = f"({RUNS}/{name or parser.prog.rpartition('.')[2] + '_FORM'}.json)"
    parser.add_argument("--out", type=Path, default=default, metavar="FILE.json", help=text)


def write_result(path: Path, result: dict) -> None:
    """The result as JSON, whole or not at all, and a line that says where it lies."""
    from fastconformer.checkpoint.files import atomic_file  # torch; some peers have none

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def machine() -> dict:
    told = ""
    with contextlib.suppress(OSError):
        told = Path("/proc/cpuinfo").read_text()
    names = [x.split(":", 1)[1].strip() for x in told.splitlines() if x.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "bf16": [f for f in ("avx512_bf16", "amx_bf16") if f" {f}" in told],
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict:
    """Of Python, torch and this checkout."""
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit()}


def commit() -> str | None:
    """What git calls this checkout, `-dirty` where files differ from it; None without git."""
    command = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None


def peer_versions(python: str, *packages: str) -> dict:
    """{package: version} in a peer's environment.

    Raises:
        ValueError: there is no such Python, or it cannot import one of them.
    """
    script = f"""import json
from importlib import import_module
print("@", json.dumps({{p: str(import_module(p).__version__) for p in {packages!r}}}))"""
    try:
        done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"{python} cannot be run: {error.strerror}") from None
    answers = [line[2:] for line in done.stdout.splitlines() if line.startswith("@ ")]
    if not answers:
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise ValueError(f"{python} cannot import {' and '.join(packages)}: {reason}")
    return json.loads(answers[-1])
