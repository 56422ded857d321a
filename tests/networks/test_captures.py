"""What a capture asks of torch's CUDA API, in its versions, on one that only notes it."""

import contextlib

import pytest
import torch

from fastconformer.networks import graphs
from fastconformer.networks.graphs import GraphCache, captured

DEVICE, POOL = torch.device("cpu", 0), (0, 7)


class Stream:
    def __init__(self, device, priority=0, name="of the cache"):
        self.device, self.name, self.waited_for = device, name, []

    def wait_stream(self, other):
        self.waited_for.append(other.name)


@pytest.fixture
def api(monkeypatch):
    """The calls of a capture, with the caller's stream; of each graph that `fails` allows its end
    raises as where something could not be captured."""

    class Api:
        calls, fails, current, entered = [], 0, Stream(DEVICE, name="the caller's"), []

        @staticmethod
        def inside(what, which):
            Api.entered.append(what)
            return contextlib.nullcontext()

    class Graph:
        def capture_begin(self, pool=None, capture_error_mode="global"):
            assert capture_error_mode == "thread_local"
            Api.calls.append(("begin", pool))

        def capture_end(self):
            Api.calls.append("end")
            if Api.fails:
                Api.fails -= 1
                raise RuntimeError("operation failed due to a previous error during capture")

        def replay(self):
            Api.calls.append("replay")

    def end(index, pool):
        Api.calls.append(("out of", index, pool))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Api.current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: Api.inside("device", device))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Api.inside("stream", stream))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
    Api.end = staticmethod(end)
    return Api


def test_what_is_captured_ran_before_and_is_waited_for(api):
    captured(GraphCache(), lambda: api.calls.append("work"), DEVICE)()
    assert api.calls == ["work", ("begin", POOL), "work", "end", "replay"]
    assert api.entered == [
        "device",
        "stream",
    ]  # else the way back makes a context
    assert api.current.waited_for == ["of the cache"]


@pytest.mark.parametrize("is_old", [False, True])
def test_a_capture_that_failed_leaves_nothing_in_capture(api, monkeypatch, is_old):
    """The allocator, by a function that has another name before torch 2.8, and the generator, which
    a second capture tells. The caller's stream waits for the buffers all the same."""
    if is_old:
        monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
        monkeypatch.setattr(
            torch._C, "_cuda_endAllocateCurrentStreamToPool", api.end, raising=False
        )
    api.fails = 1
    with pytest.raises(RuntimeError, match="previous error"):
        captured(GraphCache(), lambda: None, DEVICE)
    assert api.calls == [("begin", POOL), "end", ("out of", 0, POOL), ("begin", None), "end"]
    assert api.current.waited_for == ["of the cache"]


def test_a_graph_holds_no_weights_that_autocast_cast(monkeypatch):
    """They are freed at its end, and replays would read what lies there then."""
    seen = []

    def make():
        return [], lambda: seen.append(torch.is_autocast_enabled("cuda"))

    monkeypatch.setattr(graphs, "captured", lambda cache, function, device: function())
    torch.set_autocast_enabled("cuda", True)
    try:
        GraphCache().get("steps", make, 1, torch.device("cuda", 0))
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert seen == [False]


def test_settings_by_the_names_of_torch_2_9():
    """Where these were used, the old ones raise."""
    matmul, found = torch.backends.cuda.matmul, {}
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the old names alone")
    triton_attention = pytest.importorskip("fastconformer.networks.triton_attention")
    before = matmul.fp32_precision
    try:
        for matmul.fp32_precision in ("ieee", "tf32"):
            found[matmul.fp32_precision] = graphs._settings(), triton_attention.precision()
        with pytest.raises(RuntimeError, match="mix"):
            torch.get_float32_matmul_precision()
    finally:
        matmul.fp32_precision = before
    assert found["ieee"][0] != found["tf32"][0]
    assert found["ieee"][1] == "tf32x3" and found["tf32"][1] == "tf32"
