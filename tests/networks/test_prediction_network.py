"""The prediction network on a GPU: what autocast and cuDNN would do with it."""

import torch
from played_gpu import PlayedGpu

from fastconformer.networks.heads import LSTM


def test_the_lstm_keeps_its_type_where_autocast_has_another():
    network, seen = LSTM(4, 1, 0.0).eval(), []
    handle = network.lstm.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cuda"))
    )
    x = torch.randn(2, 3, 4)
    expected, _ = network(x)
    torch.set_autocast_enabled("cuda", True)
    try:
        network(x)  # on a CPU it is none of ours
        x.there = True
        with PlayedGpu(network):
            found, _ = network(x)
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)
    handle.remove()
    assert seen == [False, True, False]
    assert torch.equal(found, expected)


def test_an_lstm_in_eval_mode_has_gradients_on_a_gpu():
    """As where it is frozen and the embedding before it learns. Nothing is dropped."""
    network = LSTM(4, 2, 0.5).eval()
    given = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(2)]
    given[1].data.copy_(given[0])
    given[1].there = True
    network(given[0])[0].sum().backward()
    with PlayedGpu(network):
        out, _ = network(given[1])
    assert not network.lstm.training and network.lstm.dropout == 0.5
    out.sum().backward()
    torch.testing.assert_close(given[1].grad, given[0].grad)
