"""The transducer loss from projected states to all gradients: time and memory, beside its peers.

    python -m benchmarks.losses --nemo-python nemo-venv/bin/python

On a CPU (B=4, T'=200, U=40, V=1024, H=640, RNNT and TDT; float32, or bfloat16 by autocast where
the name ends in -bf16):

    fused, fused-eps    ours; every cell, those of occupancy 1e-7 and more
    joint+loss          the joint tensor in plain PyTorch, then our `rnnt_loss` or `tdt_loss`
    pytorch             the joint tensor, log_softmax and the recursion by autograd (RNNT)
    nemo                NeMo's joint and its numba RNNT loss, in one turn (with
                        --nemo-python; NeMo 3.0 has no TDT loss of that kind for a CPU)

On a GPU, where one is at hand, bfloat16 and the shapes of SHAPES: `fused` and `fused-eps`,
torchaudio's `rnnt_loss` (RNNT only), transformers' `tdt_loss` (TDT only) and NeMo's numba loss
with its best sub-batch, each if it can be imported and fits.

Each side is a process of its own; they take turns of some passes, the first of which, after the
wait, is not counted. Medians are compared, of wall times; beside them stands the processor time of
all threads, which other load on the machine moves less.
Memory on a CPU is the peak resident set beyond what inputs, libraries and a tiny warm-up took; that
of the joint tensor is measured where it is below --joint-mib, and else on an eighth of a clip and
scaled, as all of it grows with the number of cells. The last line is the result as JSON; it is also
written to `--out`.
"""

import argparse
import json
import os
import statistics
import sys
import time

import torch
from torch.nn import functional as F

from benchmarks import add_out, machine, peer_versions, versions, write_result
from benchmarks.workers import Worker, WorkerFailed, reply

WIDTH = 640
PASSES = 3  # of a turn
DURATIONS = (0, 1, 2, 3, 4)
CPU_SHAPES = ((4, 200, 40, 1024, ()), (4, 200, 40, 1024, DURATIONS))
SHAPES = (
    (32, 375, 120, 1024, DURATIONS),
    (32, 375, 120, 8192, DURATIONS),
    (32, 400, 128, 1024, ()),
)
CPU_SIDES = ("fused", "fused-eps", "joint+loss", "fused-eps-bf16", "joint+loss-bf16", "pytorch")
GPU_SIDES = ("fused", "fused-eps", "torchaudio", "transformers")
GOALS_MS = {"(32, 375, 120, 1030)": 13, "(32, 375, 120, 8198)": 100}


# ---- in the workers: torch and the peer that is measured


def make(batch, n_frames, n_tokens, vocab, durations, device, seed=0):
    """Leaves (enc_proj, pred_proj, weight, bias), targets and lengths, all clips of full length."""
    torch.manual_seed(seed)
    n_outputs = vocab + 1 + len(durations)
    leaves = [
        torch.randn(batch, n_frames, WIDTH),
        torch.randn(batch, n_tokens + 1, WIDTH),
        0.05 * torch.randn(n_outputs, WIDTH),
        torch.randn(n_outputs),
    ]
    leaves = [x.to(device).requires_grad_() for x in leaves]
    targets = torch.randint(0, vocab, (batch, n_tokens)).to(device)
    lengths = [torch.full((batch,), n, device=device) for n in (n_frames, n_tokens)]
    return leaves, (targets, *lengths)


def joint(enc, pred, weight, bias):
    return F.linear(torch.relu(enc[:, :, None] + pred[:, None]), weight, bias)


def pytorch_rnnt(logits, targets, n_frames, n_tokens, blank):
    """RNNT by autograd, one anti-diagonal at a time; clips of one length."""
    log_probs = logits.float().log_softmax(-1)
    n_frames, n_tokens = int(n_frames[0]), int(n_tokens[0])
    blanks = log_probs[..., blank]
    index = targets[:, None, :, None].expand(-1, n_frames, -1, 1)
    labels = log_probs[:, :, :-1].gather(-1, index)[..., 0]
    alpha = blanks.new_full((len(targets), n_tokens + 1), -torch.inf)
    alpha = torch.cat([torch.zeros_like(alpha[:, :1]), alpha[:, 1:]], 1)
    row = torch.arange(n_tokens + 1, device=logits.device)
    for n in range(1, n_frames + n_tokens):
        frame = n - row
        stay = (frame - 1).clamp(0, n_frames - 1)
        by_blank = alpha + blanks[:, stay, row]
        by_label = alpha[:, :-1] + labels[:, frame[1:].clamp(0, n_frames - 1), row[:-1]]
        by_blank = by_blank.masked_fill((frame < 1) | (frame > n_frames - 1), -1e30)
        by_label = by_label.masked_fill((frame[1:] < 0) | (frame[1:] > n_frames - 1), -1e30)
        by_label = F.pad(by_label, (1, 0), value=-1e30)
        alpha = torch.logaddexp(by_blank, by_label)
    return -(alpha[:, -1] + blanks[:, -1, -1])


def side_of(name, leaves, batch, vocab, durations):
    """A function that runs one forward and backward pass and returns the mean loss."""
    device = leaves[0].device.type
    half = name.endswith("-bf16") or device == "cuda"
    options = dict(durations=durations or None, reduction="mean_batch")

    def value():
        if name.startswith("fused"):
            from fastconformer.losses import fused_transducer_loss

            eps = 1e-7 if "eps" in name else 0.0
            return fused_transducer_loss(*leaves, *batch, eps=eps, **options)
        if name.startswith("nemo"):
            return nemo_loss(leaves, batch, vocab, durations, int(name.partition("/")[2] or 0))
        logits = joint(*leaves)
        targets, n_frames, n_tokens = (x.int() for x in batch)
        if name.startswith("joint+loss"):
            from fastconformer.losses import rnnt_loss, tdt_loss

            if durations:
                return tdt_loss(logits, *batch, durations, vocab)
            return rnnt_loss(logits, *batch, vocab)
        if name == "torchaudio":
            import torchaudio

            return torchaudio.functional.rnnt_loss(
                logits.float(), targets, n_frames, n_tokens, blank=vocab
            )
        if name == "transformers":
            from transformers.loss.loss_tdt import tdt_loss

            tokens, of_duration = logits[..., : vocab + 1], logits[..., vocab + 1 :]
            return tdt_loss(tokens, of_duration, *batch, vocab, list(durations))
        return pytorch_rnnt(logits, *batch, vocab).mean()

    def step():
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            loss = value()
        loss.backward()
        return loss.item()

    return step


def nemo_loss(leaves, batch, vocab, durations, sub_batch):
    """NeMo's joint activation and output in autocast, its loss in float32, by sub-batches."""
    from nemo.collections.asr.losses.rnnt import RNNTLoss

    name = "tdt" if durations else "warprnnt_numba"
    kwargs = {"durations": list(durations), "sigma": 0.0, "omega": 0.0} if durations else None
    loss = RNNTLoss(num_classes=vocab, reduction="sum", loss_name=name, loss_kwargs=kwargs)
    enc, pred, weight, bias = leaves
    total, n_clips = 0.0, len(enc)
    for lo in range(0, n_clips, sub_batch or n_clips):
        hi = lo + (sub_batch or n_clips)
        targets, n_frames, n_tokens = (x[lo:hi] for x in batch)
        logits = joint(enc[lo:hi], pred[lo:hi], weight, bias).float()
        part = loss(
            log_probs=logits, targets=targets, input_lengths=n_frames, target_lengths=n_tokens
        )
        total = total + part / n_clips
    return total


def work(name: str, shape, threads: int, device: str):
    """A worker's life: a line on stdin is a turn."""
    torch.set_num_threads(threads)
    if name.startswith("nemo") and device == "cpu":
        import numba

        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    vocab, durations = shape[3], tuple(shape[4])
    leaves, batch = make(*shape[:4], durations, device)
    step = side_of(name, leaves, batch, vocab, durations)
    if name.startswith("nemo") and device == "cpu":
        side_of(name, *make(1, 3, 2, vocab, durations, device), vocab, durations)()  # compiled
    else:
        step()  # warm: compiled, caches filled
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    reply(ready=True)
    for _ in sys.stdin:
        step()
        answer = {"seconds": [], "cpu_seconds": []}
        for _ in range(PASSES):
            start, start_cpu = time.perf_counter(), time.process_time()
            answer["loss"] = step()
            if device == "cuda":
                torch.cuda.synchronize()
            answer["seconds"].append(time.perf_counter() - start)
            answer["cpu_seconds"].append(time.process_time() - start_cpu)
        if device == "cuda":
            answer["extra_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        reply(**answer)


def memory(name: str, shape, threads: int):
    """Tells how far one pass raises the peak resident set, in MiB."""
    from fastconformer import process_memory

    torch.set_num_threads(threads)
    durations = tuple(shape[4])
    leaves, batch = make(1, 3, 2, shape[3], durations, "cpu")
    side_of(name, leaves, batch, shape[3], durations)()
    leaves, batch = make(*shape[:4], durations, "cpu")
    step = side_of(name, leaves, batch, shape[3], durations)
    if not process_memory.forget_peak():
        raise SystemExit("memory is measured on Linux")
    before = process_memory.peak_bytes()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    reply(mib=(process_memory.peak_bytes() - before) / 2**20, seconds=seconds)


# ---- in the parent


def start(python, mode, name, shape, threads, device) -> Worker:
    words = [mode, name, "--shape", json.dumps(shape), "--threads", str(threads)]
    return Worker(name, python, "benchmarks.losses", [*words, "--device", device], threads)


def compare(sides: dict[str, str], shape, threads, device, repeats) -> dict:
    """{side: {median_s, ...}}, or {side: {not_run: reason}}; one warm worker each, in turns."""
    workers, rows = [], {}
    for name, python in sides.items():
        worker = start(python, "--work", name, shape, threads, device)
        try:
            worker.answer()
            workers.append(worker)
        except WorkerFailed as error:
            rows[name] = {"not_run": str(error)}
            worker.close()
    turns = {worker.name: [] for worker in workers}
    for turn in range(repeats):
        for worker in workers:
            if turn == 0 or worker.name != "nemo":
                turns[worker.name].append(worker.ask("go"))
    for worker in workers:
        worker.close()
        answers = turns[worker.name]
        seconds, cpu_seconds = (
            [x for answer in answers for x in answer[key]] for key in ("seconds", "cpu_seconds")
        )
        rows[worker.name] = {
            "median_s": round(statistics.median(seconds), 4),
            "median_cpu_s": round(statistics.median(cpu_seconds), 4),
            "all_s": [round(s, 4) for s in seconds],
            "loss": answers[-1]["loss"],
        }
        if "extra_mib" in answers[-1]:
            rows[worker.name]["extra_mib"] = round(answers[-1]["extra_mib"], 1)
    return rows


def memory_table(batches, vocabs, n_frames, n_tokens, threads, joint_mib) -> list[dict]:
    """Extra memory of the fused loss over batch sizes and vocabularies, and of the joint tensor."""

    def measure(name, *shape):
        worker = start(sys.executable, "--memory", name, (*shape, DURATIONS), threads, "cpu")
        try:
            return worker.answer()
        finally:
            worker.close()

    table = []
    for vocab in vocabs:
        part = n_frames // 8
        per_clip = measure("joint+loss", 1, part, n_tokens, vocab)["mib"] * n_frames / part
        for batch in batches:
            joint_mib_here, measured = per_clip * batch, per_clip * batch <= joint_mib
            if measured:
                joint_mib_here = measure("joint+loss", batch, n_frames, n_tokens, vocab)["mib"]
            row = measure("fused-eps", batch, n_frames, n_tokens, vocab)
            table.append(
                {
                    "shape": [batch, n_frames, n_tokens, vocab + 1 + len(DURATIONS)],
                    "fused_mib": round(row["mib"], 1),
                    "joint_tensor_path_mib": round(joint_mib_here, 1),
                    "joint_tensor_path": "measured" if measured else "scaled",
                    "ratio": round(joint_mib_here / row["mib"], 1),
                    "seconds": round(row["seconds"], 2),
                }
            )
            print(table[-1], flush=True)
    return table


def measure(arguments) -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    about = machine() | {"threads": arguments.threads, "gpu": gpu}
    result = {"machine": about, "versions": versions()}
    if arguments.nemo_python:
        result["versions"] |= peer_versions(arguments.nemo_python, "nemo")
    if "cpu" in arguments.parts:
        result["cpu"] = []
        for shape in [arguments.cpu_shape] if arguments.cpu_shape else CPU_SHAPES:
            sides = dict.fromkeys(arguments.sides, sys.executable)
            if shape[4]:
                sides.pop("pytorch", None)
            elif arguments.nemo_python:
                sides["nemo"] = arguments.nemo_python
            rows = compare(sides, shape, arguments.threads, "cpu", arguments.repeats)
            of_shape = {"shape": shape, "rows": rows}
            for ours in ("fused", "fused-eps", "fused-eps-bf16"):
                of_shape[f"wall_time_over_{ours}"] = {
                    name: round(row["median_s"] / rows[ours]["median_s"], 2)
                    for name, row in rows.items()
                    if "median_s" in row and ours in rows
                }
            result["cpu"].append(of_shape)
            print(json.dumps(of_shape), flush=True)
    if "memory" in arguments.parts:
        table = memory_table(
            arguments.batches, arguments.vocabs, arguments.frames, arguments.tokens,
            arguments.threads, arguments.joint_mib,
        )  # fmt: skip
        result["memory"] = table
    if "gpu" in arguments.parts and torch.cuda.is_available():
        result["gpu"] = []
        for shape in SHAPES:
            durations = shape[4]
            sides = dict.fromkeys(GPU_SIDES, sys.executable)
            sides.pop("torchaudio" if durations else "transformers")
            if arguments.nemo_python:
                sides |= {f"nemo/{n}": arguments.nemo_python for n in (2, 8, 32)}
            rows = {}
            for name, python in sides.items():  # one at a time: each may need most of the memory
                rows |= compare({name: python}, shape, 4, "cuda", 2 * arguments.repeats)
            label = str((*shape[:3], shape[3] + 1 + len(durations)))
            result["gpu"].append({"shape": label, "goal_ms": GOALS_MS.get(label), "rows": rows})
            print(json.dumps(result["gpu"][-1]), flush=True)
    elif "gpu" in arguments.parts:
        result["gpu"] = "not run: no CUDA device"
    return result


def main(argv=None) -> int | None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.losses",
        description=__doc__.split("\n\n")[0],
        epilog="example: python -m benchmarks.losses --parts cpu --cpu-shape '[1, 20, 5, 32, []]'",
    )
    parser.add_argument("--nemo-python", help="python of an environment with NeMo")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    parser.add_argument("--sides", nargs="+", choices=CPU_SIDES, default=CPU_SIDES, help="on a CPU")
    parts = ["cpu", "memory", "gpu"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--cpu-shape", type=json.loads, help="[B, T, U, V, durations], as JSON")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--vocabs", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--frames", type=int, default=375)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument(
        "--joint-mib", type=float, default=8000, help="memory the joint tensor's path may take"
    )
    add_out(parser, "losses")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.work:
        return work(arguments.work, arguments.shape, arguments.threads, arguments.device)
    if arguments.memory:
        return memory(arguments.memory, arguments.shape, arguments.threads)
    from fastconformer import cli  # not in a peer's environment

    return cli.run("losses", lambda: run(arguments))


def run(arguments) -> None:
    result = measure(arguments)
    write_result(arguments.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
