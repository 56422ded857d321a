"""The tiles of the fused loss on a GPU: Triton kernels, and cuBLAS for the gradient's products.

The functions are those of fused_vectorised.py. Everything is summed in a fixed order, without
atomics. With TRITON_INTERPRET=1 set before the import, the kernels run on CPU tensors, which is how
the tests check them without a GPU. Importing this module needs triton.
"""

from .triton_gradient import gradient, scatter
from .triton_lattice import lattice
from .triton_scores import hidden, scores, scores_write_logits

__all__ = ["gradient", "hidden", "lattice", "scatter", "scores", "scores_write_logits"]
