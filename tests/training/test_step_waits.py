"""How often the host waits for the device in a training step, counted on a CPU that plays a GPU."""

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from played_gpu import GPU, PlayedGpu
from torch.utils._pytree import tree_leaves

import fastconformer
import training.loop.train
from fastconformer.losses import fused_operator, fused_vectorised, vectorised
from fastconformer.networks import kernels, tiles
from training.finetune import main


@pytest.fixture
def counted(monkeypatch):
    """A run's twelfth step, when no gradient is watched any more, as if it were on a GPU."""
    step, played = training.loop.train.take_step, []
    forward, backward = fused_operator.transducer_forward, fused_operator.transducer_backward

    def taken(run, batches):
        if run.progress.step != 11:
            return step(run, batches)
        averages = run.ema.average if run.ema else {}
        for x in tree_leaves((list(run.optimizer.state.values()), averages)):
            if isinstance(x, torch.Tensor):
                x.there = True
        roots = [str(Path(package.__file__).parent) for package in (fastconformer, training)]
        with PlayedGpu(run.model, *roots) as gpu:
            played.append(gpu)
            return step(run, [batch.to(GPU) for batch in batches])

    def seen_forward(*inputs):  # a mode does not look into operators: once more, in the open
        if played:
            with torch.no_grad():
                forward._init_fn(
                    *(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)
                )
        return forward(*inputs)

    def seen_backward(*inputs):  # nor into what the engine calls
        if not played:
            return backward(*inputs)
        for x in tree_leaves(inputs):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.there = True
        with played[0]:
            return backward._init_fn(*inputs)

    monkeypatch.setattr(training.loop.train, "take_step", taken)
    monkeypatch.setattr(fused_operator, "transducer_forward", seen_forward)
    monkeypatch.setattr(fused_operator, "transducer_backward", seen_backward)
    monkeypatch.setattr(fused_operator, "_backend", lambda device: fused_vectorised)
    monkeypatch.setattr(tiles, "gpu_memory", lambda device: 24 << 30)
    monkeypatch.setattr(fused_operator, "_device_of", lambda x: contextlib.nullcontext())
    # attention's operators are called as ever; inside, their kernels would take minutes
    monkeypatch.setattr(kernels, "triton_works", lambda device: True)
    for name, function in (("attention", attention), ("attention_backward", attention_backward)):
        module = f"fastconformer.networks.triton_{name}"
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: function}))
    return played


def attention(q, k, v, p, bias_u, bias_v, hidden, dropout, seed):
    assert dropout == 0.1 and seed > 0
    return torch.zeros_like(q), q.new_zeros(len(q), len(bias_u), q.shape[1], dtype=torch.float32)


def attention_backward(grad, *inputs):
    return tuple(torch.zeros_like(x) for x in inputs[:6])


def test_at_most_five_waits_a_step(corpus, counted):
    """Beside what torch's CTC loss sends of its lengths, inside, and the plain lattice, in whose
    place a GPU has its kernels."""
    recipe, _ = corpus
    options = ["trainer.max_steps=12", "data.validation={}", "trainer.ema_decay=0.99"]
    options += [
        "model.dropout=0.1",
        "spec_augment.freq_masks=2",
        "spec_augment.time_masks=2",
        "loss.eps=1e-3",
    ]
    assert main([str(recipe), *options]) == 0
    [gpu] = counted
    waits = [x for x in gpu.waits if not x.startswith(vectorised.__file__)]
    assert len(gpu.waits) - len(waits) <= 1
    assert 2 <= len(waits) <= 5, waits
