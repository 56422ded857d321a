"""The prediction network on a GPU, which autocast would take for float16."""

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
