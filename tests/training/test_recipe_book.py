"""Every recipe of the book, run to its end on tiny data."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import golden

from fastconformer import load_model
from training.finetune import main as finetune
from training.recipe.recipe import idle_keys, load_recipe, stage_recipes
from training.setup.prepare import prepare_run

ROOT = Path(__file__).resolve().parents[2]
BOOK = ["finetune", "freeze_ctc", "less_frozen", "full_hybrid", "one_corpus", "second_corpus"]
BOOK += ["strong_augment", "telephone", "birwkv7"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng, lines = np.random.default_rng(0), []
    for i, text in enumerate(["one two", "three", "nine", "seven six"]):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(16000), 16000)
        line = {"audio_filepath": str(folder / f"{i}.wav"), "duration": 1.0, "text": text}
        lines.append(json.dumps(line) + "\n")
    for place in (".", "calls", "general", "mine"):
        (folder / place).mkdir(exist_ok=True)
        for name in ("train.jsonl", "dev.jsonl"):
            (folder / place / name).write_text("".join(lines))
    os.symlink(golden("train_parity") / "model.nemo", folder / "parakeet.nemo")
    return folder


@pytest.mark.parametrize("name", BOOK)
def test_recipe_runs_to_its_end(name, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(data)  # the recipe's own paths lie here
    heads = load_model("parakeet.nemo").heads
    overrides = [f"output={tmp_path / 'run'}", "trainer.threads=1", "trainer.accumulate=1"]
    overrides += ["trainer.device=cpu", "data.batch_size=2", "trainer.epochs=1"]
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    if "encoder_layers" in text and not text.count("# freeze") and "half" not in text:
        overrides.append("freeze.encoder_layers=1")  # the model here has few layers
    if "warmup_steps" in text:
        overrides.append("schedule.warmup_steps=1")
    if "wer/calls/tdt" in text or "wer/mine/tdt" in text:
        set_name = "calls" if "wer/calls/tdt" in text else "mine"
        overrides.append(f"keep.metric=wer/{set_name}/{heads[0]}")
    assert finetune([str(ROOT / "recipes" / f"{name}.yaml"), *overrides]) == 0, capsys.readouterr()
    run = tmp_path / "run"
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert ledger[0]["step"] == 0 and ledger[-1]["step"] > 0
    logs = list(run.glob("**/log.jsonl"))
    losses = [json.loads(line)["loss"] for log in logs for line in log.read_text().splitlines()]
    assert losses and all(math.isfinite(loss) for loss in losses)
    model = load_model(run / "model.nemo")
    assert model.sample_rate == (8000 if name == "telephone" else 16000)
    attention = model.config.encoder.self_attention_model
    assert (attention == "rwkv7_attn") == (name == "birwkv7")


def test_the_page_names_every_recipe():
    page = (ROOT / "docs" / "recipes.md").read_text()
    recipes = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    recipes -= {path for path in recipes if path.startswith("base_tiny")} | {"finetune.yaml"}
    assert not [name for name in recipes if f"recipes/{name}" not in page]


def test_the_six_trials_run_as_the_page_has_them(corpus, monkeypatch):
    """Its commands, on a small corpus: each trial starts, learns and keeps a model."""
    recipe, _ = corpus
    folder = recipe.parent
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    commands = re.findall(
        r"^    python -m training\.finetune recipes/trials\.yaml(.*)$", page, re.M
    )
    assert len(commands) == 6
    for name in ("own", "general"):
        (folder / name).mkdir()
        for part in ("train", "dev"):
            lines = [json.loads(line) for line in (folder / f"{part}.jsonl").open()]
            for line in lines:
                line["audio_filepath"] = f"../{line['audio_filepath']}"
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / name / f"{part}.jsonl").write_text(text)
    monkeypatch.chdir(folder)
    small = [f"model.init_from={golden('train_parity') / 'model.nemo'}", "trainer.precision=fp32"]
    small += ["trainer.epochs=null", "trainer.max_steps=1", "trainer.threads=1"]
    small += ["trainer.val_every_steps=1", "data.num_workers=0"]
    for number, command in enumerate(commands, start=1):
        options = [o for o in command.split() if not o.startswith("trainer.epochs=")]
        options = [o.replace("freeze.encoder_layers=4", "freeze.encoder_layers=1") for o in options]
        options = [o.replace("freq_width=34", "freq_width=30") for o in options]
        assert finetune([str(ROOT / "recipes" / "trials.yaml"), *options, *small]) == 0, command
        assert (folder / "runs" / "trials" / f"V{number}" / "model.nemo").is_file()
    assert len((folder / "runs" / "trials" / "runs.jsonl").read_text().splitlines()) == 6


def test_no_key_of_the_book_is_idle():
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        if path.name != "base_tiny_model.yaml":  # a model's config
            recipe = load_recipe(path)
            for stage in stage_recipes(recipe) or [recipe]:
                assert idle_keys(stage) == {}, path


def test_keys_that_do_nothing_without_another_are_told(corpus, caplog):
    idle = {
        "schedule.power": "2",
        "lora.alpha": "8",
        "augment.hum.mains_hz": "[60]",
        "guard.limit": "0.5",
        "loss.cr_ctc_weight": "0.3",
        "model.new_rows": "zeros",
    }
    recipe = load_recipe(corpus[0], [f"{key}={value}" for key, value in idle.items()])
    assert idle_keys(recipe).keys() == idle.keys()
    prepare_run(recipe)
    assert "lora.alpha (it needs lora.rank)" in caplog.text
    more = ["schedule.name=linear", "lora.rank=2", "augment.hum.probability=1"]
    more += ["guard.set=dev", "loss.use_cr_ctc=true"]
    more = load_recipe(corpus[0], [*(f"{key}={value}" for key, value in idle.items()), *more])
    assert [*idle_keys(more)] == ["model.new_rows"]
