"""What all numba kernels share: compiling, threads, exponentials, bfloat16.

Loops over logits are ones that LLVM vectorises, with an exponential of our own in float32, as
libm's would be a call for each number. bfloat16, which numba does not know, passes as its 16 bits.

Importing this module needs numba. Kernels compile at their first call, for some seconds, and are
cached on disk where that is possible. They use at most as many threads as torch.
"""

import contextlib
import math
import threading

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

# Two Python threads inside parallel kernels at once abort the process under numba's own pool.
_one_at_a_time = threading.Lock()

# About 0.1 ms of work; waking a second thread for less costs more than it saves.
_LOGITS_OF_A_THREAD = 100_000

# Not "nnan" and "ninf": a NaN has to come through to the loss, and -inf is a legal logit.
REORDER = {"reassoc", "nsz", "contract"}


@contextlib.contextmanager
def threads(n_logits):
    """Exclusive use of numba's pool, with at most torch's number of threads; gives their number."""
    of_torch = torch.get_num_threads()
    wanted = min(of_torch, numba.config.NUMBA_NUM_THREADS, 1 + n_logits // _LOGITS_OF_A_THREAD)
    with _one_at_a_time:
        of_numba = numba.get_num_threads()
        try:
            numba.set_num_threads(wanted)
            yield wanted
        finally:
            numba.set_num_threads(of_numba)
            # Starting its OpenMP pool, numba sets the number of threads for torch's OpenMP as well.
            if torch.get_num_threads() != of_torch:
                torch.set_num_threads(of_torch)


def kept(**options):
    """numba's njit, what it compiles kept on disk where that is possible."""

    def decorate(function):
        try:
            return njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # neither this folder nor the user's cache folder can be written
            return njit(nogil=True, error_model="numpy", **options)(function)

    return decorate


kernel = kept(parallel=True)


def array(tensor: torch.Tensor) -> np.ndarray:
    """A view of it; bfloat16 as its bits."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


@intrinsic
def float32_of_bits(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def bits_of_float32(typing_context, x):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693145751953125)  # 16 bits: times an exponent it is exact
_LN2_LOW = np.float32(1.4286068203094172e-06)
_C7, _C6, _C5, _C4 = (np.float32(1 / math.factorial(n)) for n in (7, 6, 5, 4))
_C3, _C2 = np.float32(1 / 6), np.float32(0.5)
_ONE, _HALF, _ZERO = np.float32(1.0), np.float32(0.5), np.float32(0.0)
_LEAST = np.float32(-87.0)  # exp of it is just above the least normal number
_BIAS, _MANTISSA_BITS = np.int32(127), np.int32(23)


@njit(fastmath={"contract"})
def _exp_float32(x):
    """exp(x) for x <= 0, within 2e-7 of it; 0 below -87, NaN for NaN. No calls, no branches."""
    bounded = max(x, _LEAST)  # NaN stays NaN, in this order
    exponent = np.int32(bounded * _LOG2_E - _HALF)  # to nearest, as the argument is not positive
    r = bounded - np.float32(exponent) * _LN2_HIGH - np.float32(exponent) * _LN2_LOW
    y = _C4 + r * (_C5 + r * (_C6 + r * _C7))
    y = _ONE + r * (_ONE + r * (_C2 + r * (_C3 + r * y)))
    y = y * float32_of_bits(np.int32((exponent + _BIAS) << _MANTISSA_BITS))
    return _ZERO if x < _LEAST else y


def exp_of(x):
    """exp for x <= 0 of either type, inside kernels."""
    raise NotImplementedError


@overload(exp_of)
def _exp_of_type(x):
    if x == types.float32:
        return lambda x: _exp_float32(x)
    return lambda x: math.exp(x)


@njit
def maximum(row):
    """The largest number; a NaN may be passed over, and shows in the sum that follows."""
    # LLVM keeps the order of comparisons of floats; four chains of them run side by side.
    n = row.shape[0] // 4
    a = b = c = d = row[0]
    for v in range(n):
        a = max(a, row[v])
        b = max(b, row[v + n])
        c = max(c, row[v + 2 * n])
        d = max(d, row[v + 3 * n])
    for v in range(4 * n, row.shape[0]):
        a = max(a, row[v])
    return max(max(a, b), max(c, d))


@njit(fastmath=REORDER)
def sum_exp(row, top):
    total = 0.0  # float64: sums over the classes err less than their terms
    for v in range(row.shape[0]):
        total += exp_of(row[v] - top)
    return total


def wide(x):
    """A stored number as a float: float32 of bfloat16's bits or of int8, else itself."""
    raise NotImplementedError


@overload(wide)
def _wide_of_type(x):
    if x == types.uint16:
        return lambda x: float32_of_bits(np.int32(np.int32(x) << np.int32(16)))
    if x == types.int8:
        return lambda x: np.float32(x)
    return lambda x: x


def narrow(x, like):
    """A float as `like` stores it: to the nearest of bfloat16 (ties to even) as its bits, else
    itself."""
    raise NotImplementedError


@overload(narrow)
def _narrow_to_type(x, like):
    if like.dtype == types.uint16:

        def to_bits(x, like):
            bits = bits_of_float32(np.float32(x))
            rounded = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> 16
            # a NaN of low bits alone would be rounded to infinity
            return np.uint16(rounded if x == x else np.int32(0x7FC0))

        return to_bits
    return lambda x, like: x


@njit(fastmath={"contract"}, error_model="numpy")
def sigmoid(x):
    e = exp_of(-abs(x))
    y = np.float32(1) / (np.float32(1) + e)
    return y if x >= 0 else e * y
