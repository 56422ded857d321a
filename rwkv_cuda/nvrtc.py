"""The kernels without nvcc: NVRTC, which torch's CUDA wheels bring, compiles csrc/ for the GPU that
is there, and the driver launches what it makes.

`Library` has the functions of the library that nvcc builds, as far as cuda.py calls them. Each
width of heads is compiled at its first use and kept on the disk.

Not yet run on a GPU: the tests compile, and follow launches up to the driver's door.
"""

import ctypes
import functools
import hashlib
import json
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

HEADERS = ("tile.h", "chunk.h", "backward.h", "launch.h")
FORWARD, BACKWARD, SCAN, SCAN_BACK = range(4)  # `Kernel` of csrc/launch.h
WHOLE = 0  # of `Mode`
THREADS = 128  # csrc/tile.h
MAX_DYNAMIC_SHARED_BYTES = 8  # CUfunction_attribute of the driver


class NvrtcError(ValueError):
    """NVRTC or the driver is not there, or refused; the message says why, in one line."""


@functools.cache
def find() -> ctypes.CDLL:
    """NVRTC as torch's wheels install it, or wherever the system finds it.

    Raises: NvrtcError: nowhere.
    """
    spec = find_spec("nvidia")
    folders = [Path(x) for x in (spec.submodule_search_locations or ())] if spec else []
    found = sorted(x for folder in folders for x in folder.glob("*/lib/libnvrtc.so.*"))
    for name in [*map(str, found[::-1]), "libnvrtc.so.13", "libnvrtc.so.12"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise NvrtcError("neither nvcc nor NVRTC is found")


def names(width: int) -> list[str]:
    """The kernels for heads of a width, as C++ spells them."""
    types = "float", "wkv7::bf16"
    kernels = [f"{kind}_kernel<{t}, {width}>" for kind in ("forward", "backward") for t in types]
    return [*kernels, f"scan_kernel<{width}>"]


def compile_width(sources: Path, arch: str, width: int) -> tuple[bytes, dict[str, str], str]:
    """The kernels for one width of heads and a target such as "sm_90a": machine code, {name:
    symbol}, ptxas's report.

    Raises: NvrtcError: no NVRTC, or it failed.
    """
    nvrtc, program, size = find(), ctypes.c_void_p(), ctypes.c_size_t()
    texts = [(sources / name).read_bytes() for name in HEADERS]
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), (sources / "wkv7.cu").read_bytes(), b"wkv7.cu", len(HEADERS),
        _strings(texts), _strings([name.encode() for name in HEADERS]),
    )  # fmt: skip

    def taken(what: str) -> bytes:
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    try:
        for name in names(width):
            nvrtc.nvrtcAddNameExpression(program, name.encode())
        options = [f"--gpu-architecture={arch}", "--std=c++17", f"-DWKV7_WIDTH={width}"]
        options += ["--ptxas-options=-v"]
        code = nvrtc.nvrtcCompileProgram(
            program, len(options), _strings([x.encode() for x in options])
        )
        report = taken("ProgramLog").rstrip(b"\0").decode(errors="replace")
        if code:
            wrong = next((x for x in report.splitlines() if "error" in x), "no message")
            raise NvrtcError(f"NVRTC failed with {code} for {arch}: {wrong.strip()}")
        symbols, symbol = {}, ctypes.c_char_p()
        for name in names(width):
            nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(symbol))
            symbols[name] = symbol.value.decode()
        return taken("CUBIN"), symbols, report
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def compiled(sources: Path, arch: str, width: int, cache: Path) -> tuple[bytes, dict[str, str]]:
    """`compile_width`, kept in a folder under a hash of the sources."""
    digest = hashlib.sha256(f"{arch} {width}".encode())
    for name in (*HEADERS, "wkv7.cu"):
        digest.update((sources / name).read_bytes())
    path = cache / f"wkv7-{digest.hexdigest()[:16]}.cubin"
    if not path.is_file():
        code, symbols, _ = compile_width(sources, arch, width)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:
            file.write(json.dumps(symbols).encode() + b"\n" + code)
        os.replace(file.name, path)
    line, code = path.read_bytes().split(b"\n", 1)
    return code, json.loads(line)


class Library:
    """The functions that cuda.py calls, of kernels that NVRTC compiles.

    Args:
        driver: libcuda; kernels are launched in its current context.
        arch_and_device: gives the current device's target, such as "sm_90a", and its number.
    """

    def __init__(self, sources: Path, cache: Path, driver, arch_and_device):
        self.sources, self.cache, self.driver = sources, cache, driver
        self.arch_and_device = arch_and_device
        self._loaded: dict[tuple, tuple] = {}
        # Functions and not methods: cuda.py declares their types, as of a C library.
        self.wkv7_launch = lambda *arguments: self._launch(*arguments)
        self.wkv7_blocks = lambda *arguments: self._blocks(*arguments)
        self.wkv7_error = lambda code: f"error {code} of the CUDA driver".encode()

    def _blocks(self, arguments, kernel: int, mode: int, width: int) -> int:
        """`wkv7_blocks` of csrc/launch.h."""
        args = arguments._obj
        columns = 64 if kernel == FORWARD and width == 64 else 32
        segments = args.segments if kernel < SCAN and mode != WHOLE else 1
        return segments * args.batch * args.heads * args.directions * (width // columns)

    def _launch(self, arguments, kernel: int, mode: int, bf16: int, width: int, stream: int) -> int:
        """`wkv7_launch` of csrc/wkv7.cu."""
        functions, sizes = self._module(width)
        blocks = self._blocks(arguments, kernel, mode, width)
        if not blocks:
            return 0
        if kernel >= SCAN:
            name, more = names(width)[-1], ctypes.c_bool(kernel == SCAN_BACK)
        else:
            name, more = names(width)[2 * kernel + bool(bf16)], ctypes.c_int(mode)
        given = (ctypes.c_void_p * 2)(ctypes.addressof(arguments._obj), ctypes.addressof(more))
        size, function = sizes[min(kernel, SCAN)], functions[name]
        call = self.driver
        return call.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_BYTES, size) or (
            call.cuLaunchKernel(
                function, blocks, 1, 1, THREADS, 1, 1, size, ctypes.c_void_p(stream), given, None
            )
        )

    def _module(self, width: int) -> tuple[dict, list[int]]:
        """{name: function} and bytes of shared memory by kernel, on the current device."""
        arch, device = self.arch_and_device()
        if (device, width) not in self._loaded:
            code, symbols = compiled(self.sources, arch, width, self.cache)
            module, at, size = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
            self._check(self.driver.cuModuleLoadData(ctypes.byref(module), code))
            functions = {name: ctypes.c_void_p() for name in symbols}
            for name, symbol in symbols.items():
                self._check(
                    self.driver.cuModuleGetFunction(
                        ctypes.byref(functions[name]), module, symbol.encode()
                    )
                )
            sizes = (ctypes.c_int * 3)()
            place = ctypes.byref(at), ctypes.byref(size)
            self._check(self.driver.cuModuleGetGlobal_v2(*place, module, b"wkv7_bytes"))
            self._check(self.driver.cuMemcpyDtoH_v2(sizes, at, ctypes.sizeof(sizes)))
            self._loaded[device, width] = functions, list(sizes)
        return self._loaded[device, width]

    def _check(self, code: int) -> None:
        if code:
            raise NvrtcError(f"the CUDA driver does not take the WKV7 kernels: error {code}")


def _strings(values: list[bytes]):
    return (ctypes.c_char_p * len(values))(*values)
