"""Attention drops scores in training mode, whether gradients are on or not."""

import pytest
import torch

from fastconformer.networks.attention import RelPositionMultiHeadAttention, position_encoding
from fastconformer.networks.local_attention import LocalRelPositionMultiHeadAttention

T, D = 12, 16


def full():
    positions = torch.arange(T - 1, -T, -1)
    hidden = torch.zeros(1, 1, 1, T, dtype=torch.bool)
    return RelPositionMultiHeadAttention(D, 2, 0.5, True), positions, hidden


def local():
    hidden = torch.zeros(1, T, dtype=torch.bool)
    return (
        LocalRelPositionMultiHeadAttention(D, 2, 0.5, True, (4, 4)),
        torch.arange(4, -5, -1),
        hidden,
    )


@pytest.mark.parametrize("kind", [full, local])
def test_dropout_is_on_without_gradients(kind):
    torch.manual_seed(0)
    attention, positions, hidden = kind()
    given = torch.randn(1, T, D), position_encoding(positions, D), hidden
    expected = attention.train()(*given)
    with torch.no_grad():
        attention.train()
        assert not torch.equal(attention(*given), attention(*given))
        torch.manual_seed(3)
        without = attention(*given)
        attention.eval()
        assert torch.equal(attention(*given), attention(*given))
    attention.train()
    torch.manual_seed(3)
    torch.testing.assert_close(attention(*given), without)
    assert not torch.equal(expected, without)
