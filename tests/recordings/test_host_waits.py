"""How often the host waits for the device in transcription, counted on a CPU that plays a GPU."""

import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import golden
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import fastconformer
from fastconformer.decoding import graphs
from fastconformer.networks import kernels, tiles

GPU = torch.device("cuda:0")
PACKAGE = str(Path(fastconformer.__file__).parent)
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select"}
READS |= {"__bool__", "__int__", "__float__", "__index__"}


class PlayedGpu(TorchFunctionMode):
    """Tensors that were sent to the GPU, and what is made of them, say that they are there; each
    look at their values is noted with the line that took it."""

    def __init__(self, model):
        super().__init__()
        self.waits = []
        for x in (*model.parameters(), *model.buffers()):
            x.there = True

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        given = [
            x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor | torch.device)
        ]
        there = any(getattr(x, "there", False) for x in given)
        if function == torch.Tensor.is_cuda.__get__:
            return there
        if function == torch.Tensor.device.__get__:
            return GPU if there else function(*args)
        if name == "pin_memory":
            return args[0]
        by_mask = name == "__getitem__" and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
        )
        if there and (name in READS or by_mask):
            frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
            self.waits.append(f"{frames[-1].filename}:{frames[-1].lineno} {name}")
        sent = any(isinstance(x, torch.device) and x == GPU for x in given)
        back = name == "cpu" or (name == "to" and any(x == "cpu" for x in args[1:]))

        def here(x):
            return torch.device("cpu") if isinstance(x, torch.device) else x

        result = function(*tree_map(here, args), **tree_map(here, kwargs))
        if (there or sent) and not back:
            for x in tree_leaves(result):
                if isinstance(x, torch.Tensor):
                    x.there = True
        elif back:  # a new one: on a CPU it is the same
            result = result.clone()
        return result


class Done:
    def synchronize(self):
        pass


@pytest.mark.parametrize("name", ["hybrid_tdt_ctc_bpe", "rnnt_bpe"])
def test_at_most_three_waits_a_batch(name, monkeypatch):
    """Beside the flags of decoding, which are read a replay late."""
    model = fastconformer.load_model(golden(name) / "model.nemo")
    generator = np.random.default_rng(0)
    clips = [0.1 * generator.standard_normal(n).astype(np.float32) for n in (16000, 24000, 30000)]
    expected = [t.text for t in model.transcribe(clips, retry=False, memory_gb=1)]
    monkeypatch.setattr(graphs, "_captured", lambda function, device: function)
    monkeypatch.setattr(graphs, "_to_host", lambda flag: (torch.tensor(flag.numpy()), Done()))
    monkeypatch.setattr(kernels, "usable", lambda x: False)
    monkeypatch.setattr(tiles, "gpu_memory", lambda device: 24 << 30)
    with PlayedGpu(model) as gpu:
        found = model.transcribe(clips, memory_gb=1)
        assert model.device == GPU
    assert [t.text for t in found] == expected
    waits = [x for x in gpu.waits if "graphs.py" not in x]  # where the flags are read
    assert 1 <= len(waits) <= 3, waits
