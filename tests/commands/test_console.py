"""The console command, what all commands share, and that every one of them uses it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastconformer import cli
from fastconformer.__main__ import COMMANDS, listed, main

ROOT = Path(__file__).parents[2]
MODULES = [module for group in COMMANDS.values() for module, _ in group.values()]


def test_every_command_is_listed():
    found = set()
    for folder in ("fastconformer", "training", "converters"):
        for path in (ROOT / folder).glob("*.py"):
            if path.stem != "__main__" and re.search(r"^def main\(", path.read_text(), re.M):
                found.add(f"{folder}.{path.stem}")
    assert found == set(MODULES)
    assert all(importlib.util.find_spec(module) for module in MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_every_command_shares_the_skeleton(module):
    text = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    assert "cli.run(" in text, f"{module} has exit statuses of its own"


def test_help_lists_all_without_torch():
    code = "import sys; from fastconformer.__main__ import main; s = main(['--help']); "
    code += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; sys.exit(s)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == listed() + "\n", done.stderr
    for group in COMMANDS.values():
        for name in group:
            assert re.search(rf"^  {name} ", done.stdout, re.M)


def test_the_console_leads_to_the_mains(capsys):
    assert main(["nonsense"]) == 2 and "no command 'nonsense'" in capsys.readouterr().err
    assert main([]) == 2
    with pytest.raises(SystemExit) as end:
        main(["nemo2st", "--help"])
    assert end.value.code == 0 and "converters.nemo2st" in capsys.readouterr().out
    assert main(["nemo2st", "gone.nemo", "-o", "x"]) == 1
    assert "gone.nemo" in capsys.readouterr().err


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (None, 0, ""),
        (ValueError("two\nlines"), 1, "job: two lines\n"),
        (FileNotFoundError("a\x1b[31m.wav"), 1, "job: a\\x1b[31m.wav\n"),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "job: a.txt: No such file\n"),
        (cli.UsageError("no"), 2, "job: no\n"),
        (
            ModuleNotFoundError("No module named 'rich'", name="rich"),
            1,
            "job: rich is missing: pip install 'fastconformer[train]'\n",
        ),
        (cli.Failed("stopped"), 1, "job: stopped\n"),
        (KeyboardInterrupt(), 130, "job: interrupted\n"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you"), 1, None),
    ],
)
def test_exit_status_and_line(error, status, line, capsys):
    assert cli.run("job", lambda: error and _raise(error)) == status
    err = capsys.readouterr().err
    assert err.count("\n") == (status != 0)
    assert line is None or err == line


def test_a_fault_of_ours_is_not_hidden():
    with pytest.raises(RuntimeError, match="a fault"):
        cli.run("job", lambda: _raise(RuntimeError("a fault")))
    with pytest.raises(ModuleNotFoundError):
        cli.run("job", lambda: _raise(ModuleNotFoundError(name="training.gone")))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastconformer", "--help"],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("name", ["xpu", "mps", "gpu", "cuda"])
def test_a_device_that_is_not_there(name):
    import torch

    if torch.accelerator.is_available():
        pytest.skip("this machine has a GPU")
    # from torch 2.14 on "gpu" is cuda's other name
    with pytest.raises(
        ValueError, match=f"--device is ({name}|cuda), but this torch sees only cpu"
    ):
        cli.choose_device(name)


def test_a_device_that_does_not_exist():
    for name in ("abacus", "meta", "cpu:x"):
        with pytest.raises(cli.UsageError, match="expected one of cpu, cuda"):
            cli.choose_device(name)
    assert cli.choose_device("cpu").type == "cpu"


def test_more_processes_than_gpus(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(cli.choose_device("cuda")) == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ValueError, match="--device is cuda:2, but this torch .* cpu, cuda:0, cuda:1$"
    ):
        cli.choose_device("cuda")
    with pytest.raises(
        ValueError, match="--device is cuda:3, but this torch sees only cpu, cuda:0"
    ):
        cli.choose_device("cuda:3")


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
    ],
)
def test_memory_that_is_over_is_one_line_whoever_says_it(words, capsys):
    def job():
        raise RuntimeError(words)

    assert cli.run("transcribe", job) == 1
    told = capsys.readouterr().err
    assert told.startswith("transcribe: out of memory: ") and told.count("\n") == 1
