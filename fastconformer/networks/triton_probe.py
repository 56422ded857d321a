"""A small Triton kernel that is compiled and run to see whether Triton works on a GPU at all.

Importing this module needs triton.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _doubled_kernel(x_ptr, SIZE: tl.constexpr):
    at = x_ptr + tl.arange(0, SIZE)
    tl.store(at, 2 * tl.load(at))


def run(device: torch.device) -> None:
    """Raises what Triton raises where it cannot compile, load or launch; RuntimeError: a kernel
    computed what it should not."""
    x = torch.arange(32, dtype=torch.float32, device=device)
    expected = 2 * x
    _doubled_kernel[(1,)](x, SIZE=32)
    if not torch.equal(x, expected):
        raise RuntimeError("a kernel's numbers are wrong")
