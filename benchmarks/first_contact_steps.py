"""The steps of `benchmarks.first_contact`, in order: each takes (dry, kept) and gives a dict with
"checks", "timings" or "facts". `dry`: on a CPU, tiny; `kept`: what later steps use again."""

import contextlib
import copy
import platform
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TINY = (2, 64, 80, 1)  # layers, width, mels, LSTM layers
TOKENS_PER_SECOND = 3.0


def device_of(dry: bool) -> torch.device:
    return torch.device("cpu" if dry else "cuda")


def check(what: str, value: float, limit: float) -> dict:
    """A row: the value must be a number of at most the limit."""
    return {
        "what": what,
        "value": float(f"{value:.3g}"),
        "limit": limit,
        "ok": bool(value <= limit),
    }


def timing(what: str, value: float, unit: str, goal: float | None = None, **more) -> dict:
    return {"what": what, "value": float(f"{value:.4g}"), "unit": unit, "goal": goal, **more}


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


def machine(dry: bool, kept: dict) -> dict:
    import triton

    facts = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
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


# ---- checks


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
    """The recurrence and its gradients against float64 on the CPU, one way and both."""
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
            name = f"wkv7 T={frames} reverse={reverse} {dtype}".replace("torch.", "")
            rows.append(check(name, value, limit))
    return {"checks": rows}


def golden_case(name: str):
    from safetensors.torch import load_file

    return GOLDEN / name / "model.nemo", load_file(GOLDEN / name / "golden.safetensors")


def speech(seconds: float, batch: int, seed: int = 0) -> np.ndarray:
    """Noise with the loudness of speech, (batch, samples) float32 at 16 kHz."""
    generator = np.random.default_rng(seed)
    n = int(16000 * seconds)
    envelope = np.abs(np.sin(np.arange(n) / 2000.0))
    return (0.1 * envelope * generator.standard_normal((batch, n))).astype(np.float32)


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
    from fastconformer.decoding import GraphCache, transducer_greedy

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


# ---- timings


def time_loss(dry: bool, kept: dict) -> dict:
    """Forward and backward of the loss, bfloat16, 32 clips of 30 s with 120 tokens."""
    rows = []
    for n_tokens, goal in ((1024, 13.0), (8192, 100.0)):
        inputs, *batch = loss_inputs(dry, n_tokens, 5, (32, 375, 120))
        n_frames, n_targets = (torch.full_like(x, x.max()) for x in batch[1:])
        batch = [x.to(device_of(dry)) for x in (batch[0], n_frames, n_targets)]
        leaves = [x.to(device_of(dry), torch.bfloat16).requires_grad_() for x in inputs]
        from fastconformer.losses import fused_transducer_loss

        for eps in (0.0, 1e-7):
            report: dict = {}

            def step(eps=eps, report=report):
                fused_transducer_loss(
                    *leaves, *batch, (0, 1, 2, 3, 4), eps=eps, report=report  # noqa: B023
                ).mean().backward()  # fmt: skip

            ms = milliseconds(step, dry)
            share = report["active_share"].mean().item()
            name = f"tdt loss V={n_tokens} eps={eps} active {share:.3f}"
            rows.append(timing(name, ms, "ms", goal if eps == 0.0 else None))
    return {"timings": rows}


def time_wkv7(dry: bool, kept: dict) -> dict:
    from benchmarks.wkv7 import GPU_SHAPES, make_inputs
    from rwkv_cuda import wkv7_bidirectional

    rows = []
    for shape in [(1, 40, 1, 64)] if dry else GPU_SHAPES:
        inputs = make_inputs(shape, torch.bfloat16, device_of(dry))
        tokens = 2 * shape[0] * shape[1] * shape[2]
        with torch.inference_mode():
            ms = milliseconds(lambda: wkv7_bidirectional(*inputs), dry)  # noqa: B023
        name = "x".join(map(str, shape))
        rows.append(timing(f"wkv7 both directions {name} forward", ms, "ms"))
        if shape[1] < 100_000:
            leaves = [x.requires_grad_() for x in inputs]

            def step():
                pair = wkv7_bidirectional(*leaves)  # noqa: B023
                sum(y.float().square().mean() for y in pair).backward()

            ns = 1e6 * milliseconds(step, dry) / tokens
            rows.append(timing(f"wkv7 {name} forward and backward", ns, "ns/head-token", 1.9))
    return {"timings": rows}


def model_of(size: str, dry: bool, kept: dict, attention: str = "rel_pos"):
    """The random model of this size in bfloat16 (float32 where dry), made once."""
    from benchmarks.random_model import SIZES, random_model

    key = size, attention
    if key not in kept:
        sizes = TINY if dry else SIZES[f"random-{size}"]
        clips = list(speech(1.0 if dry else 10.0, 1 if dry else 2))
        model, rate = random_model(
            clips, TOKENS_PER_SECOND, sizes, device=device_of(dry).type,
            attention=attention,
        )  # fmt: skip
        kept[key] = (model if dry else model.to(torch.bfloat16)), rate
    return kept[key][0]


def kernels_of(run) -> int:
    """Kernels on the device during run()."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as measured:
        run()
        torch.cuda.synchronize()
    events = [e for e in measured.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len([e for e in events if not e.name.startswith("Mem")])


def time_stages(dry: bool, kept: dict) -> dict:
    """Features, encoder and decoding by batch, in us per second of audio; kernels a layer."""
    rows = []
    cases = (("0.6b", 1, 10.0), ("0.6b", 64, 30.0), ("0.6b", 256, 10.0), ("110m", 64, 30.0))
    for size, batch, seconds in cases[:1] if dry else cases:
        model = model_of(size, dry, kept)
        audio = torch.from_numpy(speech(1.0 if dry else seconds, 1)).expand(batch, -1)
        audio = audio.contiguous().to(model.device)
        lengths = torch.full((batch,), audio.shape[1], device=model.device)
        total_s = batch * seconds
        with torch.inference_mode():
            features = model.featurize(audio, lengths)
            encoded = model.encode(*features)
            for name, goal, work in (
                ("features", 2.0, lambda: model.featurize(audio, lengths)),  # noqa: B023
                ("encoder", 34.0, lambda: model.encode(*features)),  # noqa: B023
                ("tdt decoding", 2.5, lambda: model.decode(*encoded, "tdt")),  # noqa: B023
                ("ctc decoding", None, lambda: model.decode(*encoded, "ctc")),  # noqa: B023
            ):
                ms = milliseconds(work, dry)
                what = f"{size} B={batch} {seconds:.0f} s {name}"
                rows.append(timing(what, 1000 * ms / total_s, "us/s", goal if batch > 1 else None))
            if not dry:
                n = kernels_of(lambda: model.encode(*features))  # noqa: B023
                n_layers = model.config.encoder.n_layers
                goal = 30 if batch == 1 else 40
                what = f"{size} B={batch} {seconds:.0f} s kernels of the encoder a layer"
                rows.append(timing(what, n / n_layers, "kernels", goal))
    return {"timings": rows}


def transcribe_seconds(model, clips, batch_size: int, timestamps: bool) -> float:
    start = time.perf_counter()
    model.transcribe(clips, batch_size=batch_size, timestamps=timestamps)
    return time.perf_counter() - start


def time_transcription(dry: bool, kept: dict) -> dict:
    """RTFx end to end from samples in memory, clips of mixed lengths; texts and word times."""
    generator = np.random.default_rng(0)
    rows = []
    for size in ("110m", "0.6b"):
        model = model_of(size, dry, kept)
        for batch, total_s in ((1, 60.0), (64, 3600.0), (256, 7200.0))[: 1 if dry else 3]:
            lengths = np.clip(np.exp(generator.normal(2.3, 0.6, 2000)), 1.5, 35.0)
            lengths = lengths[: int(np.searchsorted(lengths.cumsum(), total_s))]
            if dry:
                lengths = np.array([1.2, 2.0])
            noise = speech(35.0, 1)[0]
            clips = [noise[: int(16000 * s)] for s in lengths]
            for timestamps in (False, True):
                transcribe_seconds(model, clips[: 2 * batch], batch, timestamps)
                taken = transcribe_seconds(model, clips, batch, timestamps)
                goal = {("0.6b", 256): 20000, ("0.6b", 1): 4000, ("110m", 256): 60000}
                words = " with word times" if timestamps else ""
                names = {"batch": batch, "series": f"{size}{words}"}
                rtfx = float(lengths.sum()) / taken
                what = f"{size} B={batch}{words}"
                rows.append(timing(what, rtfx, "RTFx", goal.get((size, batch)), **names))
    return {"timings": rows}


def time_long(dry: bool, kept: dict) -> dict:
    """One hour in one call: full, local attention and BiRWKV7; peak memory."""
    rows = []
    for attention in ("rel_pos", "rel_pos_local_attn", "rwkv7_attn"):
        model = model_of("110m" if dry else "0.6b", dry, kept, attention)
        clip = speech(1.0, 1)[0] if dry else np.tile(speech(20.0, 1)[0], 180)
        if not dry:
            torch.cuda.reset_peak_memory_stats()
        taken = transcribe_seconds(model, [clip], 1, False)
        rows.append(timing(f"1 h, {attention}", len(clip) / 16000 / taken, "RTFx"))
        if not dry:
            peak = torch.cuda.max_memory_allocated() / 2**30
            rows.append(timing(f"1 h, {attention}, peak", peak, "GiB"))
    return {"timings": rows}


def time_training(dry: bool, kept: dict) -> dict:
    """A full step of the 0.6B size: float32 weights, bfloat16 autocast, AdamW."""
    from benchmarks.random_model import SIZES, random_model

    kept.clear()
    rows = []
    sizes = TINY if dry else SIZES["random-0.6b"]
    model, _ = random_model(
        list(speech(5.0, 1)), TOKENS_PER_SECOND, sizes, device=device_of(dry).type
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=not dry)
    for batch in (2,) if dry else (8, 16, 32, 64):
        audio = torch.from_numpy(speech(1.0 if dry else 15.0, 1)).expand(batch, -1).contiguous()
        audio = audio.to(model.device)
        lengths = torch.full((batch,), audio.shape[1], device=model.device)
        targets = torch.randint(0, 1000, (batch, 3 if dry else 45), device=model.device)
        n_targets = torch.full((batch,), targets.shape[1], device=model.device)

        def step():
            optimizer.zero_grad()
            features = model.featurize(audio, lengths)  # noqa: B023
            with torch.autocast(model.device.type, torch.bfloat16):
                encoded, n_frames = model.encode(*features)
                found = model.losses(encoded, n_frames, targets, n_targets, eps=1e-7)  # noqa: B023
                loss = sum(x.mean() for x in found.values())
            loss.backward()
            optimizer.step()

        if not dry:
            torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(step, dry, 5)
        seconds = batch * audio.shape[1] / 16000
        rows.append(
            timing(f"training step B={batch} of 15 s", 1000 * seconds / ms, "audio s/s", 7900)
        )
        if not dry:
            peak = torch.cuda.max_memory_allocated() / 2**30
            rows.append(timing(f"training step B={batch} of 15 s, peak", peak, "GiB"))
    return {"timings": rows}


STEPS = {
    step.__name__: step
    for step in (
        machine, peaks, check_loss, check_decoding, check_model, check_wkv7, check_training,
        time_stages, time_loss, time_transcription, time_wkv7, time_long, time_training,
    )
}  # fmt: skip
# Seconds a step may take on a GPU; the first of its kind compiles kernels.
LIMITS = {"machine": 30, "peaks": 20, "check_loss": 60, "check_decoding": 40, "check_model": 40}
LIMITS |= {"check_wkv7": 80, "check_training": 40}
