"""Matrix products of the encoder, through the faster library where torch picks the slower.

On x86 torch sends float32 matrix products to MKL, which runs at half of oneDNN's speed on AMD CPUs.
oneDNN's kernel is in every CPU build of torch, as the operator that torch.compile uses; it has no
gradient, so training takes the usual way, and so do a few rows, as of a stream's short chunk. Its
int8 product is behind `Int8Weight`.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from . import kernels

# of float32, for which oneDNN's product takes 1.13 to 1.36 times F.linear's time (one core of a
# Xeon, weights of 512 x 512 to 512 x 2048); from 4 rows on it is as fast or faster
FEW_ROWS = 3


class Int8Weight:
    """A weight (D_out, D_in) as int8, with one scale for each output, packed for oneDNN.

    The product quantises each row of its input to 8 bits by the row's own largest value, so that a
    row's result does not depend on the other rows; sums are exact, in int32. `plain` also keeps the
    weight as it is, for kernels of our own.
    """

    def __init__(self, weight: torch.Tensor, plain: bool = False):
        weight = weight.detach().float()
        self.scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        rounded = (weight / self.scale[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.rounded = rounded if plain else None
        self.zero_points = torch.zeros(len(weight), dtype=torch.int64, device="cpu")
        self.dtype = torch.int8

    def __getstate__(self):  # of a copy, and of pickle: what is packed has no storage
        return vars(self) | {"packed": self.packed.to_dense().t().contiguous()}

    def __setstate__(self, state):
        packed = torch.ops.onednn.qlinear_prepack(state["packed"], None)
        vars(self).update(state | {"packed": packed})

    def product(
        self, x: torch.Tensor, bias: torch.Tensor | None, after: str = "none"
    ) -> torch.Tensor:
        """x (..., D_in) float32 -> (..., D_out) float32, then what comes after (`linear`)."""
        rows, compiled = x.flatten(0, -2), kernels.for_cpu(x)
        if compiled is not None:
            rows = rows.contiguous()
            eight_bit, scale = compiled.quantized(rows)
            y = compiled.scaled(self._of_eight_bits(eight_bit), scale, bias, after)
        else:
            scale = rows.abs().amax(1, keepdim=True).clamp_(min=1e-12).div_(127)
            y = self._of_eight_bits((rows / scale).round_().add_(128).to(torch.uint8))
            y = AFTER[after](y.mul_(scale) if bias is None else torch.addcmul(bias, y, scale))
        return y.unflatten(0, x.shape[:-1])

    def _of_eight_bits(self, rows: torch.Tensor) -> torch.Tensor:
        # unsigned with a zero point of 128: oneDNN's signed form is not vectorised on x86
        return torch.ops.onednn.qlinear_pointwise(
            *(rows, 1.0, 128, self.packed, self.scale, self.zero_points),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | Int8Weight,
    bias: torch.Tensor | None = None,
    after: str = "none",
) -> torch.Tensor:
    """x (..., D_in), weight (D_out, D_in), or (D_out, D_in, 1 ...) of a convolution of width 1 ->
    (..., D_out), then "swish" or "relu" where asked for."""
    if isinstance(weight, Int8Weight):
        return weight.product(x, bias, after)
    if (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and x.numel()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        if x.dtype == torch.float32 and x.numel() > FEW_ROWS * x.shape[-1]:
            return torch.ops.mkldnn._linear_pointwise(x, weight.flatten(1), bias, after, [], "")
        fast = x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if fast and not weight.is_inference():
            return torch.ops.mkldnn._linear_pointwise(x, _packed(weight), bias, after, [], "")
    weight = weight if weight.dim() == 2 else weight.flatten(1)  # no operation in a trace
    return AFTER[after](F.linear(x, weight, bias))


def _packed(weight: torch.Tensor) -> torch.Tensor:
    """A bfloat16 weight in oneDNN's order, kept while the weight lives and stays what it is. It is
    put in that order for every product otherwise, a tenth of the time of some hundred rows. With it
    a bfloat16 model takes the memory of a float32 one."""
    version, packed = _PACKED.get(weight, (None, None))
    if version != weight._version:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().flatten(1), 1)  # any rows
        _PACKED[weight] = weight._version, packed
    return packed


_PACKED = WeakIdKeyDictionary()
AFTER = {"none": lambda y: y, "swish": F.silu, "relu": F.relu}


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x, after: str = "none"):
        return linear(x, self.weight, self.bias, after)


class Pointwise(nn.Conv1d):
    """A convolution of width 1, for its checkpoint's shape: its weight goes through `linear`."""


def quantize(module: nn.Module, plain: bool = False) -> int:
    """Puts int8 in place of the weights of every `Linear`, `Pointwise` and LSTM within `module`;
    the number replaced. For inference on a CPU; such a model cannot be saved or trained. `plain` as
    in `Int8Weight`.

    ValueError: this torch has no int8 product for this CPU.
    """
    if "onednn" not in torch.backends.quantized.supported_engines:
        raise ValueError("int8 needs a torch built with oneDNN for a CPU; use bfloat16 or float32")
    count = 0
    for child in module.modules():
        names = ("weight",) if isinstance(child, Linear | Pointwise) else ()
        if isinstance(child, nn.LSTM):
            names = [name for name, _ in child.named_parameters() if name.startswith("weight")]
        for name in names:
            weight = getattr(child, name).detach().flatten(1)
            delattr(child, name)
            setattr(child, name, Int8Weight(weight, plain))
        count += len(names)
    return count


def share_quantized(source: nn.Module, target: nn.Module) -> None:
    """Puts the int8 weights of `source`, which no state dict has, into `target`'s modules of the
    same names."""
    for path, module in source.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Int8Weight):
                delattr(target.get_submodule(path), name)
                setattr(target.get_submodule(path), name, value)
