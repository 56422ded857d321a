"""Where the reference data lies; the golden cases' reader.

What the suite needs lies in tests/golden and samples/. FASTCONFORMER_TEST_DATA names a folder with
more: golden/ (further cases), data/ (sets of human speech with manifests) and cases/ (what users
reported). Tests that need it skip with a word where it is not; `pytest --needing-data` runs those
alone that the last run skipped for it.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hosts import two_hosts
from safetensors.torch import load_file

from fastconformer import load_model

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on the CPU

TESTS = Path(__file__).parent
SAMPLES = TESTS.parent / "samples"
VARIABLE = "FASTCONFORMER_TEST_DATA"
NEEDING_DATA = "fastconformer/needing_data"  # in pytest's cache: the tests that skipped for it


def pytest_addoption(parser):
    text = f"only the tests that the last run skipped for want of {VARIABLE}"
    parser.addoption("--needing-data", action="store_true", help=text)


def pytest_configure(config):
    config.pluginmanager.register(SkippedForData(config))


class SkippedForData:
    """Notes in pytest's cache which tests skipped; of several processes the first does."""

    def __init__(self, config):
        self.config, self.found = config, []

    def pytest_runtest_logreport(self, report):
        if report.skipped and VARIABLE in str(report.longrepr):
            self.found.append(report.nodeid)

    def pytest_sessionfinish(self):
        works_for_another = hasattr(self.config, "workerinput")
        if self.found and not works_for_another and not self.config.getoption("needing_data"):
            self.config.cache.set(NEEDING_DATA, self.found)


def pytest_collection_modifyitems(config, items):
    if config.getoption("needing_data"):
        wanted = set(config.cache.get(NEEDING_DATA, []))
        config.hook.pytest_deselected(items=[i for i in items if i.nodeid not in wanted])
        items[:] = [i for i in items if i.nodeid in wanted]


def extra(*parts: str) -> Path:
    """A folder of the extra data, such as extra("data", "fsdd"); skips without it."""
    root = os.environ.get(VARIABLE)
    if not root:
        pytest.skip(f"{'/'.join(parts)} is not here: {VARIABLE} is not set")
    folder = Path(root).resolve().joinpath(*parts)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: {VARIABLE} is {root}")
    return folder


def golden(case: str) -> Path:
    """Folder of a golden case: in tests/golden, else of the extra data; skips without it."""
    folder = TESTS / "golden" / case
    return folder if folder.is_dir() else extra("golden", case)


def speech(name: str) -> Path:
    """Folder of a set of human speech of the extra data; skips without it."""
    return extra("data", name)


@dataclass
class Case:
    folder: Path
    tensors: dict[str, torch.Tensor]
    expected: dict


def load_case(case: str | Path) -> Case:
    """A case by name or folder: its tensors and its expected.json."""
    folder = case if isinstance(case, Path) else golden(case)
    expected = json.loads((folder / "expected.json").read_text())
    return Case(folder, load_file(folder / "golden.safetensors"), expected)


def make_corpus(tmp_path: Path) -> tuple[Path, Path]:
    """A recipe file for eight clips of a golden case, in a folder: (recipe path, run folder)."""
    folder = golden("train_parity")
    tensors = load_file(folder / "golden.safetensors")
    tokenizer = load_model(folder / "model.nemo").tokenizer
    lines = []
    for batch in range(3):
        names = ("audio", "audio_len", "targets", "targets_len")
        columns = (tensors[f"batch{batch}/{name}"] for name in names)
        for audio, length, targets, n_targets in zip(*columns, strict=True):
            path = tmp_path / f"clip{len(lines)}.wav"
            samples = (audio[:length].numpy() * 32768).astype(np.int16)
            soundfile.write(path, samples, 16000)
            text = tokenizer.decode(targets[:n_targets].tolist()).split()[0]  # CTC: few frames
            entry = {"audio_filepath": path.name, "duration": len(samples) / 16000, "text": text}
            lines.append(json.dumps(entry) + "\n")
    (tmp_path / "train.jsonl").write_text("".join(lines))
    (tmp_path / "dev.jsonl").write_text("".join(lines[:2]))
    recipe = {
        "output": str(tmp_path / "run"),
        "model": {"init_from": str(folder / "model.nemo")},
        "data": {
            "train": [str(tmp_path / "train.jsonl")],
            "validation": {"dev": str(tmp_path / "dev.jsonl")},
            "batch_size": 2,
            "num_workers": 1,
        },
        "optim": {"lr": 1e-3},
        "trainer": {"max_steps": 4, "threads": 1, "val_every_steps": 100, "device": "cpu"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path, tmp_path / "run"


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path)


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def ledger(run: Path) -> list[dict]:
    """Evaluations, without the time they took."""
    lines = (run / "ledger.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "minutes"} for line in lines]


@pytest.fixture
def hosts():
    with two_hosts() as both:
        yield both
