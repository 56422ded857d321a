"""Transcription on a CPU that plays a GPU: how often the host waits, and whether all tensors of an
operator are on one device."""

from pathlib import Path

import numpy as np
import pytest
from conftest import golden
from played_gpu import GPU, PlayedGpu

import fastconformer
from fastconformer.decoding import graphs
from fastconformer.networks import graphs as networks_graphs
from fastconformer.networks import kernels, tiles
from fastconformer.transfers import sent

PACKAGE = str(Path(fastconformer.__file__).parent)


class Done:
    def synchronize(self):
        pass


def made_here(items, make, device):
    for known, tensors in map(make, items):
        yield known, tuple(sent(x, device) for x in tensors)


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(networks_graphs, "captured", lambda cache, function, device: function)
    monkeypatch.setattr(graphs, "_to_host", lambda flag: (flag.cpu(), Done()))
    monkeypatch.setattr(kernels, "takes", lambda x: False)
    monkeypatch.setattr(tiles, "gpu_memory", lambda device: 24 << 30)
    # a mode is of one thread
    monkeypatch.setattr("fastconformer.recordings.transcribe.ahead", made_here)


def noise(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [0.1 * generator.standard_normal(n).astype(np.float32) for n in lengths]


@pytest.mark.parametrize("name", ["hybrid_tdt_ctc_bpe", "rnnt_bpe", "ctc_bpe"])
def test_at_most_three_waits_a_batch(name, a_gpu):
    """Beside the flags of decoding, which are read a replay late."""
    model = fastconformer.load_model(golden(name) / "model.nemo")
    clips = noise(16000, 24000, 30000)
    expected = [t.text for t in model.transcribe(clips, retry=False, memory_gb=1)]
    with PlayedGpu(model, PACKAGE) as gpu:
        found = model.transcribe(clips, memory_gb=1, batch_size=2)
        assert model.device == GPU
    assert [t.text for t in found] == expected
    waits = [x for x in gpu.waits if "graphs.py" not in x]  # where the flags are read
    assert 2 <= len(waits) <= 2 * 3, waits  # two batches, of which the first is finished late


def transcribed(**options):
    return lambda model, clip: model.transcribe([clip, clip[:16000]], memory_gb=1, **options)


def streamed(model, clip):
    stream = model.stream()
    return [*map(stream.feed, np.split(clip, 3)), stream.finish()]


@pytest.mark.parametrize(
    "name, use",
    [
        ("hybrid_tdt_ctc_bpe", transcribed(timestamps=True, confidence=True)),
        ("hybrid_tdt_ctc_bpe", transcribed(beam=3, boost=["me"], timestamps=True)),
        ("hybrid_tdt_ctc_bpe", transcribed(head="ctc", beam=3, allow=["latin"])),
        ("hybrid_tdt_ctc_bpe", transcribed(long="chunks", window_s=0.5)),
        ("hybrid_tdt_ctc_bpe", transcribed(long="local", head="ctc")),
        ("hybrid_tdt_ctc_bpe", lambda model, clip: model.align(clip, "me")),
        ("rnnt_bpe", transcribed(beam=3)),
        ("rnnt_bpe", streamed),
        ("local_attn_g1", transcribed()),
        pytest.param("birwkv7_encoder", transcribed(), marks=pytest.mark.slow),
        ("stream_ctc", streamed),
        ("stream_chunked_hybrid_rnnt", streamed),
        ("canary_v2_unified", transcribed()),
        ("canary_v2_unified", transcribed(beam=2)),
        ("fun_asr_nano_tiny", transcribed()),
    ],
)
def test_tensors_meet_on_one_device(name, use, a_gpu):
    """What PlayedGpu refuses as torch would: operators over tensors of the host and the device."""
    folder = golden(name)
    model = fastconformer.load_model(next(iter(folder.glob("model.nemo")), folder))
    (clip,) = noise(30000)
    expected = use(model, clip)
    with PlayedGpu(model, PACKAGE):
        assert str(use(model, clip)) == str(expected)
