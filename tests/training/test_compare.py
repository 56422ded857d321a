"""What `training.compare` finds, on the golden training case's model and made-up data."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from conftest import golden

from training import compare, finetune
from training.pages.comparison import meaning, peak_lr
from training.pages.decision import compare_columns
from training.recipe.recipe import load_recipe


@pytest.fixture
def recipe(tmp_path):
    """A function (changes) -> path of a recipe over four clips of noise."""
    rng = np.random.default_rng(0)
    lines = []
    for i, text in enumerate(["one two", "three", "nine", "seven six"]):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * rng.standard_normal(12000 + 4000 * i), 8000)
        line = {"audio_filepath": f"{i}.wav", "duration": 1.5 + 0.5 * i, "text": text}
        lines.append(json.dumps(line))
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")

    def write(name="recipe.yaml", **changes):
        tree = {
            "output": str(tmp_path / "run"),
            "model": {"init_from": str(golden("train_parity") / "model.nemo")},
            "data": {"train": [str(tmp_path / "train.jsonl")], "batch_size": 2},
            "trainer": {"max_steps": 20, "accumulate": 2},
        }
        for key, value in changes.items():
            tree.setdefault(key, {}).update(value)
        path = tmp_path / name
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    return write


def test_facts_in_numbers(recipe, capsys):
    assert compare.main([recipe(optim={"lr": 1e-3})]) == 0
    told = capsys.readouterr().out
    assert re.search(r"audio in a step +9 s", told)  # two batches of two clips, 9 s in all
    assert re.search(r"epochs +20\.0", told)
    assert "lr" in told and "FAIL" not in told
    assert "8000 Hz; slower ones are resampled up" in told


def test_the_batch_that_the_device_takes_is_found(recipe, capsys):
    auto = {"batch_duration_s": "auto", "batch_memory_gb": 4.0}
    assert compare.main([recipe(data=auto)]) == 0
    assert re.search(r"audio in a step +9 s", capsys.readouterr().out)  # two clips a batch


def test_nothing_is_written(recipe, tmp_path):
    assert compare.main([recipe()]) == 0
    assert not (tmp_path / "run").exists()


def test_frozen_layers_and_rates_are_told_beside_another_recipe(recipe, capsys):
    first = recipe("first.yaml")
    second = recipe("second.yaml", freeze={"modules": ["encoder"]}, optim={"lr": 1e-5})
    assert compare.main([second, first]) == 0
    told = capsys.readouterr().out
    (moving,) = [line for line in told.splitlines() if line.startswith("parameters that move")]
    other, mine = (float(number) for number in re.findall(r"([\d.]+) M of", moving))
    assert 0 < mine < other
    assert "freeze.modules" in told and "frozen layers keep the old domain" in told
    assert "optim.lr" in told and "too high forgets the checkpoint" in told
    assert compare.main([first, first]) == 0
    assert "the recipes are the same" in capsys.readouterr().out


def test_rate_beside_the_checkpoints_own(recipe):
    optim = {"name": "adamw", "lr": 2.0, "sched": {"name": "NoamAnnealing", "warmup_steps": 100}}
    assert peak_lr(optim, 64) == pytest.approx(2.0 / 8 / 10)
    assert peak_lr({"lr": 0.01, "sched": {"name": "CosineAnnealing"}}, 64) == 0.01
    assert peak_lr({}, 64) is None


def test_every_recipe_key_has_a_meaning():
    import dataclasses

    from training.recipe.recipe import Recipe

    for section in dataclasses.fields(Recipe):
        if section.name != "distill":  # of another command
            assert meaning(section.name + ".x") or section.name in ("model", "data")


def test_text_that_the_tokenizer_cannot_write_fails(recipe, tmp_path, capsys):
    path = recipe()
    manifest = tmp_path / "train.jsonl"
    manifest.write_text(manifest.read_text().replace("nine", "neun 漢字漢字"))
    assert compare.main([path]) == 1
    told = capsys.readouterr()
    assert "FAIL  tokenizer" in told.out and "漢" in told.out


def test_a_missing_manifest_or_checkpoint_is_one_line(recipe, capsys):
    assert compare.main([recipe(data={"train": ["gone.jsonl"]})]) == 1
    error = capsys.readouterr().err
    assert error.startswith("preflight failed: ") and error.count("\n") == 1
    assert compare.main([recipe(model={"init_from": "gone.nemo"})]) == 1
    assert compare.main([recipe(optim={"lrr": 1})]) == 2


def test_unreadable_audio_fails(recipe, tmp_path, capsys):
    path = recipe()
    (tmp_path / "1.wav").write_bytes(b"no sound")
    assert compare.main([path]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_guard_without_its_set_fails(recipe, capsys):
    assert compare.main([recipe(guard={"set": "general"})]) == 2


def test_what_is_compared_is_what_runs(recipe):
    """The same parts of the loss, with distillation, and the same freezing as `finetune` has."""
    keep = {"distill_ctc": 1, "distill_encoder": 1}
    path = recipe(retain=keep, trainer={"max_steps": 1})
    planned = compare.prepared_stages(load_recipe(path), "this recipe")["this recipe"]
    assert planned.objective.parts == (
        *("tdt", "ctc", "distill_ctc", "distill_encoder", "active_share"),
    )
    assert finetune.main([path]) == 0
    (line,) = (Path(load_recipe(path).output) / "log.jsonl").read_text().splitlines()
    assert set(planned.objective.parts) <= json.loads(line).keys()


def test_statuses_and_the_checklist(recipe, tmp_path, capsys):
    """Three columns beside the recipe, and the same as a page."""
    calm = recipe("calm.yaml", optim={"lr": 1e-5})
    wild = recipe("wild.yaml", optim={"lr": 0.5, "weight_decay": 0.1}, trainer={"max_steps": 200})
    page = tmp_path / "page.html"
    assert compare.main([wild, calm, recipe("plain.yaml"), f"--html={page}"]) == 0
    told = capsys.readouterr().out
    rows = {line.split("  ")[0]: line for line in told.splitlines()}
    assert "dangerous" in rows["highest lr"] and "changed" in rows["weight decay"]
    assert "same" in rows["pieces"] and "frozen parts" in rows
    assert "look  highest rate 0.5" in told and "look  no SpecAugment" in told
    assert "optim.weight_decay" in told and "other: calm" in told
    text = page.read_text(encoding="utf-8")
    assert text.count("<th>") >= 6 and "dangerous" in text and "http" not in text
    # beside its pretrained model, whose config tells of its own training
    assert compare.main([calm]) == 0
    assert "pretrained" in capsys.readouterr().out


def test_what_the_pretrained_model_does_not_tell_is_new():
    columns = {"pretrained": {"optimizer": "adamw"}, "other: small.nemo": {"optimizer": "adamw"}}
    columns["stage 1"] = {"optimizer": "adamw", "betas": "0.9, 0.98", "steps": "10"}
    columns["stage 2"] = columns["stage 1"] | {"steps": "20"}
    rows = {row.what: row for row in compare_columns(columns, {})}
    assert [rows[what].status for what in ("optimizer", "betas", "steps")] == ["same", "new", "new"]
    assert not rows["betas"].note and "how long it learns" in rows["steps"].note


def test_skipped_cells_of_the_lattice_are_told(recipe, capsys):
    for loss, told in (({}, "below 1e-07"), ({"eps": 0.0}, "none")):
        assert compare.main([recipe(loss=loss)]) == 0
        assert re.search(rf"lattice cells left out +{told} ", capsys.readouterr().out)


def test_stages_are_prepared_one_by_one(recipe, capsys):
    stages = [
        {"freeze": {"modules": ["encoder"]}, "trainer": {"max_steps": 500}},
        {"trainer": {"max_steps": 1000}},
    ]
    path = recipe()
    tree = yaml.safe_load(Path(path).read_text()) | {"stages": stages}
    Path(path).write_text(yaml.safe_dump(tree))
    assert compare.main([path]) == 0
    told = capsys.readouterr().out
    (steps,) = [line.split()[1:3] for line in told.splitlines() if line.startswith("steps ")]
    assert steps == ["500", "1000"]
    (moving,) = [line for line in told.splitlines() if line.startswith("parameters that move")]
    first, second = (float(number) for number in re.findall(r"([\d.]+) M of", moving))
    assert 0 < first < second
    assert told.count("preflight of this recipe, stage") == 2 and told.count("ok    batch: ") == 2
