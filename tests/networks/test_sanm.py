"""SAN-M and the adaptor: the memory's formula, and a clip in a batch."""

import torch

from fastconformer.networks.sanm import Adaptor, SANMAttention, SANMEncoder


def test_memory_is_the_formula():
    torch.manual_seed(0)
    attention = SANMAttention(6, 4, 2, 5, 0.0)
    values, valid = torch.randn(2, 7, 4), torch.arange(7) < torch.tensor([7, 4])[:, None]
    kernel = attention.fsmn_block.weight[:, 0]  # (D, 5)
    wanted = torch.zeros(2, 7, 4)
    for clip, length in enumerate((7, 4)):
        for t in range(length):
            wanted[clip, t] = values[clip, t]
            for tap in range(5):
                at = t + tap - 2
                if 0 <= at < length:
                    wanted[clip, t] += kernel[:, tap] * values[clip, at]
    torch.testing.assert_close(attention.memory(values, valid), wanted, rtol=1e-5, atol=1e-6)


def test_a_clip_alone_equals_the_clip_in_a_batch():
    torch.manual_seed(0)
    encoder = SANMEncoder(14, 8, 2, 16, 3, 2, 11).eval()
    lengths = torch.tensor([9, 5, 1])
    x = torch.randn(3, 9, 14)
    for adaptor in (Adaptor(8, 6, 16, 2), Adaptor(8, 6, 16, 2, downsample=2)):
        adaptor.eval()
        with torch.no_grad():
            together, rows = adaptor(*encoder(x, lengths))
            for i, length in enumerate(lengths.tolist()):
                alone, n_rows = adaptor(*encoder(x[i : i + 1, :length], lengths[i : i + 1]))
                assert n_rows[0] == rows[i] == alone.shape[1]
                torch.testing.assert_close(together[i, : rows[i]], alone[0], rtol=1e-4, atol=1e-5)


def test_recomputation_gives_the_same_gradients():
    torch.manual_seed(0)
    encoder, x, lengths = (
        SANMEncoder(14, 8, 2, 16, 3, 1, 5),
        torch.randn(2, 6, 14),
        torch.tensor([6, 4]),
    )
    grads = []
    for recompute in (False, True):
        encoder.recompute = recompute
        encoder.zero_grad()
        encoder(x, lengths)[0].square().sum().backward()
        grads.append([p.grad.clone() for p in encoder.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
