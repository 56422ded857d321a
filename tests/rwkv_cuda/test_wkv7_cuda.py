"""The CUDA kernels: computed on a CPU (see csrc/tile.h), compiled for three GPUs, built once."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv_cuda import build, chunked, cuda, wkv7
from tests.rwkv_cuda.test_wkv7 import NAMES, error, inputs

FEW, MANY = 0, 1000  # multiprocessors that a device has: one pass, or time cut into segments


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to compute the kernels on a CPU with")
    path = tmp_path_factory.mktemp("emulation") / "emulate.so"
    source = str(build.SOURCES / "emulate.cpp")
    options = ["-O2", "-std=c++17", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, "-o", str(path), source], check=True)
    return ctypes.CDLL(str(path))


CASES = [
    # batch, frames, heads, width, w mean, w scale, lengths, multiprocessors
    (1, 1, 1, 32, 0.0, 1.0, None, FEW),
    (2, 40, 2, 64, -1.0, 1.0, [40, 7], FEW),
    (3, 33, 1, 48, 0.0, 5.0, [0, 33, 16], FEW),
    (1, 30, 1, 128, 0.0, 20.0, None, FEW),
    (1, 530, 1, 32, -6.0, 1.0, None, FEW),
    (2, 1700, 1, 32, -3.0, 2.0, [1700, 900], MANY),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "frames", "heads", "width", "mean", "scale", "lengths", "processors"), CASES
)
def test_kernels_compute_the_recurrence(
    library, batch, frames, heads, width, mean, scale, lengths, processors, dtype
):
    """Both directions at once: y, last and saved states, and every gradient, against float64."""
    if frames > 1000 and dtype == torch.bfloat16:
        pytest.skip("as long a case in one dtype is enough")
    args = inputs(batch, frames, heads, width, dtype, mean, scale)
    lengths = None if lengths is None else torch.tensor(lengths)
    for x in args if lengths is not None else ():
        for row, length in zip(x, lengths):
            row[length:] = float("nan")
    kernels = cuda.Kernels(library, lambda _: processors)
    directions = [False, True]
    entry = torch.randn(2, batch, heads, width, width)
    y, last, saved = kernels.forward(args, lengths, entry, directions, True)
    grad_y = torch.randn(y.shape).to(dtype)
    grad_last = torch.randn_like(last)
    grads = kernels.backward(grad_y, grad_last, args, saved, lengths, directions)
    exact = [x.double() for x in args]
    expected = [0.0] * 6
    # float32 splits each factor for tensor cores; bfloat16's are rounded to tf32, inside 2**-10.
    tolerance = 3e-6 if dtype == torch.float32 else 1e-2
    for i, reverse in enumerate(directions):
        rest = (reverse, lengths)
        exact_y, exact_last, exact_saved = chunked.forward(*exact, *rest, entry[i].double(), True)
        assert error(y[i], exact_y) < tolerance
        assert error(last[i], exact_last) < tolerance
        assert error(saved[i], exact_saved) < tolerance
        *by_input, by_entry = chunked.backward(
            grad_y[i].double(), grad_last[i].double(), *exact, exact_saved, *rest
        )
        assert error(grads[6][i], by_entry) < tolerance
        expected = [x + z for x, z in zip(expected, by_input)]
    for name, x, z in zip(NAMES, grads, expected):
        assert x.dtype == dtype
        assert error(x, z) < tolerance, name
    inference, _, none = kernels.forward(args, lengths, entry, directions, False)
    assert torch.equal(inference, y) and none.shape[1] == 0


def test_kernels_take_no_width_beyond_theirs(library):
    kernels = cuda.Kernels(library, lambda _: 1)
    with pytest.raises(ValueError, match="heads are 160 wide"):
        kernels.forward(inputs(1, 2, 1, 160), None, None, [False], False)
    with pytest.raises(ValueError, match=r"r is torch\.float64"):
        kernels.forward(inputs(1, 2, 1, 32, torch.float64), None, None, [False], False)


def test_heads_of_64_compile_for_all_targets(monkeypatch, tmp_path):
    """A third of `make kernels`, for every run of the suite: both dtypes, all kernels."""
    if build.find_nvcc() is None:
        pytest.skip("nvcc is not found: the CUDA kernels were not compiled")
    monkeypatch.setattr(build, "library_path", lambda _: tmp_path / "wkv7.so")
    path, report = build.compile_library(build.TARGETS, ("-DWKV7_WIDTH=64", "--threads=2"))
    assert ctypes.CDLL(str(path)).wkv7_shared_bytes(0, 64) > 0
    rows = build.summarize(report)
    assert len(rows) == 5 * len(build.TARGETS) and {row["arch"] for row in rows} == {*build.TARGETS}
    for row in rows:
        assert row["spilled_bytes"] <= (256 if row["kernel"].startswith("backward") else 0), row


@pytest.mark.slow
@pytest.mark.parametrize("arch", build.TARGETS)
def test_compiles_without_harmful_spills(arch, monkeypatch, tmp_path):
    if build.find_nvcc() is None:
        pytest.skip("no nvcc")
    monkeypatch.setattr(build, "library_path", lambda _: tmp_path / "wkv7.so")
    path, report = build.compile_library((arch,))
    assert ctypes.CDLL(str(path)).wkv7_shared_bytes(0, 64) > 0
    rows = build.summarize(report)
    assert len(rows) == 15 and {row["arch"] for row in rows} == {arch}
    for row in rows:
        # Gradients save some registers around the call of their last step, once a chunk.
        limit = 256 if row["kernel"].startswith("backward") else 0
        if row["kernel"].startswith("backward 128"):
            limit = 1280  # the widest: see rwkv_cuda/ptxas.txt
        assert row["spilled_bytes"] <= limit, row
    # What a block asks for is there: 163 KiB on sm_80, 227 on sm_90; 99 on sm_120, where gradients
    # of heads 128 wide run as plain PyTorch.
    room = {"sm_80": 163, "sm_90a": 227, "sm_120": 99}[arch] * 1024
    shared = ctypes.CDLL(str(path)).wkv7_shared_bytes
    for width in cuda.WIDTHS:
        for kernel in (cuda.FORWARD, cuda.BACKWARD, cuda.SCAN):
            if (arch, width, kernel) != ("sm_120", 128, cuda.BACKWARD):
                assert shared(kernel, width) <= room, (width, kernel)


def test_sources_include_no_torch_header():
    for source in build.SOURCES.iterdir():
        assert "torch/" not in source.read_text() and "ATen" not in source.read_text()


def test_library_is_named_after_its_sources(monkeypatch, tmp_path):
    before = build.library_path(("sm_80",))
    assert before != build.library_path(("sm_90a",))
    changed = shutil.copytree(build.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(build, "SOURCES", changed)
    assert build.library_path(("sm_80",)).name == before.name
    (changed / "wkv7.cu").write_text("// changed")
    assert build.library_path(("sm_80",)).name != before.name


def test_build_without_a_compiler_fails_with_one_line(tmp_path):
    environment = dict(os.environ, PATH=str(tmp_path), CUDA_HOME="", CUDA_PATH="")
    code = (
        "import sys; from rwkv_cuda import build; build.find_nvcc = lambda: None;"
        "sys.exit(build.main(['--arch', 'sm_80']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "nvcc is not found" in done.stderr


def test_without_a_gpu_it_says_so_once(monkeypatch, caplog):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    build.load.cache_clear()
    build.usable.cache_clear()
    assert not build.usable() and not build.usable()
    assert len(caplog.records) == 1 and "plain PyTorch" in caplog.text


@pytest.mark.slow
def test_threads_of_a_block_do_not_race(tmp_path):
    """Each on a thread of the CPU, watched by ThreadSanitizer, which sees a race where a barrier is
    left out."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = shutil.copytree(build.SOURCES, tmp_path / "csrc")
    program, chunk = tmp_path / "threads", sources / "chunk.h"

    def races(*cases: int) -> int:
        options = ["-std=c++20", "-O1", "-fsanitize=thread", f"-I{sources}", "-o", str(program)]
        source = str(Path(__file__).with_name("threads.cpp"))
        made = subprocess.run([compiler, *options, source], capture_output=True, text=True)
        if made.returncode and "tsan" in made.stderr:
            pytest.skip("the compiler has no ThreadSanitizer")
        assert made.returncode == 0, made.stderr
        found = 0
        for case in cases:
            done = subprocess.run([str(program), str(case)], capture_output=True, text=True)
            if "unexpected memory mapping" in done.stderr:
                pytest.skip("ThreadSanitizer does not run on this kernel")
            assert done.stdout == "done\n", done.stderr
            found += done.stderr.count("data race")
        return found

    assert races(*range(5)) == 0
    text, last = chunk.read_text(), "advance(s, writes_y ? VB / 32 : 0);\n            barrier();"
    assert text.count(last) == 1
    chunk.write_text(text.replace(last, last.partition("\n")[0]))
    assert races(0) > 0


def test_kernels_that_a_driver_refuses_are_left_with_a_line(library, monkeypatch, caplog):
    """As those of an nvcc that is newer than the driver: they compile, and do not start."""
    refusing = SimpleNamespace(
        wkv7_launch=lambda *_: 35,
        wkv7_blocks=lambda *_: 1,
        wkv7_error=lambda code: b"CUDA driver version is insufficient",
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for given, works in ((library, True), (refusing, False)):
        kernels = cuda.Kernels(given, lambda _: FEW)
        monkeypatch.setattr(cuda, "_kernels", lambda kernels=kernels: kernels)
        cuda.works.cache_clear()
        assert cuda.works(torch.device("cpu")) is works
    cuda.works.cache_clear()
    assert len(caplog.records) == 1 and "driver version is insufficient" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
def test_on_a_gpu(dtype, reverse):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for batch, frames, width in ((2, 1, 64), (3, 63, 32), (1, 5000, 64), (2, 1000, 128)):
        args = [x.cuda().requires_grad_() for x in inputs(batch, frames, 2, width, dtype)]
        exact = [x.detach().double().requires_grad_() for x in args]
        lengths = torch.randint(0, frames + 1, (batch,), device="cuda")
        y = wkv7(*args, reverse, lengths, "cuda")
        expected = wkv7(*exact, reverse, lengths, "chunked")
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert error(y, expected) < tolerance
        grad = torch.randn_like(y)
        for x, z in zip(
            torch.autograd.grad(y, args, grad), torch.autograd.grad(expected, exact, grad.double())
        ):
            assert error(x, z) < tolerance
