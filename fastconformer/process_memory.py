"""What memory a process takes and the machine has left, in bytes, as Linux tells it in /proc, and
how its end is told."""

import contextlib
import ctypes
import gc
import os
from pathlib import Path

PROC = Path("/proc")


def resident_bytes() -> int:
    """What this process holds now; 0 where the system does not tell."""
    return _bytes("self/status", "VmRSS") or 0


def peak_bytes(pid: int | str = "self") -> int:
    """The most that a process has held since its start, or since `forget_peak`; 0 where the system
    does not tell."""
    return _bytes(f"{pid}/status", "VmHWM") or 0


def forget_peak() -> bool:
    """Lets this process's peak start anew from what it holds; False where the system does not."""
    try:
        (PROC / "self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def free_bytes() -> int:
    """What a new job may take without swapping; half of all there is where none is told."""
    free = _bytes("meminfo", "MemAvailable")
    if free is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return free


def give_back() -> None:
    """Returns to the system what Python and the C library hold for later, so that what is resident
    afterwards is in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says so in torch's, the CUDA runtime's, cuBLAS's, Triton's or a CPU's own way."""
    said = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return any(words in str(error) for words in said)


def _bytes(file: str, key: str) -> int | None:
    with (
        contextlib.suppress(OSError),
        open(PROC / file, encoding="ascii", errors="replace") as lines,
    ):
        for line in lines:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None
