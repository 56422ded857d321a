"""The WKV7 operator's speed: on a CPU the chunked form beside the loop, on a GPU beside its peers.

    python -m benchmarks.wkv7                        # CPU: speed at T = 2000, growth to 100,000
    python -m benchmarks.wkv7 --device cuda          # the kernels at three shapes, both directions

CPU: forward, and forward with backward, of `backend="chunked"` and of `backend="reference"` (the
loop), float32; then time and memory a frame of the chunked form as T grows. Each figure is the
least of several runs; CPU seconds of the process stand beside wall time, since they suffer less
from other work on the machine. Memory is the peak resident set less what was resident before the
inputs were made, so it counts inputs, output and working memory.

GPU: forward, and forward with backward, of both directions at the given shapes, bfloat16: our fused
kernels; flash-linear-attention's `chunk_rwkv7`, if it is installed, and a sequential kernel (one
thread a state row, one frame after another), both with the reverse direction by concatenated
flips, as the BiRWKV7 fork runs it. Errors are those of y beside float64 on the shape's first 2048
frames and two heads. Not yet run: no GPU has been at hand.

The last line printed is the result as JSON; it is also written to `--out`.
"""

import argparse
import ctypes
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import RUNS, add_out, machine, versions, write_result
from fastconformer import cli, process_memory
from rwkv_cuda import build, wkv7, wkv7_bidirectional

GPU_SHAPES = ((1, 360_000, 16, 64), (64, 6_000, 16, 64), (8, 4_096, 64, 64))


def make_inputs(shape, dtype=torch.float32, device="cpu", seed=0):
    """r, w, k, v, a, b as a trained block makes them: decays of the fork's range."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal():
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    kappa = F.normalize(normal(), dim=-1)
    w = -F.softplus(normal()) - 0.5
    return [normal(), w, normal(), normal(), -kappa, kappa * torch.sigmoid(normal())]


def least_seconds(run, repeats: int) -> dict[str, float]:
    """Wall and CPU seconds of the fastest of some runs, after one to warm up."""
    run()
    wall, cpu = [], []
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return {"wall": min(wall), "cpu": min(cpu)}


def forward_backward(operator, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = operator(*leaves)
    y = y if torch.is_tensor(y) else torch.stack(y)
    torch.autograd.grad(y, leaves, torch.ones_like(y))


def beside_the_loop(frames: int, heads: int, width: int, repeats: int) -> dict:
    inputs = make_inputs((1, frames, heads, width))
    row = {"frames": frames, "heads": heads, "width": width}
    for name, backend in (("chunked", "chunked"), ("loop", "reference")):
        operator = functools.partial(wkv7, backend=backend)
        count = repeats if backend == "chunked" else max(1, repeats // 3)
        with torch.no_grad():
            seconds = least_seconds(lambda f=operator: f(*inputs), count)
        both = least_seconds(lambda f=operator: forward_backward(f, inputs), max(1, count // 2))
        for kind in ("wall", "cpu"):
            row[f"{name}_{kind}_us_a_frame"] = round(seconds[kind] / frames * 1e6, 2)
            row[f"{name}_training_{kind}_us_a_frame"] = round(both[kind] / frames * 1e6, 2)
    for kind in ("wall", "cpu"):
        for prefix in ("", "training_"):
            ratio = row[f"loop_{prefix}{kind}_us_a_frame"]
            ratio /= row[f"chunked_{prefix}{kind}_us_a_frame"]
            row[f"{prefix}speedup_{kind}"] = round(ratio, 1)
    return row


def growth(frames: int, heads: int, width: int, repeats: int) -> dict:
    """Time and memory of one length, in a fresh process: peaks only ever rise."""
    code = (
        "import json, sys, benchmarks.wkv7 as b;"
        f"print(json.dumps(b.grow({frames}, {heads}, {width}, {repeats})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def grow(frames: int, heads: int, width: int, repeats: int) -> dict:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    with torch.no_grad():
        wkv7(*make_inputs((1, 600, heads, width)))  # what is allocated once
        before = process_memory.resident_bytes()
        inputs = make_inputs((1, frames, heads, width))
        seconds = least_seconds(lambda: wkv7(*inputs), repeats)
    memory = process_memory.peak_bytes() - before
    return {
        "frames": frames,
        "wall_us_a_frame": round(seconds["wall"] / frames * 1e6, 2),
        "cpu_us_a_frame": round(seconds["cpu"] / frames * 1e6, 2),
        "kib_a_frame": round(memory / 1024 / frames, 2),
        "tensors_kib_a_frame": round(7 * heads * width * 4 / 1024, 2),
    }


def on_cpu(options) -> dict:
    heads, width = options.heads, options.width
    loops = [beside_the_loop(options.frames, n, width, options.repeats) for n in heads]
    lengths = [growth(x, heads[0], width, options.repeats) for x in options.growth]
    result = {"beside_the_loop": loops, "growth": lengths}
    if lengths:
        times = [x["cpu_us_a_frame"] for x in lengths]
        result["slowest_over_fastest_length"] = round(max(times) / min(times), 2)
    return result


# ---- GPU


def flipped(operator, inputs):
    """Both directions as the fork runs them: twice the batch, copies before and after."""
    y = operator(*(torch.cat([x, x.flip(1)]) for x in inputs))
    forward, backward = y.chunk(2)
    return forward, backward.flip(1)


def peers() -> dict:
    """Name -> function of r, w, k, v, a, b that gives both directions."""
    found = {"ours": wkv7_bidirectional}
    try:
        from fla.ops.rwkv7 import chunk_rwkv7
    except ImportError as error:
        print(f"flash-linear-attention is not compared: {error}", file=sys.stderr)
    else:

        def fla(r, w, k, v, a, b):
            log_decay = -torch.exp(w.float()).to(w.dtype)
            return chunk_rwkv7(r, log_decay, k, v, a, b, scale=1.0, output_final_state=False)[0]

        found["flash-linear-attention"] = functools.partial(flipped, fla)
    found["sequential (forward only)"] = functools.partial(flipped, sequential_kernel())
    return found


def sequential_kernel():
    """benchmarks/wkv7_sequential.cu, compiled now, for heads 64 wide in bfloat16."""
    source = Path(__file__).with_name("wkv7_sequential.cu")
    nvcc, [arch, *_] = build.find_nvcc(), build.local_arches()
    if nvcc is None:
        raise SystemExit("nvcc is not found; install the CUDA toolkit or set CUDA_HOME")
    folder = tempfile.mkdtemp()
    path = Path(folder) / "sequential.so"
    command = [nvcc, "-O3", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC", "-o", path, source]
    subprocess.run(command, check=True)
    launch = ctypes.CDLL(str(path)).wkv7_sequential
    launch.argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] * 8

    def run(r, w, k, v, a, b):
        y = torch.empty_like(r)
        batch, frames, heads, _ = r.shape
        pointers = [x.data_ptr() for x in (r, w, k, v, a, b, y)]
        code = launch(batch, frames, heads, *pointers, torch.cuda.current_stream().cuda_stream)
        assert code == 0, f"CUDA error {code}"
        return y

    return run


def cuda_milliseconds(run, repeats: int) -> float:
    for _ in range(2):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    best = float("inf")
    for _ in range(repeats):
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize()
        best = min(best, events[0].elapsed_time(events[1]))
    return best


def on_gpu(options) -> dict:
    rows = []
    for shape in options.shape or GPU_SHAPES:
        inputs = make_inputs(shape, torch.bfloat16, "cuda")
        small = [x[:1, :2048, :2].contiguous() for x in inputs]
        exact = torch.stack(wkv7_bidirectional(*(x.double() for x in small), backend="chunked"))
        for name, operator in peers().items():
            row = {"shape": shape, "implementation": name}
            torch.cuda.reset_peak_memory_stats()
            try:
                with torch.no_grad():
                    run = functools.partial(operator, *inputs)
                    row["forward_ms"] = round(cuda_milliseconds(run, options.repeats), 3)
                    y = torch.stack(operator(*small)).double()
                row["error"] = ((y - exact).abs().max() / exact.abs().max()).item()
                if "forward only" not in name:
                    run = functools.partial(forward_backward, operator, inputs)
                    row["forward_backward_ms"] = round(cuda_milliseconds(run, options.repeats), 3)
            except torch.OutOfMemoryError:
                row["failed"] = "out of memory"
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            print(row, flush=True)
            rows.append(row)
    return {"device": torch.cuda.get_device_name(), "rows": rows}


def parse_shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(x) for x in text.split(","))
    if len(shape) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is no B,T,H,N")
    return shape


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser("benchmarks.wkv7", __doc__.split("\n\n")[0], "--threads 2 --heads 4")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--frames", type=int, default=2000, help="CPU: T beside the loop")
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--growth", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--shape", type=parse_shape, nargs="+", metavar="B,T,H,N", help="GPU")
    parser.add_argument("--repeats", type=int, default=6)
    add_out(parser)
    options = parser.parse_args(arguments)
    return cli.run("wkv7", lambda: run(options))


def run(options) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but this torch sees no GPU")
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    result = {"machine": machine(), "versions": versions(), "threads": options.threads}
    result |= on_gpu(options) if options.device == "cuda" else on_cpu(options)
    write_result(options.out or RUNS / f"wkv7_{options.device}.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
