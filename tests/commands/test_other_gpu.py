"""A GPU that is not the current one, as `--device cuda:1` names it; no GPU is asked for."""

from types import SimpleNamespace

import torch

import fastconformer
from fastconformer import cli
from fastconformer.decoding import graphs


def test_a_command_makes_its_gpu_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(
        fastconformer,
        "load_model",
        lambda path, device, dtype: SimpleNamespace(heads=("ctc",), device=device),
    )
    args = SimpleNamespace(model="m", device="cuda:1", dtype="float32", batch_size=1, head=None)
    assert cli.load_model(args).device == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]


def test_the_host_waits_for_the_model_s_gpu(monkeypatch):
    """Whether decoding has ended is copied on the flag's device; an event on another device's
    stream would be over at once, and decoding stop after two replays, without a word."""
    recorded = []
    event = SimpleNamespace(record=lambda stream="the current device's": recorded.append(stream))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory, **k: empty(*a, **k))
    flag = SimpleNamespace(device=torch.device("cuda:1"))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *a, **k: None)
    graphs._to_host(flag)
    assert recorded == ["stream of cuda:1"]
