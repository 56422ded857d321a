"""The commands of docs/deploy.md, in their order, on a model that was fine-tuned here."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import SAMPLES

import training.finetune
from fastconformer import load_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with samples, models, recipes, and the quickstart's recipe run for two steps."""
    for name in ("samples", "models", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    lines = []
    for line in (SAMPLES / "english.jsonl").read_text().splitlines()[2:10]:
        entry = json.loads(line)
        lines.append(json.dumps(entry | {"audio_filepath": str(SAMPLES / entry["audio_filepath"])}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    words = [
        "data.train=[train.jsonl]",
        "trainer.max_steps=2",
        "trainer.threads=1",
        "data.batch_size=4",
    ]
    words += ["optim.lr=1e-5", "schedule.warmup_steps=1"]
    assert training.finetune.main(["recipes/quickstart.yaml", *words]) == 0
    (tmp_path / "model.nemo").symlink_to("runs/quickstart/model/model.nemo")
    return tmp_path


def test_every_command(clone, capsys):
    pytest.importorskip("onnx_asr")
    pytest.importorskip("sherpa_onnx")
    pytest.importorskip("transformers")
    page = (ROOT / "docs" / "deploy.md").read_text()
    found = []
    for module, rest in re.findall(r"^    python -m (\S+) (.*)$", page, re.M):
        capsys.readouterr()
        assert importlib.import_module(module).main(shlex.split(rest)) == 0, f"{module} {rest}"
        if module.endswith("check_export"):
            found.append(capsys.readouterr().out.splitlines()[-1])
    assert [line.split(",")[0] for line in found] == [
        "onnx-asr",
        "onnx-asr",
        "sherpa-onnx",
        "transformers",
    ]
    counts = [re.search(r": (\d+) of (\d+) texts are ours", line).groups() for line in found]
    assert counts[0][0] == counts[0][1] and counts[3][0] == counts[3][1]
    assert load_model("deploy/back.nemo").heads == ("tdt",)
    card = (clone / "deploy" / "hf" / "README.md").read_text()
    assert "max_steps: 2" in card and "license: apache-2.0" in card
