"""Compiles csrc/ into a shared library of plain C functions: ahead of time, or on first use.

    python -m rwkv_cuda.build                  # for the GPUs here, or all targets where none is
    python -m rwkv_cuda.build --arch sm_90a --report

The kernels include no torch header, so nvcc alone builds them, any torch of any version calls them
(cuda.py, through ctypes), and a machine without a GPU can compile and check them. Libraries lie
beside csrc/ where that is writable, else in the user's cache; their name holds a hash of the
sources and targets, so a changed source is compiled anew.
"""

import argparse
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rwkv_cuda import nvrtc

SOURCES = Path(__file__).parent / "csrc"
TARGETS = ("sm_80", "sm_90a", "sm_120")
logger = logging.getLogger("rwkv_cuda")


class BuildError(ValueError):
    """The kernels cannot be compiled; the message says why, in one line."""


def find_nvcc() -> str | None:
    """CUDA's compiler: of CUDA_HOME, on the PATH, or at the toolkit's usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    if found := shutil.which("nvcc"):
        candidates.append(Path(found))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(x) for x in candidates if x.is_file()), None)


def library_path(arches: tuple[str, ...]) -> Path:
    """Where the library for these targets lies, or will: the name holds a hash of the sources."""
    digest = hashlib.sha256("".join(arches).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    name = f"wkv7-{digest.hexdigest()[:16]}.so"
    shipped = SOURCES.parent / "built" / name
    if shipped.is_file() or os.access(SOURCES.parent, os.W_OK):
        return shipped
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "rwkv_cuda" / name


def compile_library(arches: tuple[str, ...], more: tuple[str, ...] = ()) -> tuple[Path, str]:
    """Compile for the targets, such as ("sm_80", "sm_90a"), with `more` options of nvcc; the
    library's path, ptxas's report.

    Raises: BuildError: no nvcc, or it failed.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc is not found; install the CUDA toolkit or set CUDA_HOME")
    codes = []
    for arch in arches:
        number = arch.removeprefix("sm_")
        codes += ["-gencode", f"arch=compute_{number},code={arch}"]
    options = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-Xptxas", "-v", *codes]
    options += more
    path = library_path(arches)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may compile the same: each writes its own file, the last rename wins.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        done = subprocess.run(
            [nvcc, *options, "-o", str(made), str(SOURCES / "wkv7.cu")],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            wrong = next((x for x in lines if "error" in x or "fatal" in x), "no message")
            raise BuildError(f"nvcc failed with {done.returncode}: {wrong.strip()}")
        os.replace(made, path)
    return path, done.stderr + done.stdout


def summarize(report: str) -> list[dict]:
    """ptxas's report, a row a kernel and target: arch, kernel, registers, spilled bytes."""
    rows = []
    for line in report.splitlines():
        if "Compiling entry function" in line:
            _, mangled, _, arch, *_ = line.split("'")
            rows.append(dict(arch=arch, kernel=_kernel_name(mangled), registers=0, spilled_bytes=0))
        elif "spill stores" in line and rows:
            stores, loads = line.split(",")[1:3]
            rows[-1]["spilled_bytes"] += int(stores.split()[0]) + int(loads.split()[0])
        elif "Used" in line and "registers" in line and rows:
            rows[-1]["registers"] = int(line.split("Used")[1].split()[0])
    return sorted(rows, key=lambda row: (row["arch"], row["kernel"]))


def _kernel_name(mangled: str) -> str:
    kind = next(x for x in ("forward", "backward", "scan") if x + "_kernel" in mangled)
    width = mangled.split("Li")[1].split("E")[0]
    dtype = "" if kind == "scan" else (" bfloat16" if "bf16" in mangled else " float32")
    return f"{kind} {width}{dtype}"


def local_arches() -> tuple[str, ...]:
    """Targets of the GPUs that torch sees here; none without a CUDA torch and a GPU."""
    import torch

    if not torch.cuda.is_available():
        return ()
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(sorted({_arch_of(x) for x in found if x[0] >= 8}))


def _arch_of(capability: tuple[int, int]) -> str:
    """From 10.0 on the family's first, which its later cards run, too: compilers know it longer."""
    major, minor = capability
    return "sm_90a" if capability == (9, 0) else f"sm_{major}{minor if major < 10 else 0}"


@functools.cache
def load() -> ctypes.CDLL | nvrtc.Library:
    """The kernels for the GPUs here, compiled now if they are not yet, by nvcc or without it.

    Raises: BuildError: no GPU of compute capability 8.0 or later, no compiler, or it failed.
    """
    arches = local_arches()
    if not arches:
        raise BuildError("no CUDA GPU of compute capability 8.0 or later is here")
    # What is compiled for sm_80 runs on all 8.x, for sm_120 on all 12.x; sm_90a's on 9.0 alone.
    covered = all(x in TARGETS or x.startswith(("sm_8", "sm_12")) for x in arches)
    path = library_path(TARGETS)
    if not (covered and path.is_file()):
        path = library_path(arches)
    if not path.is_file():
        logger.info("compiling the WKV7 kernels for %s, once", ", ".join(arches))
        if find_nvcc() is None:
            return through_nvrtc(path.parent)
        try:
            path, _ = compile_library(arches)
        except BuildError as error:  # an nvcc that is older than the card, or than the host's gcc
            logger.info("%s; trying NVRTC", error)
            return through_nvrtc(path.parent)
    return ctypes.CDLL(str(path))


def through_nvrtc(cache: Path) -> nvrtc.Library:
    """The kernels without nvcc. BuildError: there is no NVRTC, or it failed."""
    import torch

    def here() -> tuple[str, int]:
        device = torch.cuda.current_device()
        return _arch_of(torch.cuda.get_device_capability(device)), device

    try:
        driver = ctypes.CDLL("libcuda.so.1")
        # Most heads are 64 wide; what fails is to fail here, where there is another way.
        nvrtc.compiled(SOURCES, here()[0], 64, cache)
    except (OSError, nvrtc.NvrtcError) as error:
        raise BuildError(f"{error}; install the CUDA toolkit or set CUDA_HOME") from error
    return nvrtc.Library(SOURCES, cache, driver, here)


@functools.cache
def usable() -> bool:
    """Whether the kernels can run here; where not, says so and why, once."""
    try:
        load()
    except (BuildError, OSError) as error:
        logger.warning("WKV7 runs in plain PyTorch, slower than its CUDA kernels: %s", error)
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_cuda.build",
        description="Compile the WKV7 CUDA kernels ahead of time.",
        epilog="example: python -m rwkv_cuda.build --arch sm_80 --arch sm_90a --report",
    )
    parser.add_argument(
        "--arch",
        action="append",
        metavar="SM",
        help="target, such as sm_90a; may be repeated (default: the GPUs here, else "
        + ", ".join(TARGETS)
        + ")",
    )
    parser.add_argument(
        "--report", action="store_true", help="print registers and spilled bytes of each kernel"
    )
    options = parser.parse_args(arguments)
    arches = tuple(options.arch or local_arches() or TARGETS)
    try:
        path, report = compile_library(arches)
    except BuildError as error:
        print(f"rwkv_cuda.build: {error}", file=sys.stderr)
        return 1
    if options.report:
        for row in summarize(report):
            print(
                "{arch:8} {kernel:22} {registers:4} registers  {spilled_bytes:4} bytes".format(
                    **row
                )
            )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
