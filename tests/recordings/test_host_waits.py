"""How often the host waits for the device in transcription, counted on a CPU that plays a GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
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


@pytest.mark.parametrize("name", ["hybrid_tdt_ctc_bpe", "rnnt_bpe", "ctc_bpe"])
def test_at_most_three_waits_a_batch(name, monkeypatch):
    """Beside the flags of decoding, which are read a replay late."""
    model = fastconformer.load_model(golden(name) / "model.nemo")
    generator = np.random.default_rng(0)
    clips = [0.1 * generator.standard_normal(n).astype(np.float32) for n in (16000, 24000, 30000)]
    expected = [t.text for t in model.transcribe(clips, retry=False, memory_gb=1)]
    monkeypatch.setattr(networks_graphs, "captured", lambda cache, function, device: function)
    monkeypatch.setattr(graphs, "_to_host", lambda flag: (torch.tensor(flag.numpy()), Done()))
    monkeypatch.setattr(kernels, "takes", lambda x: False)
    monkeypatch.setattr(tiles, "gpu_memory", lambda device: 24 << 30)
    # a mode is of one thread
    monkeypatch.setattr("fastconformer.recordings.transcribe.ahead", made_here)
    with PlayedGpu(model, PACKAGE) as gpu:
        found = model.transcribe(clips, memory_gb=1, batch_size=2)
        assert model.device == GPU
    assert [t.text for t in found] == expected
    waits = [x for x in gpu.waits if "graphs.py" not in x]  # where the flags are read
    assert 2 <= len(waits) <= 2 * 3, waits  # two batches, of which the first is finished late
