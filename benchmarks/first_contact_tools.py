"""What the steps of `benchmarks.first_contact` are made of: inputs, distances, times."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TINY = (2, 64, 80, 1)  # layers, width, mels, LSTM layers
TOKENS_PER_SECOND = 3.0

tell: Callable[[dict], None] = lambda row: None  # noqa: E731  hears each row when it is made


def device_of(dry: bool) -> torch.device:
    return torch.device("cpu" if dry else "cuda")


def check(what: str, value: float, limit: float) -> dict:
    """A row: the value must be a number of at most the limit."""
    value, ok = float(f"{value:.3g}"), bool(value <= limit)
    row = {"what": what, "value": value, "limit": limit, "ok": ok}
    tell(row)
    return row


def timing(what: str, value: float, unit: str, goal: float | None = None, **more) -> dict:
    row = {"what": what, "value": float(f"{value:.4g}"), "unit": unit, "goal": goal, **more}
    tell(row)
    return row


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest number expected; NaN fails every limit."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def milliseconds(run, dry: bool, repeats: int = 10) -> float:
    """Median of `repeats`, after two to warm up."""
    repeats = 2 if dry else repeats
    for _ in range(1 if dry else 2):
        run()
    times = []
    for _ in range(repeats):
        if dry:
            start = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - start))
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def loss_inputs(dry: bool, n_tokens: int, n_durations: int, shape=(4, 90, 30), width=640, seed=0):
    if dry:
        n_tokens, width, shape = 30, 20, (2, 7, 3)
    batch, n_frames, n_rows = shape
    generator = torch.Generator().manual_seed(seed)
    n_outputs = n_tokens + 1 + n_durations
    shapes = (
        (batch, n_frames, width),
        (batch, n_rows + 1, width),
        (n_outputs, width),
        (n_outputs,),
    )
    inputs = [0.3 * torch.randn(s, generator=generator) for s in shapes]
    targets = torch.randint(0, n_tokens, (batch, n_rows), generator=generator)
    lengths = torch.linspace(n_frames, 1, batch).long(), torch.linspace(n_rows, 0, batch).long()
    return inputs, targets, *lengths


def speech(seconds: float, batch: int, seed: int = 0) -> np.ndarray:
    """Noise with the loudness of speech, (batch, samples) float32 at 16 kHz."""
    generator = np.random.default_rng(seed)
    n = int(16000 * seconds)
    envelope = np.abs(np.sin(np.arange(n) / 2000.0))
    return (0.1 * envelope * generator.standard_normal((batch, n))).astype(np.float32)
