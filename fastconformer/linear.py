"""Matrix products of the encoder, through the faster library where torch picks the slower.

On x86 torch sends float32 matrix products to MKL, which runs at half of oneDNN's speed on AMD CPUs.
oneDNN's kernel is in every CPU build of torch, as the operator that torch.compile uses; it has no
gradient, so training takes the usual way.
"""

import torch
from torch import nn
from torch.nn import functional as F


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, silu: bool = False
) -> torch.Tensor:
    """x (..., D_in), weight (D_out, D_in) -> (..., D_out), then SiLU where asked for."""
    if (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and x.numel()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        after = "swish" if silu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], "")
    y = F.linear(x, weight, bias)
    return F.silu(y) if silu else y


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x, silu: bool = False):
        return linear(x, self.weight, self.bias, silu)
