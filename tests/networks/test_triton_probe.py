"""Whether Triton works on a GPU: the probe in the interpreter, and what is done without it."""

import contextlib
import logging
import subprocess
import sys

import pytest
import torch

from fastconformer.losses import fused_operator, fused_vectorised
from fastconformer.networks import kernels

pytest.importorskip("triton", reason="triton is not installed")

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton works on a GPU")
GPU = torch.device("cuda", 0)


@pytest.fixture
def asked(caplog):
    """What `triton_works` says of `GPU`, and its one line."""
    kernels._tried.cache_clear()

    def ask():
        with caplog.at_level(logging.WARNING):
            answers = {kernels.triton_works(GPU), kernels.triton_works(GPU)}
        (record,) = caplog.records
        assert answers == {False}
        return record.getMessage()

    yield ask
    kernels._tried.cache_clear()


@without_gpu
def test_the_probe_compares_what_its_kernel_computes(monkeypatch):
    from fastconformer.networks import triton_probe

    triton_probe.run(torch.device("cpu"))
    monkeypatch.setattr(triton_probe.tl, "load", lambda at: 7.0)
    with pytest.raises(RuntimeError, match="wrong"):
        triton_probe.run(torch.device("cpu"))


@without_gpu
def test_a_gpu_that_cannot_be_used_is_said_once_and_the_loss_is_plain(asked):
    assert asked().startswith("no Triton kernels on cuda:0, so plain PyTorch, slower: ")
    assert fused_operator._backend(GPU) is fused_vectorised


@without_gpu
@pytest.mark.usefixtures("asked")
def test_torch_compile_asks_before_it_traces():
    def function(x):
        return x + 1 if kernels.triton_works(torch.device("cuda", 0)) else x - 1

    found = torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(2))
    assert found.tolist() == [-1, -1]


@pytest.mark.parametrize(("card", "said"), [((7, 5), "7.5, 8.0 is needed"), ((8, 6), "compiler")])
def test_an_old_card_and_a_missing_compiler_are_told_apart(asked, monkeypatch, card, said):
    from fastconformer.networks import triton_probe

    def no_compiler(device):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: card)
    monkeypatch.setattr(triton_probe, "run", no_compiler)
    line = asked()
    assert said in line and "\n" not in line


def test_importing_the_library_imports_neither_triton_nor_dynamo():
    code = "import fastconformer.model, fastconformer.losses, sys\n"
    code += "from fastconformer.networks import kernels\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch._dynamo', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
