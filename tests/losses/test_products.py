"""The products' choice between torch's ways, as other versions of torch and a GPU would have it."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastconformer.losses import fused_cells, products
from fastconformer.transfers import on_host


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.6.0+cu124", False), ("2.8.0", False), ("2.9.1+cu128", False), ("2.10.0", True)],
)
def test_sums_into_float32_only_where_torch_can(version, expected):
    assert products.sums_into_float32(version) is expected


@pytest.mark.parametrize("version", ["2.8.0", "2.9.1", "2.13.0"])
def test_outer_products_of_half_types_on_a_gpu(monkeypatch, version):
    """On fake tensors: torch before 2.10 is not asked for an addmm of two types."""
    monkeypatch.setattr(torch, "__version__", version)
    calls = []
    for name in ("addmm", "mm"):

        def record(*args, _name=name, **options):
            calls.append((_name, options["out_dtype"]))
            return torch.empty(7, 5, device="cuda")

        monkeypatch.setattr(torch, name, record)
    with FakeTensorMode():
        out = torch.empty(7, 5, device="cuda")
        grad, hidden = (torch.empty(3, n, device="cuda", dtype=torch.bfloat16) for n in (7, 5))
        products.add_outer_product(out, grad, hidden)
    assert calls == [("addmm" if version == "2.13.0" else "mm", torch.float32)]


def test_lengths_reach_the_host_in_one_transfer(monkeypatch):
    """On fake tensors of a GPU: both together, once; those that are on the host already, never."""
    transfers, true = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: transfers.append(x.device.type) or true(x))
    here = torch.tensor([3, 4])
    assert [x.tolist() for x in on_host(here, here + 1)] == [[3, 4], [4, 5]]
    assert "cuda" not in transfers
    with FakeTensorMode():
        there = [torch.empty(2, dtype=torch.int64, device="cuda") for _ in range(2)]
        found = on_host(*there)
    assert [x.device.type for x in found] == ["cpu", "cpu"] and transfers.count("cuda") == 1


def test_tiles_of_some_cells_wait_for_the_device_once(monkeypatch):
    reads, true = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(len(x)) or true(x))
    job = fused_cells.Job(
        torch.empty(1, 4), None, torch.empty(8, 4), *[None] * 5, (), 1, 1, 50, 0, 8, None, 0.0,
        "relu", 0.0, 0,
    )  # fmt: skip
    skipped = torch.arange(50) % 3 > 0
    found = list(fused_cells.tiles(job, 5, skipped=skipped))
    assert len(reads) == 1
    assert torch.cat([tile.index for tile in found]).tolist() == list(range(0, 50, 3))
    assert [(t.first, t.last) for t in found] == [(0, 12), (15, 27), (30, 42), (45, 48)]
    assert not list(fused_cells.tiles(job, 5, skipped=torch.ones(50, dtype=torch.bool)))
