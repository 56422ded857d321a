"""The relative shift of attention against its definition, and as torch.compile sees it."""

import pytest
import torch

from fastconformer.networks.attention import _relative_shift


@pytest.mark.parametrize(("n", "t"), [(1, 1), (1, 7), (7, 7), (3, 7), (7, 1), (5, 9), (64, 64)])
def test_row_i_takes_its_columns(n, t):
    x = torch.randn(2, 3, t + n - 1, n).transpose(-2, -1)  # strided, as a product may give it
    expected = torch.stack([x[:, :, i, n - 1 - i : n - 1 - i + t] for i in range(n)], 2)
    assert torch.equal(_relative_shift(x, t), expected)


def test_a_trace_has_no_break():
    compiled = torch.compile(_relative_shift, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 4, 12)
    assert torch.equal(compiled(x, 9), _relative_shift(x, 9))
