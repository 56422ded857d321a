"""Every benchmark in small: it writes where nothing is published, and ends in one clear line."""

import importlib
import json
import sys

import numpy
import pytest
import torch
from conftest import SAMPLES, golden

from benchmarks import REPOSITORY, SPEECH, peer_versions

NAMES = (
    *("birwkv7", "cpu_share", "cpu_vs_nemo", "exports", "long_windows", "longform", "losses"),
    *("rtfx", "wkv7"),
)
MODEL = str(golden("hybrid_tdt_ctc_bpe") / "model.nemo")


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """The commands set their number; the tests that follow keep theirs."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


def main(name: str, *words: str) -> int:
    return importlib.import_module(f"benchmarks.{name}").main(list(words)) or 0


SMALL = {
    name: (*words.split(), *more)
    for name, words, *more in (
        ("longform", "--seconds 12 --window 5 --sweep 0.2 --model", MODEL),
        ("long_windows", "--minutes 0.1 0.1 0.2 --modes full 3 --near 1 --model", MODEL),
        (
            "losses",
            "--parts cpu --sides fused --repeats 1 --threads 1 --cpu-shape",
            "[1,9,3,20,[]]",
        ),
        ("wkv7", "--frames 40 --heads 1 --width 8 --repeats 1 --growth"),
        ("live", "--seconds 3 --streams 1 2 --clips 2 --threads 1 --shape 1 64 80 1"),
        ("birwkv7", "--frames 40 --d-model 64 --layers 1 --attention rel_pos"),
    )
}
FILES = {"wkv7": "wkv7_cpu.json"}


@pytest.mark.parametrize("name", SMALL)
def test_in_small(name, tmp_path, monkeypatch):
    if name == "long_windows":
        pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    published = {p: p.read_bytes() for p in (REPOSITORY / "benchmarks" / "results").iterdir()}
    monkeypatch.chdir(tmp_path)
    assert main(name, *SMALL[name]) == 0
    (written,) = (tmp_path / "runs" / "benchmarks").iterdir()
    assert written.name == FILES.get(name, f"{name}.json")
    result = json.loads(written.read_text())
    assert result["machine"]["cores"] and ("commit" in result or "commit" in result["versions"])
    assert published == {p: p.read_bytes() for p in published}


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("longform", ("--model", "no-such.nemo"), "no-such.nemo"),
        ("longform", ("--model", MODEL, "--audio", "no-such.ogg"), "no-such.ogg"),
        ("losses", ("--nemo-python", "no-such-python"), "no-such-python cannot be run"),
        ("losses", ("--nemo-python", "true"), "true cannot import nemo"),
        ("cpu_share", ("--nemo-python", "no-such-python"), "no-such-python cannot be run"),
        ("cpu_vs_nemo", ("--nemo-python", "no-such-python"), "no-such-python cannot be run"),
        ("rtfx", ("--model", "no-such.nemo"), "no-such.nemo"),
        ("rtfx", ("--model", MODEL, "--manifest", "no-such.jsonl"), "no-such.jsonl"),
        ("rtfx", ("--model", MODEL, "--peer", "nemo=no-such-python"), "no-such-python"),
        ("birwkv7", ("--audio", str(SPEECH), "--model", "no-such.nemo"), "no-such.nemo"),
        ("birwkv7", ("--curves", "set/name=no-such-run"), "no-such-run"),
    ],
)
def test_what_is_missing_is_told_in_one_line(name, words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(name, *words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: ") and said in line
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main(name, "--help")
    assert stop.value.code == 0
    assert f"example: python -m benchmarks.{name} --" in capsys.readouterr().out


def test_the_sample_recording_is_there():
    assert SPEECH == SAMPLES / "talk.ogg" and SPEECH.is_file()


def test_versions_of_this_environment():
    assert peer_versions(sys.executable, "numpy") == {"numpy": numpy.__version__}
    with pytest.raises(ValueError, match="cannot import numpy and no_such_package: .*No module"):
        peer_versions(sys.executable, "numpy", "no_such_package")
