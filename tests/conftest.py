"""Where the reference data lies; the golden cases' reader."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from fastconformer import load_model

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on the CPU

TESTS = Path(__file__).parent
SHARED = TESTS.parent.parent / "shared"


def golden(case: str) -> Path:
    """Folder of a golden case: in tests/golden, else in ../shared/golden; skips without it."""
    for folder in (TESTS / "golden" / case, SHARED / "golden" / case):
        if folder.is_dir():
            return folder
    pytest.skip(f"golden case {case} is not here (neither in tests/golden nor in ../shared/golden)")


def speech(name: str) -> Path:
    """Folder of a set of human speech in ../shared/data; skips without it."""
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"human speech {name} is not here (../shared/data)")
    return folder


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
