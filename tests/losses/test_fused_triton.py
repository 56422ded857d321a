"""The GPU kernels of the fused loss in Triton's interpreter, against the plain PyTorch tiles."""

import pytest
import torch

from fastconformer.losses import (
    fused_cells,
    fused_operator,
    fused_transducer_loss,
    fused_vectorised,
)

pytest.importorskip("triton", reason="triton is not installed")
from fastconformer.losses import fused_triton

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them compiled")


def losses_and_grads(backend, monkeypatch, inputs, batch, **options):
    monkeypatch.setattr(fused_operator, "_backend", lambda device: backend)
    torch.manual_seed(7)  # dropout's seed
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = fused_transducer_loss(*leaves, *batch, **options)
    (value * torch.linspace(1.0, -0.5, len(value))).sum().backward()
    return value.detach(), [x.grad for x in leaves]


@interpreted
@pytest.mark.parametrize(
    ("dtype", "durations", "options"),
    [
        # U>T, T=1, U=0; blank in the narrow block of columns; tiles that cut frames and clips apart
        (torch.float32, (0, 1, 2, 3, 4), {"sigma": 0.05, "clamp": 0.3, "fastemit_lambda": 0.02}),
        (torch.float32, None, {"activation": "tanh", "dropout": 0.3}),
        # blank among the wide columns, a duration beyond T, a backward pass over some cells only
        (torch.float32, (2, 0, 9), {"activation": "sigmoid", "eps": 1e-2, "blank": 0}),
        (torch.float64, (0, 1, 2), {"dropout": 0.2, "eps": 1e-3}),
        (torch.bfloat16, (0, 1, 2, 3, 4), {"sigma": 0.05}),
    ],
)
def test_kernels_equal_plain_pytorch(monkeypatch, dtype, durations, options):
    if dtype == torch.float32:  # as on a GPU; plain PyTorch too has to leave the padding alone
        monkeypatch.setitem(fused_cells.PADDED_TO, "cpu", 64)
    generator = torch.Generator().manual_seed(0)
    n_outputs, width = 18 + len(durations or ()), 20
    shapes = [(3, 5, width), (3, 7, width), (n_outputs, width), (n_outputs,)]
    inputs = [0.7 * torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    targets = torch.randint(1, 17, (3, 6), generator=generator)
    batch = (targets, torch.tensor([5, 1, 4]), torch.tensor([6, 2, 0]))
    options |= {"durations": durations, "tile_cells": 17}
    expected = losses_and_grads(fused_vectorised, monkeypatch, inputs, batch, **options)
    actual = losses_and_grads(fused_triton, monkeypatch, inputs, batch, **options)
    tolerance = {torch.float64: 1e-7, torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=0.0)
    for a, e in zip(actual[1], expected[1], strict=True):
        assert (a - e).abs().max() <= tolerance * e.abs().max()


@interpreted
def test_the_lattice_keeps_its_digits_over_thousands_of_frames():
    """Occupancies against float64 where sums reach 10^4; float32 sums would be 1e-3 off."""
    torch.manual_seed(0)
    n_frames, n_rows = 700, 2
    job = fused_cells.Job(
        *[None] * 5, torch.tensor([n_frames]), torch.tensor([n_rows]), torch.tensor([0]),
        ((n_frames, n_rows),), n_frames, n_rows, n_frames * n_rows, 0, 1, None, 0.0, "relu", 0.0, 0,
    )._replace(enc=torch.zeros(1, 1))  # fmt: skip
    scores = [-20.0 - torch.rand(n_frames * n_rows) for _ in range(2)]
    found = []
    for backend in (fused_vectorised, fused_triton):
        blank, label = (x.clone() for x in scores)
        nothing = torch.zeros(n_frames * n_rows)
        cells = fused_cells.Cells(nothing, nothing, blank, label, nothing[:, None][:, :0])
        log_likelihood = backend.lattice(job, cells, True)
        assert log_likelihood.item() < -1e4
        found.append((log_likelihood, blank, label))
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kernels_on_a_gpu(monkeypatch, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 90, 640), (4, 31, 640), (1030, 640), (1030,)]
    inputs = [0.3 * torch.randn(s, generator=generator).to("cuda", dtype) for s in shapes]
    targets = torch.randint(0, 1024, (4, 30), generator=generator).cuda()
    batch = (targets, torch.tensor([90, 1, 50, 77]), torch.tensor([30, 4, 0, 12]))
    for options in ({}, {"dropout": 0.2, "tile_cells": 1000}, {"eps": 1e-6}):
        options["durations"] = (0, 1, 2, 3, 4)
        expected = losses_and_grads(fused_vectorised, monkeypatch, inputs, batch, **options)
        actual = losses_and_grads(fused_triton, monkeypatch, inputs, batch, **options)
        tolerance = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=0.0)
        for a, e in zip(actual[1], expected[1], strict=True):
            assert (a - e).abs().max() <= tolerance * e.abs().max()
        again = losses_and_grads(fused_triton, monkeypatch, inputs, batch, **options)
        assert all(torch.equal(a, b) for a, b in zip(again[1], actual[1], strict=True))


def test_tiles_of_a_gpu_fill_it():
    """Hidden rows bound the forward pass, where no logits are written: at a vocabulary of 8192 it
    has some programs for each processor. In the backward pass logits stay within the L2 cache."""
    meta = {"device": "meta", "dtype": torch.bfloat16}
    weight = torch.empty(8256, 640, **meta)
    job = fused_cells.Job(
        torch.empty(1, 640, **meta), None, weight, *[None] * 5, (), 1, 1, 1_500_000, 8192, 8193,
        (0, 1, 2, 3, 4), 0.0, "relu", 0.0, 0,
    )  # fmt: skip
    forward = next(fused_cells.tiles(job, 0, logits=False))
    backward = next(fused_cells.tiles(job, 0))
    assert len(forward.index) / 128 > 4 * 132  # rows of a program; processors of an H200
    assert len(forward.index) * 640 < 1 << 31  # offsets of 32 bits
    assert len(backward.index) * 8256 * 2 <= 32 << 20
