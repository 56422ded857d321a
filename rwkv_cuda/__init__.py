"""The WKV7 operator of RWKV-7: one recurrence, three implementations behind one function."""

from rwkv_cuda.wkv7 import wkv7, wkv7_bidirectional

__all__ = ["wkv7", "wkv7_bidirectional"]
