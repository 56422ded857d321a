"""The matrix products of the losses, each by the library that is fastest for it."""

import torch
from torch import Tensor
from torch.nn import functional as F


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (C, D), weight (O, D) of any strides, bias (O,) -> (C, O)."""
    if _onednn(
        x, len(weight)
    ):  # several times faster than torch's own choice on some CPUs (linear.py)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def add_outer_product(out: Tensor, grad: Tensor, hidden: Tensor):
    """out (O, H) += grad (C, O)^T hidden (C, H), summed in out's type where the device can."""
    if _onednn(grad, hidden.shape[1]):
        transposed = grad.t().contiguous()
        out += torch.ops.mkldnn._linear_pointwise(transposed, hidden.t(), None, "none", [], "")
    elif out.dtype == grad.dtype:
        torch.addmm(out, grad.t(), hidden, out=out)
    elif grad.device.type == "cuda" and sums_into_float32(torch.__version__):
        torch.addmm(out, grad.t(), hidden, out_dtype=out.dtype, out=out)
    elif grad.device.type == "cuda" and "dtype" in torch.ops.aten.mm.overloads():  # 2.8
        out += torch.mm(grad.t(), hidden, out_dtype=out.dtype)
    else:
        out += grad.t() @ hidden


def sums_into_float32(version: str) -> bool:
    """Whether this torch's CUDA addmm adds a product of half types to float32. 2.8 and 2.9 have the
    argument out_dtype but refuse a sum of another type (pytorch issue 154086, mended in 2.10)."""
    return tuple(int(n) for n in version.split(".")[:2]) >= (2, 10)


def _onednn(x: Tensor, n: int) -> bool:
    """Whether a product of x with n columns goes there; small ones do not earn its set-up."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() * n > 1 << 22
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
