"""Every key of the recipe is read by what trains, not only by what checks and prints it."""

import dataclasses
import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from conftest import SAMPLES

from fastconformer import load_model
from training import distill, finetune
from training.recipe.data_sections import SourceRecipe
from training.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]


def schema(cls=Recipe, prefix=""):
    """{(section's class, key): dotted key}"""
    keys = {}
    for field in fields(cls):
        if dataclasses.is_dataclass(field.type):
            keys |= schema(field.type, f"{prefix}{field.name}.")
        else:
            keys[cls.__name__, field.name] = prefix + field.name
    return keys


@pytest.fixture
def reads(monkeypatch):
    """{(class, key): files that read it}, filled while the test runs."""
    found: dict[tuple[str, str], set[str]] = {}
    names = {f.name for c in sections() for f in fields(c)}

    def watch(self, name):
        if name in names:
            frame = sys._getframe(1)
            # asdict(section) reads its keys for whoever called it, asdict(recipe) for nobody: that
            # is how a recipe is written down and compared.
            whole = False
            while frame and Path(frame.f_code.co_filename).name == "dataclasses.py":
                whole = whole or isinstance(frame.f_locals.get("obj"), Recipe)
                frame = frame.f_back
            file = Path(frame.f_code.co_filename) if frame else Path()
            rooms = (ROOT / "training", ROOT / "fastconformer" / "config")  # `with_loss_options`
            reads_it = any(map(file.is_relative_to, rooms)) and file.parent.name != "recipe"
            if reads_it and not whole:
                found.setdefault((type(self).__name__, name), set()).add(file.name)
        return object.__getattribute__(self, name)

    for cls in sections():
        monkeypatch.setattr(cls, "__getattribute__", watch, raising=False)
    return found


def sections(cls=Recipe):
    inner = [field.type for field in fields(cls) if dataclasses.is_dataclass(field.type)]
    more = [SourceRecipe] if cls is Recipe else []
    return [cls, *more, *(section for kind in inner for section in sections(kind))]


def test_every_key_is_read_where_it_matters(reads, corpus, tmp_path):
    """In small runs that switch everything on. A key that a run checks and then forgets fails."""
    path, _ = corpus
    train = [{"manifest": str(tmp_path / "train.jsonl"), "weight": 1, "max_hours": 9}]
    everything = {
        "data": {"train": train, "test": {"dev": str(tmp_path / "dev.jsonl")}},
        "augment": {
            "speeds": [0.9, 1.0],
            "gain_db": [-3, 3],
            "shift_s": 0.05,
            "white_noise": {"probability": 1.0},
            "noise": {"manifests": [str(SAMPLES / "noise.jsonl")], "probability": 1.0},
            "rir": {"manifests": [str(SAMPLES / "rir.jsonl")], "probability": 1.0},
            "babble": {"probability": 1.0},
            "hum": {"probability": 1.0},
            "telephone": {"probability": 1.0, "packet_loss": 0.1},
        },
        "loss": {"interctc_layers": [0], "interctc_weights": [0.3], "use_cr_ctc": True},
        "freeze": {"encoder_layers": 1, "until": {"joint": 1}},
        "schedule": {"name": "wsd", "hold_ratio": 0.2, "warmup_ratio": 0.25},
        "retain": {"lang": "en", "distill_ctc": 0.1, "l2_to_start": 0.01},
        "keep": {"metric": "train_loss", "top_k": 2, "average": True, "patience": 5},
        "guard": {"set": "dev", "limit": 9.0},
        "trainer": {"ema_decay": 0.9, "val_every_steps": 1, "max_steps": 2},
        "spec_augment": {"time_masks": 2, "time_width": 0.1},
    }
    tree = yaml.safe_load(path.read_text())
    plain = json.dumps(tree)
    for section, keys in everything.items():
        tree[section] = tree.get(section, {}) | keys
    full = tmp_path / "full.yaml"
    full.write_text(json.dumps(tree))
    assert finetune.main([str(full)]) == 0

    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name, content in load_model(tree["model"]["init_from"]).tokenizer_files.items():
        (tokenizer / name).write_bytes(content)
    birwkv7 = ["encoder.attention=birwkv7", "trainer.max_steps=1"]
    runs = {
        "characters": ["model.labels=[g,o,d,a,y,' ',e,s,v,n]", "trainer.max_steps=1"],
        "adapters": ["lora.rank=2", "data.batch_duration_s=auto", "schedule.name=noam"],
        "vocabulary": [
            f"model.tokenizer={tokenizer}",
            "trainer.max_steps=null",
            "trainer.epochs=1",
        ],
        "birwkv7": birwkv7,
    }
    for name, options in runs.items():
        assert finetune.main([str(path), f"output={tmp_path / name}", *options]) == 0, name
    diverging = ["optim.lr=1e30", "trainer.max_nonfinite_steps=1"]
    assert finetune.main([str(path), f"output={tmp_path / 'diverging'}", *diverging]) == 1
    steps = ["distill.block_steps=1", "distill.model_steps=1"]
    assert distill.main([str(path), f"output={tmp_path / 'teacher'}", *steps]) == 0
    assert path.read_text() == plain
    known = schema()
    known |= {("SourceRecipe", f.name): f"data.train: {f.name}" for f in fields(SourceRecipe)}
    unread = [dotted for key, dotted in known.items() if key not in reads]
    assert not unread, f"nothing reads {', '.join(unread)}"
