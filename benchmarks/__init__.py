"""Measurements, side by side with peers; results are kept as JSON in `results/`."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """What git calls this checkout, `-dirty` where files differ from it; None without git."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
