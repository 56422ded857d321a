import dataclasses
import subprocess
import sys

import pytest

from training.recipe.recipe import load_recipe, recipe_differences, recipe_to_yaml

MINIMAL = """
output: runs/a
model: {init_from: base.nemo}
data: {train: train.jsonl, validation: {dev: dev.jsonl}}
trainer: {max_steps: 100}
"""


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str = MINIMAL):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_defaults_are_nemos(recipe_file):
    recipe = load_recipe(recipe_file())
    assert recipe.data.train == ("train.jsonl",)
    assert recipe.data.validation == {"dev": "dev.jsonl"}
    assert recipe.optim.betas == (0.9, 0.98) and recipe.optim.weight_decay == 1e-3
    assert recipe.loss.ctc_weight is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.output = "elsewhere"


@pytest.mark.parametrize(
    ("extra", "override", "expected"),
    [
        ("optm: {lr: 1.0}", None, "recipe.yaml: unknown key optm; did you mean optim?"),
        ("optim: {lrr: 1.0}", None, "recipe.yaml: unknown key optim.lrr; did you mean optim.lr?"),
        ("max_steps: 3", None, "unknown key max_steps; did you mean trainer.max_steps?"),
        ("", "trainer.max_step=3", "unknown key trainer.max_step; did you mean trainer.max_steps?"),
        ("", "trainer.zzz=3", "unknown key trainer.zzz; known keys: trainer.accumulate"),
        ("", "loss.sigmaa=3", "override 'loss.sigmaa=3'"),
    ],
)
def test_an_unknown_key_names_its_source_and_the_nearest(recipe_file, extra, override, expected):
    path = recipe_file(MINIMAL + extra)
    with pytest.raises(ValueError) as error:
        load_recipe(path, [override] if override else [])
    assert expected in str(error.value)


def test_overrides(recipe_file):
    recipe = load_recipe(
        recipe_file(),
        [
            "optim.lr=1e-4",
            "data.train=[a.jsonl,b.jsonl]",
            "freeze.encoder_layers=half",
            "data.validation.other=x.jsonl",
            "spec_augment.time_width=0.05",
            "trainer.clip_grad_norm=null",
        ],
    )
    assert recipe.optim.lr == 1e-4
    assert recipe.data.train == ("a.jsonl", "b.jsonl")
    assert recipe.freeze.encoder_layers == "half"
    assert recipe.data.validation == {"dev": "dev.jsonl", "other": "x.jsonl"}
    assert recipe.spec_augment.time_width == 0.05
    assert recipe.trainer.clip_grad_norm is None


def test_validation_sets_are_named_after_their_files(recipe_file):
    path = recipe_file()
    recipe = load_recipe(path, ["data.validation=x/fsdd/test.jsonl"])
    # an override of a mapping by a value replaces it
    assert recipe.data.validation == {"test": "x/fsdd/test.jsonl"}
    recipe = load_recipe(path, ["data.validation=[x/fsdd/test.jsonl,x/an4/test.jsonl]"])
    assert list(recipe.data.validation) == ["fsdd_test", "an4_test"]


def test_the_resolved_recipe_reads_back_the_same(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(), ["spec_augment.time_width=20", "data.batch_duration_s=60"])
    again = tmp_path / "again.yaml"
    again.write_text(recipe_to_yaml(recipe))
    assert load_recipe(again) == recipe
    changed = load_recipe(again, ["optim.lr=0.5"])
    assert recipe_differences(recipe, changed) == {"optim.lr": (1e-3, 0.5)}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=fast", "optim.lr must be a number, not 'fast'"),
        ("optim.lr=0", "optim.lr is 0.0, expected more than 0"),
        ("optim.lr=nan", "optim.lr must be a number"),
        ("optim.betas=[0.9]", "optim.betas must be a list (2 values"),
        ("trainer.max_steps=1.5", "trainer.max_steps must be a whole number or null"),
        ("trainer.max_steps=true", "trainer.max_steps must be a whole number or null"),
        ("optim={name: adamw8bit}", "adamw8bit does not go with trainer.parallel fsdp"),
        ("trainer.precision=bf16_pure", "bf16_pure does not go with trainer.parallel fsdp"),
        ("freeze.until={joint: -1}", "freeze.until.joint is -1"),
        ("freeze.until={joint: half}", "freeze.until.joint must be a whole number"),
        ("freeze.until=joint", "freeze.until must be a mapping from names to a whole number"),
        ("freeze.batch_norm=free", "expected one of fixed, adapt, affine"),
        ("lora={rank: 2, targets: []}", "lora.targets is empty"),
        ("optim.lr_groups={joint: 0}", "optim.lr_groups.joint is 0.0, expected more than 0"),
        ("optim.layer_decay=0", "optim.layer_decay is 0.0, expected more than 0"),
        ("optim.layer_decay=1.1", "optim.layer_decay is 1.1, expected 0 to 1"),
        ("schedule.name=step", "expected one of cosine, linear, inverse_sqrt, noam, wsd, constant"),
        ("schedule={hold_steps: 1, hold_ratio: 0.1}", "hold_steps or schedule.hold_ratio, not"),
        ("trainer.ema_decay=2", "trainer.ema_decay is 2.0, expected 0 to 1"),
        ("trainer.epochs=2", "either trainer.max_steps or trainer.epochs"),
        ("trainer.precision=fp16", "trainer.precision is 'fp16', expected one of fp32, bf16"),
        ("loss.ctc_weight=1.5", "loss.ctc_weight is 1.5, expected 0 to 1"),
        ("freeze.encoder_layers=most", "freeze.encoder_layers is 'most'"),
        ("model.config=model.yaml", "either model.init_from"),
        ("data.batch_size=null", "data.batch_size or data.batch_duration_s"),
        ("data=7", "data must be a section"),
        ("optim.lr", "not of the form key=value"),
        ("output=", "output"),
    ],
)
def test_wrong_values_are_named(recipe_file, override, expected):
    overrides = ["trainer.parallel=fsdp"] * ("fsdp" in expected) + [override]
    with pytest.raises(ValueError) as error:
        load_recipe(recipe_file(), overrides)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["5", "a: [1,", "- 1\n- 2\n", "optim: {lr: 1.0}\noptim: {lr: 2.0}\n"]
)
def test_a_file_that_is_no_recipe(recipe_file, text):
    path = recipe_file(text)
    with pytest.raises(ValueError, match="recipe.yaml"):
        load_recipe(path)


@pytest.mark.parametrize("key", ["metric=cer", "top_k=3", "patience=2", "min_delta=0.1"])
def test_what_is_kept_needs_something_measured(recipe_file, key):
    load_recipe(recipe_file(), [f"keep.{key}"])
    with pytest.raises(ValueError, match=rf"keep\.{key.split('=')[0]} needs data\.validation"):
        load_recipe(recipe_file(), ["data.validation={}", f"keep.{key}"])


def test_sources_are_overridden_by_name(recipe_file):
    text = MINIMAL.replace("train: train.jsonl", "train: [a/train.jsonl, {manifest: b, name: tv}]")
    path = recipe_file(text)
    recipe = load_recipe(path, ["data.train.tv.max_clips=15000", "data.train.train.lang=hi"])
    first, second = recipe.data.sources
    assert (first.manifest, first.lang, second.max_clips) == ("a/train.jsonl", "hi", 15000)
    off = load_recipe(path, ["data.train.tv.weight=0"]).data
    assert [source.manifest for source in off.sources] == ["a/train.jsonl"]
    for override, message in (
        ("data.train.tv.max_clip=3", "did you mean max_clips"),
        ("data.train.radio.weight=1", "has no source of that name, but train, tv"),
        ("data.train.tv.weight=2", "1 of 2 entries have a weight"),
        ("data.train.tv.weight=-1", "weight is -1.0, expected at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe(path, [override])
    with pytest.raises(ValueError, match="every source is switched off"):
        load_recipe(path, ["data.train.tv.weight=0", "data.train.train.weight=0"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_without_omegaconf(tmp_path):
    """Where the training packages are missing, --help works and a job says what to install."""
    (tmp_path / "recipe.yaml").write_text("data: {}\n")
    for arguments, status in ((["--help"], 0), ([str(tmp_path / "recipe.yaml")], 2)):
        for module in ("finetune", "compare"):
            code = "import sys; sys.modules['omegaconf'] = None; from training import {0} as m; "
            code += "sys.exit(m.main(sys.argv[1:]))"
            command = [sys.executable, "-c", code.format(module), *arguments]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == status, done.stderr
            assert status == 0 or (".[train]" in done.stderr and done.stderr.count("\n") == 1)
