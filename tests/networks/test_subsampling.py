"""Subsampling of batches that a GPU's own kernels cannot count."""

import pytest
import torch
from played_gpu import PlayedGpu

from fastconformer.networks import kernels, subsampling
from fastconformer.networks.subsampling import ConvSubsampling


@pytest.mark.parametrize("kind", ["dw_striding", "striding"])
def test_training_on_a_gpu_parts_what_has_too_many_elements(kind, monkeypatch):
    """Those of two clips go, of three not: five clips in three parts, with the same gradients."""
    torch.manual_seed(0)
    module = ConvSubsampling(kind, 4, 8, 6, 16, False)
    features, lengths = torch.randn(5, 8, 21), torch.tensor([21, 20, 9, 1, 17])
    expected, expected_counts = module(features, lengths)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    monkeypatch.setattr(subsampling, "MOST_ELEMENTS_GPU", 2 * 16 * 14 * 8 + 1)
    monkeypatch.setattr(kernels, "triton_works", lambda device: True)
    parts, piece = [], module._piece
    monkeypatch.setattr(module, "_piece", lambda *part: parts.append(len(part[0])) or piece(*part))
    features.there = lengths.there = True
    with PlayedGpu(module):
        actual, counts = module(features, lengths)
    actual.square().sum().backward()
    assert parts == [2, 2, 1] and torch.equal(counts, expected_counts)
    torch.testing.assert_close(actual, expected)
    for actual, wanted in zip(module.parameters(), gradients, strict=True):
        torch.testing.assert_close(actual.grad, wanted)
