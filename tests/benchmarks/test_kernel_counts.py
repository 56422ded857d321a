"""What a GPU would be asked for, counted without one."""

import torch

from benchmarks import kernel_counts


def test_kernels_and_bytes_of_what_is_known():
    """A copy of a transposed view, a product with a bias, a view, an addition in place."""

    def work(layer):
        x = torch.empty(4, 8, dtype=torch.bfloat16)
        y = torch.empty(8, 4, dtype=torch.bfloat16)

        def run():
            assert x.is_cuda
            layer(y.t().contiguous()).view(2, 12).t().add_(1)

        return run

    count = kernel_counts.on_gpu(lambda: [torch.nn.Linear(8, 6)], work)
    assert dict(count.kernels) == {"clone": 1, "addmm": 1, "add_": 1}
    assert count.bytes["clone"] == 2 * 2 * 32
    assert count.bytes["addmm"] == 2 * (32 + 48 + 6 + 24)


def test_what_a_layer_and_a_step_ask_for():
    assert kernel_counts.encoder_case("0.6b", 1, 10).kernels.total() <= 30
    batch = kernel_counts.encoder_case("0.6b", 64, 30)
    assert batch.kernels.total() <= 40 and batch.bytes.total() <= 180e3 * 64 * 375
    assert kernel_counts.step_case("0.6b", 1).kernels.total() <= 20


def test_what_subsampling_asks_for():
    count = kernel_counts.subsampling_case("0.6b", 64, 30)
    assert count.kernels.total() <= 30 and count.bytes.total() <= 2.5e6 * 64 * 30


def test_what_a_replay_saves():
    for case in (kernel_counts.launches_case, kernel_counts.chunk_case):
        assert case("0.6b", True).kernels.total() <= 12 < 500 < case("0.6b", False).kernels.total()
