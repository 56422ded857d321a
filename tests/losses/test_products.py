"""The products' choice between torch's ways, as other versions of torch and a GPU would have it."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastconformer.losses import products


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
