"""Compiles the kernels of csrc/. The kernels are not here yet."""


def usable(x) -> bool:
    return False
