"""The kernels without nvcc: what NVRTC makes of the sources, and what the driver is asked for."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from rwkv_cuda import build, cuda, nvrtc
from tests.rwkv_cuda.test_wkv7 import inputs


@pytest.fixture
def compiler():
    try:
        return nvrtc.find()
    except nvrtc.NvrtcError as error:
        pytest.skip(f"{error}: CUDA wheels of torch bring it, as nvidia-cuda-nvrtc does")


@pytest.mark.parametrize("arch", build.TARGETS)
def test_heads_of_64_compile_for_all_targets(compiler, arch):
    code, symbols, report = nvrtc.compile_width(build.SOURCES, arch, 64)
    assert code[:4] == b"\x7fELF" and len(symbols) == 5
    assert all(symbol.encode() in code for symbol in (*symbols.values(), "wkv7_bytes"))
    rows = build.summarize(report)
    assert len(rows) == 5 and {row["arch"] for row in rows} == {arch}
    for row in rows:
        assert row["spilled_bytes"] <= (256 if row["kernel"].startswith("backward") else 0), row


def test_a_mistake_is_told_in_a_line(compiler, tmp_path):
    for source in build.SOURCES.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / "wkv7.cu").write_text("int x = ;")
    with pytest.raises(nvrtc.NvrtcError, match="^NVRTC failed with 6 for sm_80: .*error"):
        nvrtc.compile_width(tmp_path, "sm_80", 64)


def noting_driver(launched: list, loaded: list):
    """A driver that notes what it is asked to load and to launch."""
    symbols = {}

    def load(module, code):
        loaded.append(code)
        return 0

    def function_of(function, module, symbol):
        function._obj.value = 1 + len(symbols)
        symbols[function._obj.value] = symbol.decode()
        return 0

    def read(sizes, at, size):
        sizes[:] = [1000, 2000, 3000]
        return 0

    def launch(function, blocks, y, z, threads, u, v, shared, stream, given, extra):
        arguments = ctypes.cast(given[0], ctypes.POINTER(cuda._Arguments)).contents
        more = ctypes.cast(given[1], ctypes.POINTER(ctypes.c_int8)).contents.value
        assert (y, z, threads, u, v, arguments.heads) == (1, 1, 128, 1, 1, 2)
        launched.append((symbols[function.value], blocks, shared, more))
        return 0

    return SimpleNamespace(
        cuModuleLoadData=load,
        cuModuleGetFunction=function_of,
        cuModuleGetGlobal_v2=lambda at, size, module, name: 0 if name == b"wkv7_bytes" else 500,
        cuMemcpyDtoH_v2=read,
        cuFuncSetAttribute=lambda function, attribute, value: 0 if attribute == 8 else 1,
        cuLaunchKernel=launch,
    )


@pytest.mark.parametrize("processors", [0, 1000])
def test_launches_are_those_of_the_library(processors, monkeypatch, tmp_path):
    """Each kernel in its place, with its grid and its memory; machine code comes from the disk."""
    calls = []

    def compile_width(sources, arch, width):
        calls.append((arch, width))
        return b"machine code", {name: f"symbol of {name}" for name in nvrtc.names(width)}, ""

    monkeypatch.setattr(nvrtc, "compile_width", compile_width)
    launched, loaded = [], []
    driver = noting_driver(launched, loaded)
    for _ in range(2):  # two processes
        library = nvrtc.Library(build.SOURCES, tmp_path, driver, lambda: ("sm_90a", 0))
        kernels = cuda.Kernels(library, lambda device: processors)
        given = inputs(1, 1700, 2, 48, torch.bfloat16)  # padded to heads of 64
        _, _, saved = kernels.forward(given, None, None, [False, True], True)
        kernels.backward(torch.zeros(2, *given[0].shape), None, given, saved, None, [False, True])
    assert calls == [("sm_90a", 64)] and loaded == 2 * [b"machine code"]
    found = launched[: len(launched) // 2]
    segments = saved.shape[1]
    forward, backward = (f"symbol of {k}_kernel<wkv7::bf16, 64>" for k in ("forward", "backward"))
    scan, n = "symbol of scan_kernel<64>", 2 * 2  # heads, directions
    if not processors:
        assert found == [(forward, n, 1000, cuda.WHOLE), (backward, 2 * n, 2000, cuda.WHOLE)]
        return
    assert [row[0] for row in found[:4]] == [forward, forward, scan, forward]
    assert [row[3] for row in found[:4]] == [cuda.CONTRIBUTION, cuda.TRANSITION, 0, cuda.REPLAY]
    assert found[0][1:3] == (n * segments, 1000) and found[2][1:3] == (2 * n, 3000)
    assert found[-1] == (backward, 2 * n * segments, 2000, cuda.REPLAY)
    assert found[-2] == (scan, 2 * n, 3000, 1)


def test_a_driver_that_refuses_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "compile_width", lambda *_: (b"", {}, ""))
    driver = SimpleNamespace(cuModuleLoadData=lambda *_: 209)
    library = nvrtc.Library(build.SOURCES, tmp_path, driver, lambda: ("sm_90a", 0))
    kernels = cuda.Kernels(library, lambda device: 0)
    with pytest.raises(nvrtc.NvrtcError, match="error 209"):
        kernels.forward(inputs(1, 2, 1, 64), None, None, [False], False)


def test_later_cards_of_a_family_take_its_first_ones_code():
    """An NVRTC older than the card knows that: B300 is 10.3, GB10 12.1."""
    wanted = {(8, 0): "80", (8, 9): "89", (9, 0): "90a", (10, 0): "100", (10, 3): "100"}
    wanted |= {(11, 0): "110", (12, 0): "120", (12, 1): "120"}
    assert {card: build._arch_of(card).removeprefix("sm_") for card in wanted} == wanted


def test_an_nvcc_that_fails_leaves_it_to_nvrtc(monkeypatch, tmp_path):
    """As that of a distribution, which does not know the card."""

    def fails(arches):
        raise build.BuildError("nvcc failed with 1: nvcc fatal: Unsupported gpu architecture")

    monkeypatch.setattr(build, "local_arches", lambda: ("sm_90a",))
    monkeypatch.setattr(build, "library_path", lambda arches: tmp_path / "none.so")
    monkeypatch.setattr(build, "find_nvcc", lambda: "/usr/bin/nvcc")
    monkeypatch.setattr(build, "compile_library", fails)
    monkeypatch.setattr(build, "through_nvrtc", lambda cache: ("through NVRTC", cache))
    assert build.load.__wrapped__() == ("through NVRTC", tmp_path)
