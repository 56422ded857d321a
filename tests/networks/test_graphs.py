"""The encoder by CUDA graphs, played on a CPU: the same numbers, no wait, few captures."""

import copy
import dataclasses
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import golden
from played_gpu import PlayedGpu
from played_graph import captured

import fastconformer
from fastconformer.decoding import transducer_greedy
from fastconformer.networks import conformer, graphs, kernels, tiles
from fastconformer.networks import state as state_module
from fastconformer.networks.conformer import ConformerEncoder
from fastconformer.networks.state import encode_next, first_state, frames_beside

PACKAGE = str(Path(fastconformer.__file__).parent)
STATE = "channel", "time", "filled"
STEP = 64  # frames, for the tests' sake
CASES = ("hybrid_tdt_ctc_bpe", "local_attn_g1", "stream_ctc", "reduction_striding")


@pytest.fixture(autouse=True)
def played(monkeypatch):
    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(conformer, "STEP_FRAMES", STEP)
    monkeypatch.setattr(kernels, "takes", lambda x: False)
    monkeypatch.setattr(tiles, "gpu_memory", lambda device: 24 << 30)


def encoder_of(name: str, **changes) -> ConformerEncoder:
    encoder = fastconformer.load_model(golden(name) / "model.nemo").encoder
    if not changes:
        return encoder
    torch.manual_seed(0)
    return ConformerEncoder(dataclasses.replace(encoder.config, **changes)).eval()


def batch(encoder, lengths, seed=0):
    """Features and lengths that say they are on a GPU."""
    lengths = torch.tensor(lengths)
    shape = len(lengths), encoder.config.feat_in, int(lengths.max()) + 3
    features = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    features.there = lengths.there = True
    return features, lengths


@torch.no_grad()
def difference(encoder, lengths, seed=0) -> float:
    """Of the valid frames from the plain call's; nothing may wait for the host."""
    inputs = batch(encoder, lengths, seed)
    with PlayedGpu(encoder, PACKAGE) as gpu:
        (expected, n_expected), (found, n_found) = encoder(*inputs), encoder.replayed(*inputs)
    assert not gpu.waits
    assert found.shape == expected.shape and n_found.tolist() == n_expected.tolist()
    rows = zip(found, expected, n_expected.tolist(), strict=True)
    return max((a[:n] - b[:n]).abs().amax().item() if n else 0.0 for a, b, n in rows)


@pytest.mark.parametrize("name", CASES)
def test_any_lengths_of_a_bucket_as_the_plain_call(name):
    encoder = encoder_of(name)
    generator = torch.Generator().manual_seed(1)
    for seed, n in enumerate((1, 1, 2, 3, 4)):
        lengths = torch.randint(STEP + 1, 2 * STEP - 3, (n,), generator=generator)
        lengths[1:] -= STEP * torch.arange(1, n) // n
        assert difference(encoder, lengths.tolist(), seed) < 2e-5
    assert encoder.graphs.captures == 3  # of 1, 2 and 4 clips


def test_pooling_between_layers():
    config = {"reduction": "pooling", "reduction_factor": 2, "reduction_position": 0}
    encoder = encoder_of("hybrid_tdt_ctc_bpe", **config)
    assert max(difference(encoder, [n], n) for n in (95, 96, 97, 104, 105)) < 2e-5
    assert encoder.graphs.captures == 1


def test_birwkv7_whose_recurrence_is_an_operator():
    encoder = encoder_of("birwkv7_encoder")
    assert max(difference(encoder, lengths) for lengths in ([90], [70], [80, 9], [1, 70])) < 2e-5
    assert encoder.graphs.captures == 2


def changes():
    """What may happen to a network between two calls."""

    def moved(encoder):
        encoder.double().float()

    def loaded(encoder):
        state = {
            k: v * 1.25 if v.is_floating_point() else v for k, v in encoder.state_dict().items()
        }
        encoder.load_state_dict(state, assign=True)

    def replaced(encoder):
        encoder.layers[1] = type(encoder.layers[1])(encoder.config).eval()

    def shortened(encoder):
        encoder.layers = encoder.layers[:1].eval()

    return moved, loaded, replaced, shortened


@pytest.mark.parametrize("change", changes(), ids=lambda f: f.__name__)
def test_a_change_of_the_network_drops_its_graphs(change):
    encoder = encoder_of("hybrid_tdt_ctc_bpe")
    assert difference(encoder, [90]) < 2e-5
    before = encoder(*batch(encoder, [90]))[0]
    change(encoder)
    assert difference(encoder, [90]) < 2e-5 and encoder.graphs.captures == 2
    assert len(encoder.graphs.graphs) == 1
    after = encoder(*batch(encoder, [90]))[0]
    assert change.__name__ == "moved" or (after - before).abs().max() > 1e-3


def test_values_that_change_in_place_are_read_anew():
    encoder = encoder_of("hybrid_tdt_ctc_bpe")
    for factor in (1.0, 1.25):
        with torch.no_grad():
            for x in encoder.state_dict().values():
                x.mul_(factor) if x.is_floating_point() else None
        assert difference(encoder, [90]) < 2e-4
    assert encoder.graphs.captures == 1


def test_no_graph_where_more_than_numbers_is_wanted():
    """Gradients, training, hooks, autocast, clips that see one another, inputs that are large."""
    encoder, taps = encoder_of("hybrid_tdt_ctc_bpe"), []
    inputs = batch(encoder, [90])
    with PlayedGpu(encoder):
        assert encoder.replayed(*inputs)[0].requires_grad
        with torch.no_grad():
            encoder.layers[0].dropout.train()
            encoder.replayed(*inputs)
            encoder.eval()
            handle = encoder.layers[1].self_attn.register_forward_hook(lambda *a: taps.append(a))
            encoder.replayed(*inputs)
            handle.remove()
            with mock.patch.object(torch, "is_autocast_enabled", lambda *_: True):
                encoder.replayed(*inputs)
            encoder.replayed(*batch(encoder, [2 * graphs.MOST_FRAMES]))
            encoder.replayed(*batch(encoder, [2, 9, 5] * 50))
            other = encoder_of("striding4_ctc_char")
            assert other.config.mixes_clips
            with PlayedGpu(other):
                other.replayed(*batch(other, [90]))
    assert len(taps) == 1 and encoder.graphs.captures == other.graphs.captures == 0
    assert difference(encoder, [90]) < 2e-5 and encoder.graphs.captures == 1
    assert not copy.deepcopy(encoder).graphs.graphs


def test_a_capture_that_fails_costs_a_line(monkeypatch, caplog):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    monkeypatch.setattr(graphs, "captured", fails)
    encoder = encoder_of("hybrid_tdt_ctc_bpe")
    for lengths in ([90], [80, 90], [90]):
        assert difference(encoder, lengths) == 0
    assert [r.getMessage() for r in caplog.records] == [
        "no more CUDA graphs, which are faster: CUDA out of memory. Tried"
    ]


def test_threads_share_the_graphs():
    """Each gets its own clip's numbers, though all write to the same memory."""
    encoder = encoder_of("hybrid_tdt_ctc_bpe")
    clips = [batch(encoder, [70 + i], i) for i in range(6)]
    with torch.no_grad():
        expected = [encoder(*clip)[0] for clip in clips]

    def work(i):
        with torch.no_grad(), PlayedGpu(encoder):
            return [encoder.replayed(*clips[i])[0] for _ in range(3)]

    with ThreadPoolExecutor(6) as pool:
        for found, wanted in zip(pool.map(work, range(6)), expected, strict=True):
            assert all((x - wanted).abs().max() < 2e-5 for x in found)
    assert encoder.graphs.captures == 1


def test_few_captures_in_an_hour(monkeypatch):
    """Of single clips, and of what a server's batches of up to 16 ask for, as they come."""
    monkeypatch.setattr(conformer, "STEP_FRAMES", graphs.STEP_FRAMES)
    monkeypatch.setattr(graphs, "captured", lambda cache, function, device: function)
    encoder = encoder_of("hybrid_tdt_ctc_bpe")
    monkeypatch.setattr(encoder, "forward", lambda x, n: (x[:, :, ::8].mT, n // 8))
    seconds = torch.exp(2.3 + 0.6 * torch.randn(400, generator=torch.manual_seed(0)))
    frames = (100 * seconds.clamp(1.5, 35.0)).long()
    made = []
    with torch.no_grad(), PlayedGpu(encoder):
        for n_clips in (1, None):
            left = frames.tolist()
            while left:
                n = n_clips or int(torch.randint(1, 17, (1,)))
                encoder.replayed(*batch(encoder, left[:n]))
                left = left[n:]
            made.append(encoder.graphs.captures)
    assert made[0] <= 8 and made[1] <= 15 and made[1] == len(encoder.graphs.graphs)


def test_chunks_of_streams():
    """Several at a time, from one's first chunk to its last: as launched one by one, and only those
    amid a clip are captured."""
    encoder = encoder_of("stream_ctc")
    config = encoder.config
    factor, count = config.subsampling_factor, config.att_contexts[0][1] + 1
    beside = frames_beside(config)
    for n in (1, 3, 4):
        features, _ = batch(encoder, [factor * (count * 5 + 2)] * n)
        with PlayedGpu(encoder, PACKAGE) as gpu:
            states = [first_state(encoder, n)] * 2
            gpu.waits.clear()
            for start in range(0, 5 * count + 2, count):
                before, own = min(start, beside), min(count, 5 * count + 2 - start)
                first, last = (start - before) * factor, (start + own) * factor
                found = []
                for i, most in enumerate((0, graphs.MOST_FRAMES)):
                    with mock.patch.object(state_module, "MOST_FRAMES", most):
                        arguments = features[:, :, first:last], before, own, states[i]
                        x, states[i] = encode_next(encoder, *arguments)
                        found.append((x, *(getattr(states[i], f) for f in STATE)))
                assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(*found, strict=True))
                assert found[0][0].shape[:2] == (n, own)
        assert not gpu.waits
    assert encoder.graphs.captures == 2  # of 1 and 4 streams


def test_a_stream_says_the_same(monkeypatch):
    model = fastconformer.load_model(golden("stream_ctc") / "model.nemo")
    samples = 0.1 * np.random.default_rng(0).standard_normal(48000).astype(np.float32)
    texts = []
    for most in (0, graphs.MOST_FRAMES):
        monkeypatch.setattr(state_module, "MOST_FRAMES", most)
        with PlayedGpu(model, PACKAGE):
            stream = model.stream()
            for part in np.split(samples, 6):
                stream.feed(part)
            texts.append(stream.finish().text)
    assert texts[0] == texts[1] and texts[0] and model.encoder.graphs.captures == 1


def test_a_model_that_nobody_has_is_freed_at_once(monkeypatch):
    """Its graphs, and so its weights, do not wait on the device for Python's collector."""
    get = graphs.GraphCache.get

    def of_a_graph(cache, key, *arguments):
        buffers, replay = get(cache, key, *arguments)
        cache.graphs[key] = buffers, None  # which holds nothing of Python
        return buffers, replay

    monkeypatch.setattr(graphs.GraphCache, "get", of_a_graph)
    monkeypatch.setattr(graphs.GraphCache, "usable", lambda cache, x: True)
    model = fastconformer.load_model(golden("hybrid_tdt_ctc_bpe") / "model.nemo")
    gone = [weakref.ref(x) for x in (model, model.encoder, model.joint)]
    networks = model.decoder, model.joint, model.blank_id, model.config.loss.durations
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            encoded = model.encode(*batch(model.encoder, [STEP]))
        transducer_greedy(*encoded, *networks, graphs=model.joint.graphs)
        assert model.encoder.graphs.graphs and model.joint.graphs.graphs
        del model, networks
        assert [x() for x in gone] == [None] * 3
    finally:
        gc.enable()
