"""The steps of `benchmarks.first_contact`, in order: each takes (dry, kept) and gives a dict with
"checks", "timings" or "facts". `dry`: on a CPU, tiny; `kept`: what later steps use again."""

import contextlib
import copy
import platform
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks.first_contact_kernels import check_kernels, time_kernels
from benchmarks.first_contact_times import (
    time_graphs,
    time_long,
    time_loss,
    time_stages,
    time_training,
    time_transcription,
    time_wkv7,
)
from benchmarks.first_contact_tools import (
    GOLDEN,
    TINY,
    TOKENS_PER_SECOND,
    check,
    device_of,
    distance,
    loss_inputs,
    milliseconds,
    speech,
    timing,
)


def machine(dry: bool, kept: dict) -> dict:
    from fastconformer.networks import kernels

    facts = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": None,
        "python": platform.python_version(),
    }
    with contextlib.suppress(ImportError):
        import triton

        facts["triton"] = triton.__version__
    with contextlib.suppress(OSError):
        asked = "--query-gpu=name,driver_version,clocks.sm,power.limit,memory.total"
        done = subprocess.run(
            ["nvidia-smi", asked, "--format=csv,noheader"], capture_output=True, text=True
        )
        facts["nvidia-smi"] = done.stdout.strip()
    if not dry:
        free, total = torch.cuda.mem_get_info()
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "free_gib": round(free / 2**30, 1),
            "total_gib": round(total / 2**30, 1),
            "gpus": torch.cuda.device_count(),
            "triton_works": kernels.triton_works(torch.device("cuda", 0)),
        }
    return {"facts": facts}


def peaks(dry: bool, kept: dict) -> dict:
    """What the card gives to a plain product and a plain copy."""
    device, n, rows = device_of(dry), 128 if dry else 8192, []
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        ms = milliseconds(lambda: a @ b, dry)  # noqa: B023
        rows.append(timing(f"product {n}x{n}x{n} {name}", 2 * n**3 / ms / 1e9, "TFLOP/s"))
    torch.set_float32_matmul_precision("highest")
    x = torch.empty(1 << (16 if dry else 30), dtype=torch.uint8, device=device)
    rows.append(
        timing("copy, read and written", 2 * x.numel() / milliseconds(x.clone, dry) / 1e9, "TB/s")
    )
    host = torch.empty(1 << (16 if dry else 28), dtype=torch.uint8, pin_memory=not dry)
    ms = milliseconds(lambda: x[: len(host)].copy_(host, non_blocking=True), dry)
    rows.append(timing("pinned memory to the device", len(host) / ms / 1e6, "GB/s"))
    return {"timings": rows}


def loss_and_gradients(inputs, batch, device, dtype, durations, eps):
    from fastconformer.losses import fused_transducer_loss

    leaves = [x.detach().to(device, dtype, copy=True).requires_grad_() for x in inputs]
    value = fused_transducer_loss(
        *leaves, *(x.to(device) for x in batch), durations or None, eps=eps
    )
    value.mean().backward()
    return [value, *(leaf.grad for leaf in leaves)]


def check_loss(dry: bool, kept: dict) -> dict:
    """The fused transducer loss and all gradients against float64 on the CPU."""
    rows, limits = [], {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 4e-2}
    for durations, n_tokens in (((0, 1, 2, 3, 4), 1024), ((), 1024), ((0, 1, 2, 3, 4), 8192)):
        inputs, *batch = loss_inputs(dry, n_tokens, len(durations))
        for dtype, limit in limits.items():
            rounded = [x.to(dtype).double() for x in inputs]
            expected = loss_and_gradients(rounded, batch, "cpu", torch.float64, durations, 0.0)
            for eps in (0.0, 1e-7):
                actual = loss_and_gradients(inputs, batch, device_of(dry), dtype, durations, eps)
                value = max(distance(a, e) for a, e in zip(actual, expected, strict=True))
                name = f"{'tdt' if durations else 'rnnt'} V={n_tokens} {dtype} eps={eps}"
                rows.append(check(name.replace("torch.", ""), value, limit))
    return {"checks": rows}


def check_wkv7(dry: bool, kept: dict) -> dict:
    """The recurrence and its gradients against float64 on the CPU, one way and both; on a GPU once
    more through NVRTC, as where there is no nvcc."""
    from rwkv_cuda import build

    found = _check_wkv7(dry, "")
    if dry:
        return found
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = build.through_nvrtc(Path(folder))
        except build.BuildError as error:
            return found | {"nvrtc": str(error)}
        with mock.patch.object(build, "load", lambda: library):
            return {"checks": found["checks"] + _check_wkv7(dry, " by NVRTC")["checks"]}


def _check_wkv7(dry: bool, how: str) -> dict:
    from benchmarks.wkv7 import make_inputs
    from rwkv_cuda import wkv7

    rows, device = [], device_of(dry)
    backend = "chunked" if dry else "cuda"
    for frames, reverse, lengths in (
        (16, False, None),
        (333, True, [333, 17]),
        (2500, False, None),
    ):
        if dry and frames > 1000:
            continue
        shape = (2, frames, 2, 64)
        exact = [x.double().requires_grad_() for x in make_inputs(shape)]
        lengths = None if lengths is None else torch.tensor(lengths)
        expected = wkv7(*exact, reverse=reverse, lengths=lengths, backend="chunked")
        expected.square().mean().backward()
        for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            leaves = [x.detach().to(device, dtype).requires_grad_() for x in exact]
            where = None if lengths is None else lengths.to(device)
            y = wkv7(*leaves, reverse=reverse, lengths=where, backend=backend)
            y.float().square().mean().backward()
            value = max(
                distance(y, expected),
                *(distance(a.grad, e.grad) for a, e in zip(leaves, exact, strict=True)),
            )
            name = f"wkv7 T={frames} reverse={reverse} {dtype}{how}".replace("torch.", "")
            rows.append(check(name, value, limit))
    return {"checks": rows}


def golden_case(name: str):
    from safetensors.torch import load_file

    return GOLDEN / name / "model.nemo", load_file(GOLDEN / name / "golden.safetensors")


def check_model(dry: bool, kept: dict) -> dict:
    """Features, encoder and losses of NeMo's golden models on the device against the CPU's."""
    import fastconformer

    rows = []
    for case in ("hybrid_tdt_ctc_bpe", "local_attn_g1", "birwkv7_encoder"):
        path = GOLDEN / case / "model.nemo"
        here = fastconformer.load_model(path)
        there = fastconformer.load_model(path, device=device_of(dry))
        audio = torch.from_numpy(speech(7.3, 3))
        lengths = torch.tensor([audio.shape[1], audio.shape[1] // 2, 16000])
        with torch.inference_mode():
            expected, n_expected = here.featurize(audio, lengths)
            actual, n_actual = there.featurize(audio.to(there.device), lengths.to(there.device))
            rows.append(check(f"{case} features", distance(actual, expected), 1e-3))
            wanted, _ = here.encode(expected, n_expected)
            found, _ = there.encode(actual, n_actual)
            rows.append(check(f"{case} encoder float32", distance(found, wanted), 1e-3))
            half = copy.deepcopy(there).to(torch.bfloat16)
            found, _ = half.encode(actual, n_actual)
            rows.append(check(f"{case} encoder bfloat16", distance(found, wanted), 0.1))
    return {"checks": rows}


def check_decoding(dry: bool, kept: dict) -> dict:
    """Greedy tokens with CUDA graphs, without, and on the CPU; a batch of another size after; the
    same where another GPU is the current one."""
    from benchmarks.random_model import random_model
    from fastconformer.decoding import transducer_greedy
    from fastconformer.networks.graphs import GraphCache

    rows = []
    clips = list(speech(4.0 if dry else 12.0, 2 if dry else 5))
    model, _ = random_model(clips[:2], TOKENS_PER_SECOND, TINY)
    there = copy.deepcopy(model).to(device_of(dry))
    for n in (len(clips), 1):
        audio = torch.from_numpy(np.stack(clips[:n]))
        lengths = torch.full((n,), audio.shape[1])
        lengths[-1] //= 2
        with torch.inference_mode():
            encoded, n_frames = model.encode(*model.featurize(audio, lengths))
        options = (model.blank_id, model.config.loss.durations)
        expected = transducer_greedy(encoded, n_frames, model.decoder, model.joint, *options)
        moved = encoded.to(there.device), n_frames.to(there.device)
        cache = kept.setdefault("graphs", GraphCache())
        for name, graphs in (("without graphs", None), ("with graphs", cache), ("again", cache)):
            found = transducer_greedy(*moved, there.decoder, there.joint, *options, graphs=graphs)
            wrong = sum(a.tokens != e.tokens for a, e in zip(found, expected, strict=True))
            rows.append(check(f"{n} clips {name}: clips with other tokens", wrong, 0))
    rows.append(check("captures that failed", cache.failed, 0))
    if not dry and torch.cuda.device_count() > 1:
        other = copy.deepcopy(model).to("cuda:1")
        with torch.cuda.device(0):
            found = transducer_greedy(
                encoded.to("cuda:1"), n_frames.to("cuda:1"), other.decoder, other.joint, *options,
                graphs=GraphCache(),
            )  # fmt: skip
        wrong = sum(a.tokens != e.tokens for a, e in zip(found, expected, strict=True))
        rows.append(check("on cuda:1 with cuda:0 current: clips with other tokens", wrong, 0))
    return {"checks": rows}


def check_graphs(dry: bool, kept: dict) -> dict:
    """The encoder by CUDA graphs against its kernels launched one by one, for many lengths of few
    graphs, in two threads with streams of their own, and chunk by chunk; how many were captured.
    Dry: the captured function, without a graph."""
    from fastconformer.networks import graphs

    always = mock.patch.object(graphs.GraphCache, "usable", lambda cache, x: True)
    with always if dry else nullcontext():
        return {"checks": _check_graphs(dry)}


def _check_graphs(dry: bool) -> list[dict]:
    import fastconformer
    from fastconformer.networks import graphs
    from fastconformer.networks import state as networks_state

    rows, device = [], device_of(dry)
    kinds = ((torch.float32, 1e-4), (torch.bfloat16, 5e-2))
    for case in ("hybrid_tdt_ctc_bpe", "local_attn_g1", "stream_ctc", "birwkv7_encoder"):
        for dtype, limit in kinds[: 1 if dry else 2]:
            model = fastconformer.load_model(GOLDEN / case / "model.nemo", device=device)
            encoder = model.encoder.to(dtype)
            lengths = [[97], [300], [511], [400, 13, 505]] + (
                [] if dry else [[n, n] for n in range(9)]
            )

            def worst(stream=None, encoder=encoder, lengths=lengths) -> float:
                found = 0.0
                with torch.inference_mode(), torch.cuda.stream(stream):
                    for n in lengths:
                        n = torch.tensor(n, device=device)
                        shape = len(n), encoder.config.feat_in, int(n.max()) + 1
                        x = torch.randn(shape, device=device).to(dtype)  # noqa: B023
                        wanted, counts = encoder(x, n)
                        valid = torch.arange(wanted.shape[1], device=device) < counts[:, None]
                        actual = encoder.replayed(x, n)[0].masked_fill(~valid[..., None], 0)
                        wanted = wanted.masked_fill(~valid[..., None], 0)
                        found = max(found, distance(actual, wanted))
                return found

            name = f"{case} {dtype}, by graphs".replace("torch.", "")
            rows.append(check(name, worst(), limit))
            if not dry:
                rows.append(check(f"{name}: not 3 captures", encoder.graphs.captures != 3, 0))
                rows.append(check(f"{name}: failed", encoder.graphs.failed, 0))
                with ThreadPoolExecutor(2) as pool:
                    found = list(pool.map(worst, [torch.cuda.Stream() for _ in range(2)]))
                rows.append(check(f"{name}, in two threads", max(found), limit))
    model = fastconformer.load_model(GOLDEN / "stream_ctc" / "model.nemo", device=device)
    audio, texts = speech(4.0, 1)[0], []
    for frames in (0, graphs.MOST_FRAMES):
        with mock.patch.object(networks_state, "MOST_FRAMES", frames):
            stream = model.stream()
            for part in np.split(audio, 8):
                stream.feed(part)
            texts.append(stream.finish().text)
    rows.append(check("a stream by graphs: other text", texts[0] != texts[1], 0))
    return rows


def train(model, audio, targets, steps: int, autocast: bool, rate: float = 1e-4) -> list[float]:
    """Losses of some AdamW steps on one batch, dropout off."""
    device = model.device
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    audio = torch.from_numpy(audio).to(device)
    lengths = torch.full((len(audio),), audio.shape[1], device=device)
    n_targets = torch.full((len(audio),), targets.shape[1])
    values = []
    features, n_features = model.featurize(audio, lengths)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            encoded, n_frames = model.encode(features, n_features)
            found = model.losses(encoded, n_frames, targets.to(device), n_targets.to(device))
            loss = sum(x.mean() for x in found.values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        values.append(loss.item())
    return values


def check_training(dry: bool, kept: dict) -> dict:
    """Twenty steps: the losses of the device in float32 and bfloat16 beside the CPU's."""
    from benchmarks.random_model import random_model

    steps = 2 if dry else 20
    model, _ = random_model(list(speech(2.0, 1)), TOKENS_PER_SECOND, TINY)
    audio = speech(3.0, 2)
    targets = torch.randint(0, 1000, (2, 6), generator=torch.Generator().manual_seed(0))
    expected = train(model, audio, targets, steps, False)
    there = copy.deepcopy(model).to(device_of(dry))
    rows = []
    for name, autocast, limit in (("float32", False, 1e-2), ("bfloat16", True, 5e-2)):
        actual = train(there, audio, targets, steps, autocast)
        worst = max(abs(a - e) / e for a, e in zip(actual, expected, strict=True))
        rows.append(check(f"{steps} steps {name}: largest relative difference", worst, limit))
        fell = actual[-1] / actual[0]
        rows.append(check(f"{steps} steps {name}: last loss over the first", fell, 1.0))
    return {"checks": rows}


STEPS = {
    step.__name__: step
    for step in (
        machine, peaks, check_loss, check_kernels, check_wkv7, check_graphs, check_decoding,
        check_model, check_training,
        time_stages, time_graphs, time_kernels, time_loss, time_transcription, time_wkv7,
        time_long, time_training,
    )
}  # fmt: skip
# Seconds that a step may take on a GPU; a check is the first to compile its kernels.
LIMITS = {name: 120 for name in STEPS if name.startswith("check_")} | {"machine": 30, "peaks": 30}
