"""BatchNorm's statistics where a step's batches lie on several processes, or come in pieces."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.loop.ranks import Ranks


class Sum(torch.autograd.Function):
    """Sum over all processes; what the sum does to the loss of any of them goes back to all."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return Sum.apply(gradient)


class SyncedBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d whose training statistics are those of all processes' clips together.

    The same quantity as torch's SyncBatchNorm, which refuses CPUs. Input (B, C, T).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float()
        count = torch.tensor([x.numel() / x.shape[1]], device=x.device)
        sums = Sum.apply(torch.cat([wide.sum((0, 2)), count]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = wide - mean[:, None]
        variance = Sum.apply((centred * centred).sum((0, 2))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None] + self.bias[:, None]).to(x.dtype)


def sync_batchnorm(model: nn.Module) -> None:
    """Every BatchNorm1d becomes a SyncedBatchNorm, with the same parameters and statistics."""
    for module in model.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = SyncedBatchNorm


class StepStatistics:
    """BatchNorm's running statistics over one step, as if its batches had passed one by one.

    With s0 before the step, momentum m and batch statistics b_i of A batches they are
    `(1 - m)^A s0 + sum of m (1 - m)^(A - 1 - i) b_i`. Alone, torch does just that. Where batches
    lie on several processes or come in pieces, each piece starts from s0 and the sum is made here.
    """

    def __init__(self, model: nn.Module):
        self.buffers = list(model.buffers())
        self.before = [buffer.clone() for buffer in self.buffers]
        self.norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d) and m.training]
        self.by_hand = False

    def restore(self) -> None:
        """As if the step had not been."""
        for buffer, value in zip(self.buffers, self.before, strict=True):
            buffer.copy_(value)

    def start(self, by_hand: bool) -> None:
        """Before the first batch, of each attempt."""
        self.restore()
        self.by_hand = by_hand and bool(self.norms)
        if self.by_hand:
            self.s0, self.tracked = (
                self._flat(),
                [n.num_batches_tracked.clone() for n in self.norms],
            )
            self.sum, self.weight = torch.zeros_like(self.s0), torch.zeros_like(self.s0)
            self.momentum = torch.cat(
                [torch.full_like(s, n.momentum) for n in self.norms for s in _statistics(n)]
            ).double()

    def add_piece(self, later: int, share: float) -> None:
        """After a piece: the share of a batch that it is, and how many batches come later."""
        if self.by_hand:
            kept = 1 - self.momentum
            weight = share * kept**later
            self.sum += weight * (self._flat() - kept * self.s0)
            self.weight += weight * self.momentum
            self._set(self.s0)

    def finish(self, n_batches: int, ranks: Ranks) -> None:
        """After the last batch of all processes."""
        if self.by_hand:
            ranks.add(self.sum)
            ranks.add(self.weight)
            self._set((1 - self.weight) * self.s0 + self.sum)
            for norm, tracked in zip(self.norms, self.tracked, strict=True):
                norm.num_batches_tracked.copy_(tracked + n_batches)

    def _flat(self) -> Tensor:
        return torch.cat([s.double() for norm in self.norms for s in _statistics(norm)])

    def _set(self, flat: Tensor) -> None:
        statistics = [s for norm in self.norms for s in _statistics(norm)]
        for s, value in zip(statistics, flat.split([len(s) for s in statistics]), strict=True):
            s.copy_(value)


def _statistics(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    return norm.running_mean, norm.running_var
