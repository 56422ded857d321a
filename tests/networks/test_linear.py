"""Which library takes a matrix product, by its shape alone."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastconformer.networks.linear import FEW_ROWS, linear


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN"
)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, FEW_ROWS), (2, 2), (7,)])
@pytest.mark.parametrize("after", ["none", "swish"])
@torch.no_grad()
def test_a_few_rows_take_the_usual_way(shape, after):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 32, generator=generator)
    weight, bias = torch.randn(48, 32, generator=generator), torch.randn(48, generator=generator)
    with Called() as called:
        found = linear(x, weight, bias, after)
    n_rows = x.numel() // 32
    assert any("_linear_pointwise" in name for name in called.names) == (n_rows > FEW_ROWS)
    exact = linear(x.double(), weight.double(), bias.double(), after)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
