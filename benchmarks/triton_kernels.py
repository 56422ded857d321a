"""Compiles every Triton kernel for GPUs that are not here, by the library's own launches.

    python -m benchmarks.triton_kernels                          # all kernels, three generations
    python -m benchmarks.triton_kernels --target 90 --few        # what the test suite compiles
    python -m benchmarks.triton_kernels --only loss --out F      # one part; F keeps the others

The launches get tensors without data (device "meta") and a driver that names the target, so that
what is compiled is what a GPU would be given: argument types, alignment, blocks, warps. Nothing
runs. Each row of the table is one kernel as compiled: registers a thread, bytes of its stack and of
shared memory a block, tensor-core instructions in its machine code. It is an error if a kernel does
not compile, or asks for more shared memory than the target has.

The last line printed is the result as JSON; it is also written to `--out`, after each case. What
this file holds of the same commit is not compiled again, so that a run that was killed goes on.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks import commit
from fastconformer.checkpoint.files import atomic_file
from fastconformer.decoding import triton_step
from fastconformer.losses import fused_triton
from fastconformer.losses.fused_cells import PADDED_TO, Job, Tile, empty_cells
from fastconformer.networks import (
    triton_attention,
    triton_attention_backward,
    triton_convolution,
    triton_subsampling,
)
from fastconformer.networks.kernels import take_heads

# Shared memory that a block may ask for, bytes: A100; H100 and H200; RTX 50. Asked for by number:
# RTX 30, A10; RTX 40, L4, L40; B200; B300; GB10.
TARGETS = {80: 166_912, 90: 232_448, 120: 101_376}
SHARED_BYTES = TARGETS | {86: 101_376, 89: 101_376, 100: 232_448, 103: 232_448, 121: 101_376}
PARTS = ("attention", "convolution", "subsampling", "step", "loss")
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


@contextlib.contextmanager
def compiling(target: int) -> Iterator[list]:
    """Inside, a launch of a Triton kernel compiles it for sm_<target> and appends (name, compiled
    kernel) to the list that is given."""
    names, found = {}, []
    run = triton.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        if compiled is not None and compiled.hash not in names:
            names[compiled.hash] = kernel.fn.__name__
            found.append((kernel.fn.__name__, compiled))
        return compiled

    before = driver._active
    driver.set_active(
        SimpleNamespace(
            # Kernels are kept by device: one for each target.
            get_current_device=lambda: target,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", target, 32),
            utils=SimpleNamespace(
                get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES[target]}
            ),
        )
    )
    triton.JITFunction.run = compile_only
    try:
        yield found
    finally:
        triton.JITFunction.run = run
        driver._active = before


def launch_loss(
    dtype: torch.dtype,
    durations: tuple[int, ...] | None,
    *,
    dense: bool,
    n_tokens: int = 1024,
    width: int = 640,
    shapes: tuple = ((375, 121), (200, 65), (1, 1)),
    blank: int | None = None,
    activation: str = "relu",
    dropout: float = 0.0,
) -> None:
    """All launches of one training step's loss, on tensors without data."""
    n_classes = n_tokens + 1
    n_outputs = n_classes + len(durations or ())
    n_outputs += -n_outputs % PADDED_TO["cuda"]
    n_frames, n_rows = (max(shape[i] for shape in shapes) for i in (0, 1))
    n_cells = sum(t * u for t, u in shapes)
    n_tile = min(n_cells, 10_000)
    states = torch.float64 if dtype == torch.float64 else torch.float32

    def empty(*shape, dtype=states):
        return torch.empty(shape, dtype=dtype, device="meta")

    longs = [empty(len(shapes), dtype=torch.int64) for _ in range(3)]
    job = Job(
        empty(len(shapes) * n_frames, width), empty(len(shapes) * n_rows, width),
        empty(n_outputs, width, dtype=dtype), empty(n_outputs, dtype=dtype),
        empty(len(shapes), n_rows, dtype=torch.int64), *longs, shapes, n_frames, n_rows, n_cells,
        n_classes - 1 if blank is None else blank, n_classes, durations, 0.0, activation, dropout,
        12345 << 20,
    )  # fmt: skip
    cells = empty_cells(empty(1, width), n_cells, len(durations or ()), dtype)
    index = empty(n_tile, dtype=torch.int64)
    whole = Tile(index, 0, n_tile - 1)
    some = (
        whole if dense else Tile(index, 3, n_cells - 5, 10, empty(n_cells + 1, dtype=torch.int32))
    )
    if dtype != torch.float64:  # scores are plain PyTorch there
        fused_triton.scores(job, whole, cells)
    fused_triton.lattice(job, cells, True)
    rows = fused_triton.hidden(job, some)
    if activation != "relu":
        rows = fused_triton.hidden(job, some, states)
    logits = empty(n_tile, n_outputs, dtype=dtype)
    fused_triton.gradient(job, some, cells, empty(len(shapes)), 0.0, 1.0, logits)
    d_hidden = empty(n_tile, width, dtype=dtype)
    fused_triton.scatter(job, some, rows, d_hidden, empty(*job.enc.shape), empty(*job.pred.shape))


def launch_attention(
    dtype: torch.dtype, heads: int, head: int, n_frames: int, by_query: bool, dropout: float
):
    """Forward, and backward where training takes the kernels."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    width = heads * head
    rows = n_frames if by_query else 1
    q, k, v, grad = (empty(2, n_frames, width) for _ in range(4))
    # under autocast the biases stay what they are
    biases = [empty(heads, head, dtype=torch.float32) for _ in range(2)]
    hidden = empty(2, 1, rows, n_frames, dtype=torch.bool)
    inputs = q, k, v, empty(2 * n_frames - 1, width), *biases, hidden
    drops = dropout, 2**61 if dropout else 0
    results = triton_attention.attention(*inputs, *drops)
    if take_heads(q, head):  # with gradients
        triton_attention_backward.attention_backward(grad, *inputs, *results, *drops, True)


def launch_convolution(dtype: torch.dtype, width: int, taps: int, has_bias: bool):
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    bias, norm = empty(width) if has_bias else None, [empty(width) for _ in range(4)]
    pad_mask = empty(2, 100, dtype=torch.bool)
    triton_convolution.convolution(
        empty(2, 100, 2 * width), pad_mask, empty(width, 1, taps), bias, norm, 1e-5, taps // 2
    )


def launch_subsampling(
    dtype: torch.dtype, channels: int, n_bins: int, causal: bool, n_frames: int = 3001
):
    """By a factor of 8."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    lengths = empty(2, dtype=torch.int64)
    tap_weights, bias = empty(channels, 1, 3, 3), empty(channels)
    weights = tap_weights, bias, tap_weights, bias
    x = triton_subsampling.start(empty(2, n_bins, n_frames), lengths, *weights, causal)
    x = triton_subsampling.stage(x, lengths, tap_weights, bias, 4, causal)
    triton_subsampling.end(x, lengths, 8, causal)


def launch_step(
    dtype: torch.dtype,
    n_tokens: int,
    durations: int,
    window: int,
    biased: bool,
    width: int = 640,
    activation: str = "relu",
):
    """The kernels of a step of greedy decoding."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    batch = 4
    frame, on_frame, lengths, starts = (empty(batch, dtype=torch.int64) for _ in range(4))
    place = frame, lengths, starts, window
    triton_step.window_hidden(empty(99, width), empty(batch, width), *place, activation)
    logits = empty(batch * window, n_tokens + durations)
    read = triton_step.read_logits(logits, empty(n_tokens) if biased else None, n_tokens)
    of_classes = empty(durations, dtype=torch.int64) if durations else None
    records = empty(3, batch, dtype=torch.int64), empty(2, batch, dtype=torch.float32)
    found, _ = triton_step.take_label(
        *read, of_classes, frame, on_frame, lengths, *records, n_tokens - 1, 10
    )
    gates, state = empty(batch, 4 * width), empty(batch, width)
    triton_step.lstm_state(gates, empty(batch, 4 * width), state, empty(batch, width), found)


def launches(few: bool) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(its part, what it is, what launches it)."""
    tdt = (0, 1, 2, 3, 4)
    names = ("bf16",) if few else ("bf16", "fp16", "fp32")
    sizes = ((8, 128),) if few else tuple((8, k) for k in (128, 16, 32, 44, 64, 80, 96))
    masks, dropouts = ((False,), (0.1,)) if few else ((False, True), (0.0, 0.1))
    for (heads, head), name, by_query, dropout in itertools.product(sizes, names, masks, dropouts):
        if dropout and not take_heads(torch.empty(0, dtype=DTYPES[name]), head):
            continue
        what = f"{name} {heads} heads of {head}" + (" by query" if by_query else "")
        yield (
            "attention",
            what + (" dropout" if dropout else ""),
            partial(launch_attention, DTYPES[name], heads, head, 375, by_query, dropout),
        )
    channels = ((1024, 9, True), (176, 31, False), (512, 9, False), (333, 5, True))
    for (width, taps, biased), name in itertools.product(channels[: 1 if few else None], names):
        yield (
            "convolution",
            f"{name} {width} channels, {taps} taps",
            partial(launch_convolution, DTYPES[name], width, taps, biased),
        )
    inputs = ((256, 128, False), (256, 80, True), (512, 80, False), (36, 64, False))
    for (width, n_bins, causal), name in itertools.product(inputs[: 1 if few else None], names):
        yield (
            "subsampling",
            f"{name} {width} channels, {n_bins} bins" + (" causal" if causal else ""),
            partial(launch_subsampling, DTYPES[name], width, n_bins, causal),
        )
    steps = (
        (1025, 5, 8, False),
        (8193, 0, 1, True),
        (38, 3, 4, False, 333, "tanh"),
        (1025, 0, 8, False, 320, "sigmoid"),
        (16385, 5, 8, True, 1024),
    )
    for step, name in itertools.product(steps[: 1 if few else None], names):
        yield (
            "step",
            f"{name} step of {step[2]}, {step[0]} tokens, {step[1]} durations",
            partial(launch_step, DTYPES[name], *step),
        )
    if few:
        for name, durations, dense in (("bf16", tdt, True), ("fp32", None, False)):
            yield (
                "loss",
                label(name, durations, dense),
                partial(launch_loss, DTYPES[name], durations, dense=dense),
            )
        return
    options = {
        "": {},
        " V=8192": {"n_tokens": 8192},
        " odd": {"n_tokens": 37, "width": 333, "shapes": ((7, 3), (5, 2)), "blank": 0},
        " tanh dropout": {"activation": "tanh", "dropout": 0.2},
        " sigmoid": {"activation": "sigmoid"},
        " long text": {"shapes": ((1500, 1500), (900, 600))},
        " 100 clips": {"shapes": ((100, 40),) * 100},
    }
    for what, name, durations, dense in itertools.product(
        options, DTYPES, (tdt, None), (True, False)
    ):
        yield (
            "loss",
            label(name, durations, dense) + what,
            partial(launch_loss, DTYPES[name], durations, dense=dense, **options[what]),
        )


def compilations(n_batches: int, target: int = 90) -> int:
    """Kernels that a run of random batches compiles, dense and eps in turn: clips of log-normal
    length (2.3, 0.6; 1.5 to 35 s), about 400 s a batch, 12.5 frames and 4 tokens a second. Counted
    by what Triton would ask its compiler for; nothing is compiled."""
    generator, keys = np.random.default_rng(0), set()
    do_compile = triton.JITFunction._do_compile

    def record(kernel, key, *rest):
        keys.add((kernel.fn.__name__, str(key)))

    triton.JITFunction._do_compile = record
    try:
        with compiling(target):
            for i in range(n_batches):
                seconds = np.clip(np.exp(generator.normal(2.3, 0.6, 60)), 1.5, 35.0)
                seconds = seconds[: int((seconds.cumsum() < 400).sum())]
                shapes = tuple((int(12.5 * s) + 1, int(4 * s) + 1) for s in seconds)
                launch_loss(torch.bfloat16, (0, 1, 2, 3, 4), dense=i % 2 == 0, shapes=shapes)
    finally:
        triton.JITFunction._do_compile = do_compile
    return len(keys)


def label(dtype: str, durations, dense: bool) -> str:
    return f"{dtype} {'tdt' if durations else 'rnnt'} {'dense' if dense else 'eps'}"


def resources(compiled) -> dict:
    """Registers, stack and shared memory, and tensor-core instructions by kind."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [folder / "cuobjdump", option, file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    kinds = re.findall(r"\b(HGMMA|HMMA|DMMA|IMMA|UTCHMMA)\b", code)
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "tensor_core": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
    }


def measure(
    parts: dict[str, dict], targets: list[int], few: bool, only: list[str] | None
) -> Iterator[None]:
    """Compiles what `parts` lacks and adds it there, case by case: rows of the table, what went
    wrong. A row stands for all launches of a part whose kernel came out with the same numbers."""
    known = {}
    cases = {(part, what): launch for f in (True, few) for part, what, launch in launches(f)}
    for ((part, what), launch), target in itertools.product(cases.items(), targets):
        if only and part not in only:
            continue
        kept = parts.setdefault(
            part, {"commit": commit(), "seconds": 0, "cases": {}, "errors": [], "kernels": []}
        )
        if target in kept["cases"].setdefault(what, []):
            continue
        begun, errors = time.monotonic(), kept["errors"]
        with compiling(target) as found:
            try:
                launch()
            except triton.CompilationError as error:
                reason = " ".join(str(error.__cause__ or error).split())
                errors.append(f"sm_{target}, {what}: {reason}")
        for name, compiled in found:
            key = target, compiled.hash
            if key not in known:
                known[key] = resources(compiled)
            numbers = {"target": target, "kernel": name, **known[key]}
            for row in kept["kernels"]:
                if row.items() >= numbers.items():
                    row["launches"] += 1
                    break
            else:
                kept["kernels"].append({"for": what, "launches": 1, **numbers})
            if numbers["shared"] > SHARED_BYTES[target]:
                errors.append(f"sm_{target}, {what}: {name} wants {numbers['shared']} shared bytes")
        kept["cases"][what].append(target)
        kept["seconds"] = round(kept["seconds"] + time.monotonic() - begun, 1)
        yield


def parts_kept(path: Path | None, only: list[str] | None) -> dict[str, dict]:
    """What the file holds: of the parts that are asked for, those of this very commit."""
    if path is None or not path.exists():
        return {}
    kept = json.loads(path.read_text())
    same = kept.get("triton") == triton.__version__
    at = commit()
    return {
        part: table
        for part, table in kept.get("parts", {}).items()
        if (only and part not in only)
        or (same and table["commit"] == at and not str(at).endswith("-dirty"))
    }


def written(result: dict) -> str:
    """As JSON, a kernel a line."""
    parts = []
    for part, kept in result["parts"].items():
        rows = ",\n   ".join(map(json.dumps, kept["kernels"]))
        head = json.dumps(kept | {"kernels": []}).removesuffix("[]}")
        parts.append(f"  {json.dumps(part)}: {head}[\n   {rows}\n  ]}}")
    head = json.dumps(result | {"parts": {}}, indent=1).removesuffix("{}\n}")
    return f"{head}{{\n" + ",\n".join(parts) + "\n }\n}\n"


def table(rows: list[dict]) -> str:
    lines = ["target kernel              regs stack shared warps local tensor-core    first for"]
    for row in rows:
        units = " ".join(f"{n} {kind}" for kind, n in row["tensor_core"].items()) or "-"
        lines.append(
            f"sm_{row['target']:<3} {row['kernel']:<19} {row['registers']:4} {row['stack']:5} "
            f"{row['shared']:6} {row['warps']:5} {row['spills']:5} {units:<14} {row['for']}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.triton_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--target",
        type=int,
        action="append",
        choices=SHARED_BYTES,
        help=f"{', '.join(map(str, TARGETS))} by default",
    )
    parser.add_argument("--few", action="store_true", help="one case of each kind")
    parser.add_argument("--only", action="append", choices=PARTS, help="all by default")
    parser.add_argument(
        "--batches", type=int, metavar="N", help="count what N random batches compile, nothing else"
    )
    parser.add_argument("--out", type=Path, help="also write the JSON here, beside what it has")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("0", ""):
        print("error: TRITON_INTERPRET is set; the interpreter compiles nothing", file=sys.stderr)
        return 1
    if args.batches:
        print(json.dumps({"batches": args.batches, "compilations": compilations(args.batches)}))
        return 0
    parts = parts_kept(args.out, args.only)
    result = {"benchmark": "triton_kernels", "triton": triton.__version__, "parts": parts}
    for _ in measure(parts, args.target or list(TARGETS), args.few, args.only):
        if args.out:  # after each launch: all of them take hours
            with atomic_file(args.out) as temporary:
                temporary.write_text(written(result))
    print(table([row for kept in parts.values() for row in kept["kernels"]]))
    errors = [error for kept in parts.values() for error in kept["errors"]]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    print(json.dumps(result))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
