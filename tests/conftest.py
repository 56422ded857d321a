"""Where the reference data lies; the golden cases' reader."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
