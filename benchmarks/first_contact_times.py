"""The steps of `benchmarks.first_contact` that say how fast it is."""

import time
from unittest import mock

import numpy as np
import torch

from benchmarks.first_contact_tools import (
    TINY,
    TOKENS_PER_SECOND,
    device_of,
    loss_inputs,
    milliseconds,
    speech,
    timing,
)


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
    from fastconformer.decoding import fused_step
    from fastconformer.networks.graphs import GraphCache

    rows = []
    cases = (("0.6b", 1, 10.0), ("0.6b", 64, 30.0), ("0.6b", 256, 10.0), ("110m", 64, 30.0))
    for size, batch, seconds in cases[:1] if dry else cases:
        model = model_of(size, dry, kept)
        audio = torch.from_numpy(speech(1.0 if dry else seconds, 1)).expand(batch, -1)
        audio = audio.contiguous().to(model.device)
        lengths = torch.full((batch,), audio.shape[1], device=model.device)
        total_s = batch * seconds
        plain_graphs = GraphCache()

        def plain_decoding():
            with (
                mock.patch.object(fused_step, "usable", lambda loop: False),
                mock.patch.object(model.joint, "graphs", plain_graphs),  # noqa: B023
            ):
                model.decode(*encoded, "tdt")  # noqa: B023

        with torch.inference_mode():
            features = model.featurize(audio, lengths)
            encoded = model.encode(*features)
            for name, goal, work in (
                ("features", 2.0, lambda: model.featurize(audio, lengths)),  # noqa: B023
                ("encoder", 34.0, lambda: model.encode(*features)),  # noqa: B023
                ("tdt decoding", 2.5, lambda: model.decode(*encoded, "tdt")),  # noqa: B023
                ("tdt decoding, plain steps", None, plain_decoding),
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
                if n:  # none are told where the profiler may not look
                    rows.append(timing(what, n / n_layers, "kernels", goal))
    return {"timings": rows}


def time_graphs(dry: bool, kept: dict) -> dict:
    """One clip, and a stream's chunk of 1.12 s, with and without the encoder's CUDA graphs; what a
    capture takes."""
    from benchmarks.kernel_counts import streaming_config
    from fastconformer.networks import conformer, graphs
    from fastconformer.networks import state as networks_state
    from fastconformer.networks.conformer import ConformerEncoder

    rows = []

    def compared(what: str, module, work) -> None:
        for how, frames in (("one by one", 0), ("by a graph", graphs.MOST_FRAMES)):
            with mock.patch.object(module, "MOST_FRAMES", frames):
                begun = time.perf_counter()
                work()
                first_ms = 1000 * (time.perf_counter() - begun)
                rows.append(timing(f"{what}, {how}", milliseconds(work, dry), "ms"))
        rows.append(timing(f"{what}, captured", first_ms, "ms"))

    for size in ("0.6b", "110m")[: 1 if dry else 2]:
        model = model_of(size, dry, kept)
        for seconds in (1.0,) if dry else (8.0, 12.0, 30.0):
            clip = speech(seconds, 1)
            audio = torch.from_numpy(clip).to(model.device)
            lengths = torch.full((1,), audio.shape[1], device=model.device)
            what = f"{size} B=1 {seconds:.0f} s"
            with torch.inference_mode():
                features = model.featurize(audio, lengths)
                compared(f"{what} encoder", conformer, lambda: model.encode(*features))  # noqa: B023
            for how, frames in (("one by one", 0), ("by a graph", graphs.MOST_FRAMES)):
                with mock.patch.object(conformer, "MOST_FRAMES", frames):
                    ms = milliseconds(lambda: model.transcribe([clip[0]]), dry)  # noqa: B023
                goal = 4000 if size == "0.6b" and frames else None
                rows.append(timing(f"{what} {how}", 1000 * seconds / ms, "RTFx", goal))
    if not dry:
        encoder = ConformerEncoder(streaming_config("0.6b")).to("cuda", torch.bfloat16).eval()
        state = networks_state.first_state(encoder, 1)
        features = torch.randn(1, encoder.config.feat_in, 128, device="cuda", dtype=torch.bfloat16)
        chunk = features, 2, 14, state
        compared(
            "0.6b, a chunk of a stream", networks_state,
            lambda: networks_state.encode_next(encoder, *chunk),
        )  # fmt: skip
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
    rows, facts = [], {}
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
        try:
            ms = milliseconds(step, dry, 5)
        except torch.OutOfMemoryError:
            facts["did not fit"] = f"training step B={batch} of 15 s"
            break
        seconds = batch * audio.shape[1] / 16000
        rows.append(
            timing(f"training step B={batch} of 15 s", 1000 * seconds / ms, "audio s/s", 7900)
        )
        if not dry:
            peak = torch.cuda.max_memory_allocated() / 2**30
            rows.append(timing(f"training step B={batch} of 15 s, peak", peak, "GiB"))
    return {"timings": rows, "facts": facts}
