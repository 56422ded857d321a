"""NeMo's fine-tuning YAML, taken as it is."""

import copy
import logging
import re

import pytest
import torch
import yaml
from conftest import golden

from fastconformer import load_model
from fastconformer.checkpoint.nemo_archive import read_nemo
from training.optim.optim import build_optimizer, schedule_of
from training.recipe.data_sections import SetRecipe
from training.recipe.fields import put
from training.recipe.nemo import is_nemo, translate
from training.recipe.recipe import load_recipe, recipe_from_dict
from training.recipe.sections import OptimRecipe
from training.setup.start import build_model

FINETUNE = """
name: hindi
init_from_nemo_model: base.nemo
model:
  sample_rate: 16000
  train_ds:
    manifest_filepath: [[a.json], [b.json]]
    sample_rate: ${model.sample_rate}
    batch_size: 8
    shuffle: true
    num_workers: 4
    pin_memory: true
    max_duration: 20
    min_duration: 0.2
  validation_ds: {manifest_filepath: "dev.json,other.json", batch_size: 8, shuffle: false}
  tokenizer: {update_tokenizer: true, dir: tokens, type: bpe}
  encoder: {n_layers: 17}
  freeze_updates: {enabled: true, modules: {encoder: 500, joint: -1}}
  spec_augment: {_target_: x.SpectrogramAugmentation, freq_masks: 3, time_masks: 4, time_width: 0.1}
  loss: {loss_name: tdt, tdt_kwargs: {sigma: 0.05, omega: 0.2, fastemit_lambda: 0.001}}
  optim:
    name: adamw
    lr: 1e-4
    betas: [0.9, 0.95]
    weight_decay: 0.01
    sched: {name: CosineAnnealing, warmup_steps: 100, warmup_ratio: null, min_lr: 1e-6}
trainer:
  devices: -1
  accelerator: cpu
  max_epochs: -1
  max_steps: 2000
  accumulate_grad_batches: 2
  gradient_clip_val: 0.0
  precision: bf16
  val_check_interval: 250
exp_manager:
  exp_dir: out
  name: ${name}
  ema: {enable: true, decay: 0.999}
  create_early_stopping_callback: true
  early_stopping_callback_params: {monitor: val_wer, patience: 4}
  checkpoint_callback_params: {monitor: val_wer, mode: min, save_top_k: 3}
"""


@pytest.fixture
def nemo_yaml(tmp_path):
    path = tmp_path / "finetune.yaml"
    path.write_text(FINETUNE)
    return path


def test_every_key_becomes_ours(nemo_yaml):
    recipe = load_recipe(nemo_yaml, ["trainer.seed=7"])
    assert recipe.output == "out/hindi" and recipe.trainer.seed == 7
    assert recipe.model.init_from == "base.nemo" and recipe.model.tokenizer == "tokens"
    assert recipe.data.train == ("a.json", "b.json")
    assert list(recipe.data.validation.values()) == ["dev.json", "other.json"]
    data = recipe.data
    assert (data.batch_size, data.num_workers) == (8, 4)
    assert (data.min_duration_s, data.max_duration_s) == (0.2, 20.0)
    loss = recipe.loss
    assert (loss.sigma, loss.omega, loss.fastemit_lambda) == (0.05, 0.2, 0.001)
    assert recipe.freeze.modules == ("encoder", "joint") and recipe.freeze.until == {"encoder": 500}
    spec = recipe.spec_augment
    assert (spec.freq_masks, spec.time_masks, spec.time_width) == (3, 4, 0.1)
    optim = recipe.optim
    assert (optim.lr, optim.betas, optim.weight_decay) == (1e-4, (0.9, 0.95), 0.01)
    schedule = recipe.schedule
    assert (schedule.name, schedule.warmup_steps, schedule.min_lr) == ("cosine", 100, 1e-6)
    trainer = recipe.trainer
    assert (trainer.max_steps, trainer.epochs, trainer.accumulate) == (2000, None, 2)
    assert trainer.clip_grad_norm is None, "NeMo's 0 means no clipping; ours clips by default"
    assert (trainer.precision, trainer.device, trainer.val_every_steps) == ("bf16", "cpu", 125)
    assert trainer.ema_decay == 0.999
    keep = recipe.keep
    assert (keep.metric, keep.top_k, keep.patience) == ("wer", 3, 4)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("model.train_ds", "batch_size"),
        ("model.optim.sched", "name"),
        ("model.optim.sched", "min_lr"),
        ("trainer", "max_steps"),
        ("trainer", "accumulate_grad_batches"),
        ("exp_manager.checkpoint_callback_params", "monitor"),
        ("exp_manager.checkpoint_callback_params", "save_top_k"),
    ],
)
def test_values_of_a_wrong_kind_are_errors_of_the_file(nemo_yaml, section, key):
    for wrong in ([1], [[]], float("inf"), "1e999"):
        tree = yaml.safe_load(FINETUNE)
        put(tree, f"{section}.{key}", wrong)
        nemo_yaml.write_text(yaml.safe_dump(tree))
        with pytest.raises(ValueError, match=r"finetune\.yaml: "):
            load_recipe(nemo_yaml)


def test_the_translation_and_keys_without_effect_are_told(nemo_yaml, caplog):
    with caplog.at_level(logging.INFO, logger="finetune"):
        load_recipe(nemo_yaml)
    told = caplog.text
    assert "model.optim.lr" in told and "optim.lr: 0.0001" in told
    unused = told[told.index("keys without effect here") :]
    for key in ("model.train_ds.pin_memory", "trainer.devices", "model.encoder.n_layers"):
        assert key in unused, key
    assert "start the command with torchrun" in unused


def test_dropout_is_one_for_all_and_that_is_told(nemo_yaml, caplog):
    more = "n_layers: 17, dropout: 0.2, dropout_att: 0.1, dropout_pre_encoder: 0.2"
    nemo_yaml.write_text(FINETUNE.replace("n_layers: 17", more))
    with caplog.at_level(logging.INFO, logger="finetune"):
        assert load_recipe(nemo_yaml).model.dropout == 0.2
    taken, unused = caplog.text.split("keys without effect here")
    assert "encoder.dropout_pre_encoder " in taken
    assert re.search("encoder.dropout_att +model.dropout, 0.2, is of these too", unused)


def test_the_gradient_skips_no_cells_unless_asked(nemo_yaml, caplog):
    """A recipe's own default is 1e-7, which leads TDT 3e-3 away from NeMo in ten steps."""
    with caplog.at_level(logging.INFO, logger="finetune"):
        assert load_recipe(nemo_yaml, ["model.optim.lr=0.5"]).loss.eps == 0
    assert "loss.eps: 0.0" in caplog.text
    assert load_recipe(nemo_yaml, ["loss.eps=1e-7"]).loss.eps == 1e-7


def test_no_key_is_lost():
    """Each key with a value is either taken or listed."""
    tree = yaml.safe_load(FINETUNE.replace("${model.sample_rate}", "16000").replace("1e-", "1.0e-"))

    def leaves(node, prefix=""):
        for key, value in node.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            elif value is not None:
                yield prefix + key

    found = translate(tree)
    told = " ".join(key for key, _ in found.taken + found.unused)
    quiet = {"model.tokenizer.type", "model.spec_augment._target_", "model.loss.loss_name"}
    quiet |= {"exp_manager.name", "model.tokenizer.update_tokenizer"}
    quiet |= {"model.freeze_updates.enabled", "exp_manager.ema.enable"}
    quiet |= {
        "model.train_ds.shuffle",
        "exp_manager.create_early_stopping_callback",
        "trainer.max_epochs",  # -1
        "exp_manager.early_stopping_callback",
    }
    missing = [key for key in leaves(tree) if key not in told and key not in quiet]
    assert not missing


@pytest.mark.parametrize(
    "change, message",
    [
        (("name: adamw", "name: novograd"), "optim.name is 'novograd'"),
        (("CosineAnnealing", "CyclicLR"), "sched.name is 'CyclicLR'"),
        (("precision: bf16", "precision: 64"), "precision is 64"),
        (("shuffle: true", "trim_silence: true"), "trim_silence"),
        (("init_from_nemo_model: base.nemo", "init_from_pretrained_model: stt_en"), "download"),
        (("init_from_nemo_model: base.nemo", "init_from_ptl_ckpt: a.ckpt"), "a.ckpt --like MODEL"),
        (
            ("init_from_nemo_model: base.nemo", "init_from_ptl_ckpt: {one: {path: a.ckpt}}"),
            "init_from_ptl_ckpt: parts of several",
        ),
        (("[[a.json], [b.json]]", "???"), r"data.train is missing; list one manifest"),
        (("pin_memory: true", "use_a_new_thing: true"), "use_a_new_thing: True has no counterpart"),
        (("pin_memory: true", "is_concat: true"), "train_ds.is_concat: has no counterpart"),
        (("  tokenizer: {update", "  adapter: {dim: 3}\n  tokenizer: {update"), "lora.rank=32"),
        (("monitor: val_wer", "monitor: val_loss"), "'val_loss' is not measured here"),
        (("min_lr: 1e-6", "min_lr: 1e-6, constant_ratio: 0.1"), "give constant_steps"),
        (("min_lr: 1e-6", "min_lr: 1e-6, last_epoch: 7"), "last_epoch: a schedule starts at"),
        (("max_epochs: -1", "max_epochs: 3"), "max_epochs: NeMo ends at it or at trainer.max_st"),
        (("max_epochs: -1", "max_time: '00:01:00:00'"), "trainer.max_time: '00:01:00:00' has no"),
        (("accelerator: cpu", "accelerator: tpu"), "accelerator: is one of gpu, cuda, cpu, auto"),
        (("max_epochs: -1", "gradient_clip_algorithm: value"), "only the norm is clipped here"),
        (("mode: min", "mode: max"), "checkpoint_callback_params.mode: the lowest is kept here"),
        (("{monitor: val_wer, patience: 4}", "{patience: 4}"), "'val_loss' is not measured here"),
        (("{monitor: val_wer, patience: 4}", "{monitor: val_cer}"), "'val_cer', but models are ke"),
        (("patience: 4", "stopping_threshold: 0.1"), "stopping_threshold: has no counterpart"),
        (("decay: 0.999}", "every_n_steps: 5}"), "every_n_steps: the average moves at every"),
        (
            ("shuffle: true", "channel_selector: [0, 1]"),
            r"channel_selector: is \[0, 1\], expected a",
        ),
        (("val_check_interval: 250", "val_check_interval: 2.5"), "2.5; give a share of an epoch"),
        (("val_check_interval: 250", "val_check_interval: 0"), "is 0, expected a number above 0"),
        (
            ("val_check_interval: 250", "val_check_interval: 0.5\n  check_val_every_n_epoch: 2"),
            "is 2 b",
        ),
        (
            ('"dev.json,other.json",', '"dev.json", trim_silence: true,'),
            "validation_ds.trim_silence",
        ),
        (
            ('"dev.json,other.json",', '"dev.json", max_duration: long,'),
            "is 'long', expected a numb",
        ),
        (("shuffle: true", "normalize_transcripts: true"), "texts are tokenized as they stand"),
        (("shuffle: true", "bucket_batch_size: [8, 4]"), "bucket_batch_size: has no counterpart"),
        (("shuffle: true", "bucketing_weights: [2, 1]"), "bucketing_weights: has no counterpart"),
        (("shuffle: true", "drop_last: true"), "train_ds.drop_last: has no counterpart"),
        (
            ("shuffle: true", "augmentor: {impulse: {manifest_path: a, normalize_impulse: true}}"),
            "augmentor.impulse.normalize_impulse: has no counterpart",
        ),
        (
            ("shuffle: true", "augmentor: {noise: {manifest_path: a, max_gain_db: 10}}"),
            "augmentor.noise.max_gain_db: a noise is scaled without a limit",
        ),
        (
            ('{manifest_filepath: "dev.json,other.json",', "{input_cfg: [{type: nemo}],"),
            "validation_ds.input_cfg: give plain NeMo manifests",
        ),
        (
            ("  encoder: {", "  variational_noise: {start_step: 0, std: 0.1}\n  encoder: {"),
            "variational_noise.std: noise on gradients",
        ),
        (("min_lr: 1e-6", "min_lr: 1e-6, max_steps: 77"), "sched.max_steps: is 77, the run has 20"),
        (("CosineAnnealing", "PolynomialHoldDecayAnnealing"), "needs hold_steps"),
        (("shuffle: true", "augmentor: {transcode_aug: {prob: 1.0}}"), "transcode_aug: has no c"),
        (
            ("shuffle: true", "hf_data_cfg: [{path: a/b, name: nl, split: train}]"),
            "training.manifest a/b --config nl --split train -o FOLDER",
        ),
        (
            ("shuffle: true", "shar_path: [[my shars, 0.5], b]"),
            "Lhotse Shar is not read here; make a manifest: python -m training.manifest 'my shars' "
            "-o FOLDER; then ~model.train_ds.shar_path model.train_ds.manifest_filepath=FOLDER/",
        ),
        (("shuffle: true", "shar_path: {cuts: a}"), "training.manifest SOURCE -o FOLDER; then ~"),
        (("shuffle: true", "cuts_path: cuts.jsonl.gz"), "manifest cuts.jsonl.gz -o FOLDER; then ~"),
        (
            ('{manifest_filepath: "dev.json,other.json",', "{cuts_path: dev.jsonl,"),
            "validation_ds.cuts_path: Lhotse cuts are not read here; make a manifest: python -m "
            "training.manifest dev.jsonl -o FOLDER",
        ),
        (("shuffle: true", "normalize_text: true"), "texts are tokenized as they stand; normalis"),
        (
            ("loss: {loss_name: tdt", "loss: {_target_: a.MultiMLMLoss"),
            "MultiMLMLoss is of another",
        ),
    ],
)
def test_what_would_change_the_result_is_refused(nemo_yaml, change, message):
    assert change[0] in FINETUNE
    nemo_yaml.write_text(FINETUNE.replace(*change))
    with pytest.raises(ValueError, match=message):
        load_recipe(nemo_yaml)


@pytest.mark.parametrize(
    "given, steps, epochs",
    [
        ("val_check_interval: 0.25", None, 0.25),
        ("val_check_interval: 1.0", None, 1.0),
        ("val_check_interval: 1", 1, None),  # batches, as in Lightning
        ("check_val_every_n_epoch: 5", None, 5.0),
        ("{val_check_interval: 1.0, check_val_every_n_epoch: 3}", None, 3.0),
        ("val_check_interval: 300\n  check_val_every_n_epoch: null", 150, None),
    ],
)
def test_validation_comes_as_often_as_in_lightning(nemo_yaml, given, steps, epochs):
    given = given.strip("{}").replace(", ", "\n  ")
    nemo_yaml.write_text(FINETUNE.replace("val_check_interval: 250", given))
    trainer = load_recipe(nemo_yaml).trainer  # two batches make a step
    assert (trainer.val_every_steps, trainer.val_every_epochs) == (steps, epochs)


def test_a_set_has_limits_and_fields_of_its_own(nemo_yaml):
    changes = ["model.validation_ds.max_duration=20", "model.validation_ds.min_duration=-1"]
    changes += ["+model.train_ds.text_field=answer", "model.train_ds.channel_selector=1"]
    changes += ["model.test_ds.manifest_filepath=t.json", "model.test_ds.max_duration=.inf"]
    changes += ["model.test_ds.text_field=answer", "model.test_ds.channel_selector=average"]
    data = load_recipe(nemo_yaml, changes).data
    assert data.validation == {
        name: SetRecipe(f"{name}.json", max_duration_s=20.0, text_field="text")
        for name in ("dev", "other")
    }
    assert data.test == {"t": "t.json"} and data.text_field == "answer"
    assert [source.channel for source in data.sources] == [1, 1]


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.train_ds=3", "model.train_ds must be a section of keys, not 3"),
        ("model.optim.sched=x", "model.optim.sched must be a section of keys, not 'x'"),
        ("model=3", "model must be a section"),
        ("model.validation_ds=3", "model.validation_ds must be a section"),
        (
            "model.validation_ds.manifest_filepath={a: b}",
            "is {'a': 'b'}, expected a path or a list",
        ),
        ("model.train_ds.augmentor=[1]", "model.train_ds.augmentor must be a section"),
        ("model.train_ds.augmentor={gain: 3}", "augmentor.gain: is 3, expected a mapping"),
        (
            "model.train_ds.augmentor={speed: {prob: x}}",
            "augmentor.speed.prob: is 'x', expected a n",
        ),
        (
            "model.train_ds.input_cfg=[{type: nemo, weight: x}]",
            "[0].weight: is 'x', expected a num",
        ),
        (
            "model.train_ds.input_cfg=[{type: nemo, tags: [a]}]",
            "[0].tags: is ['a'], expected a map",
        ),
        ("model.train_ds.batch_size=x", "model.train_ds.batch_size is 'x', expected a number"),
        ("model.train_ds.reweight_temperature=x", "temperature is 'x', expected a number"),
        ("trainer.max_steps=x", "trainer.max_steps is 'x', expected a number"),
        ("trainer.gradient_clip_val=x", "trainer.gradient_clip_val is 'x', expected a number"),
        ("model.freeze_updates.modules.encoder=x", "modules.encoder: is 'x', expected a whole nu"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(nemo_yaml, override, message):
    with pytest.raises(ValueError) as error:
        load_recipe(nemo_yaml, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_name_below_a_list_is_one_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("{output: o, data: {train: [a.json], validation: [dev.json]}}")
    with pytest.raises(ValueError, match="a list stands there; give all of it in one override"):
        load_recipe(path, ["data.validation.dev.max_duration_s=3"])


def test_from_scratch_and_tarred():
    tree = {
        "model": {
            "train_ds": {"manifest_filepath": "m.json", "tarred_audio_filepaths": "a_{0..3}.tar"},
            "encoder": {"d_model": 8},
            "joint": {},
            "aux_ctc": {},
            "tokenizer": {"dir": "tokens"},
            "optim": {"lr": 5.0, "sched": {"name": "NoamAnnealing", "d_model": 8}},
        }
    }
    assert is_nemo(tree) and not is_nemo({"model": {"init_from": "a"}, "data": {}})
    recipe = translate(tree).recipe
    assert recipe["data"]["train"] == [
        {"manifest": "m.json", "tarred_audio_filepaths": "a_{0..3}.tar"}
    ]
    assert recipe["model"]["config"]["encoder"] == {"d_model": 8}
    assert recipe["model"]["config"]["target"].endswith(".EncDecHybridRNNTCTCBPEModel")
    assert recipe["model"]["tokenizer"] == "tokens"
    assert recipe["schedule"]["name"] == "noam"


# --- the forms of an optimizer and its schedule -------------------------------------------------


def optimizer_of(optim: dict, **trainer):
    tree = {"model": {"train_ds": {"manifest_filepath": "a"}, "optim": optim}}
    tree |= {"init_from_nemo_model": "x", "trainer": {"max_steps": 20} | trainer}
    return recipe_from_dict(translate(tree).recipe)


RATES = {  # of torch or of NeMo 3.0's own schedulers: base rate 0.5, 20 steps
    "none": ({}, {0: 0.5, 10: 0.5, 19: 0.5}),
    "hold": (
        {"name": "WarmupHoldPolicy", "warmup_steps": 4, "hold_steps": 6},
        {0: 0.1, 4: 0.5, 12: 0.5, 19: 0.5},
    ),
    "cosine without a floor": ({"name": "CosineAnnealing"}, {0: 0.5, 10: 0.25, 19: 0.003077914851}),
    "power": (
        {"name": "PolynomialDecayAnnealing", "power": 2.0, "min_lr": 0.1},
        {0: 0.5, 10: 0.2, 19: 0.101},
    ),
    "hold, power": (
        {"name": "PolynomialHoldDecayAnnealing", "hold_steps": 10, "power": 2.0},
        {0: 0.5, 9: 0.5, 10: 0.5, 15: 0.125, 19: 0.005},
    ),
    "constant steps": (
        {"name": "CosineAnnealing", "warmup_steps": 4, "constant_steps": 6, "min_lr": 0.1},
        {0: 0.0, 2: 0.25, 4: 0.5, 9: 0.3, 14: 0.1, 17: 0.1},
    ),
    "no floor before the end": (
        {"name": "InverseSquareRootAnnealing", "warmup_steps": 1, "min_lr": 0.4},
        {0: 0.25, 7: 0.25, 17: 1 / 6},
    ),
}


@pytest.mark.parametrize("form", RATES)
def test_a_schedule_means_what_it_means_in_nemo(form):
    sched, expected = RATES[form]
    recipe = optimizer_of({"name": "adamw", "lr": 0.5} | ({"sched": sched} if sched else {}))
    rate = schedule_of(recipe.schedule, recipe.optim.lr, 20, 64)
    assert {step: rate(step) for step in expected} == pytest.approx(expected, abs=1e-9)


def test_what_an_optimizer_leaves_out_is_torchs():
    optim = optimizer_of({"name": "adamw", "lr": 0.5}).optim
    assert (optim.betas, optim.weight_decay, optim.eps) == ((0.9, 0.999), 0.01, 1e-8)
    optim = optimizer_of({"name": "adam", "lr": 0.5, "amsgrad": True}).optim
    assert (optim.name, optim.weight_decay, optim.amsgrad) == ("adam", 0.0, True)
    given = {"name": "adamw", "lr": 0.5, "betas": [0.9, 0.98], "weight_decay": 0}
    optim = optimizer_of(given).optim
    assert (optim.betas, optim.weight_decay) == ((0.9, 0.98), 0.0)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_optimizers_step_as_torchs(name, amsgrad):
    given = OptimRecipe(name, lr=0.1, betas=(0.9, 0.999), weight_decay=0.1, amsgrad=amsgrad)
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    other = copy.deepcopy(layer)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    theirs = kind(other.parameters(), 0.1, (0.9, 0.999), 1e-8, 0.1, amsgrad)
    ours = build_optimizer(layer, given)
    for x in torch.randn(5, 4, 3):
        for model, optimizer in ((layer, ours), (other, theirs)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert torch.allclose(layer.weight, other.weight, atol=1e-6)


# --- data ---------------------------------------------------------------------------------------


def data_of(train_ds: dict):
    tree = {"model": {"train_ds": train_ds}, "init_from_nemo_model": "x"}
    return recipe_from_dict(translate(tree | {"trainer": {"max_steps": 1}}).recipe).data


def test_weights_stand_beside_manifests():
    data = data_of({"manifest_filepath": [["a.json", 0.7], ["b.json", 0.3]]})
    assert [(s.manifest, s.weight) for s in data.sources] == [("a.json", 0.7), ("b.json", 0.3)]
    tars = {"tarred_audio_filepaths": [["a.tar"], ["b.tar"]]}
    data = data_of({"manifest_filepath": [["a.json", 0.7], ["b.json", 0.3]]} | tars)
    assert [s.tarred_audio_filepaths for s in data.sources] == ["a.tar", "b.tar"]
    assert data_of({"manifest_filepath": [["a.json"], ["b.json"]]}).train == ("a.json", "b.json")
    with pytest.raises(ValueError, match=r"manifest_filepath: 0\.7 stands where a path belongs"):
        data_of({"manifest_filepath": [0.7]})


INPUT_CFG = """
- {type: nemo, manifest_filepath: a.json, weight: 0.7, tags: {lang: en}}
- type: group
  weight: 0.3
  input_cfg:
    - {type: nemo_tarred, manifest_filepath: "m__OP_0..3_CL_.json",
       tarred_audio_filepaths: "t__OP_0..3_CL_.tar", weight: 0.5}
    - {type: nemo, manifest_filepath: c.json, weight: 0.5}
"""


def test_input_cfg(tmp_path):
    (tmp_path / "input.yaml").write_text(INPUT_CFG)
    for config in (yaml.safe_load(INPUT_CFG), str(tmp_path / "input.yaml")):
        sources = data_of({"manifest_filepath": None, "input_cfg": config}).sources
        assert [s.manifest for s in sources] == ["a.json", "m__OP_0..3_CL_.json", "c.json"]
        assert [s.weight for s in sources] == pytest.approx([0.7, 0.15, 0.15])
        assert [s.lang for s in sources] == ["en", None, None]
        assert sources[1].tarred_audio_filepaths == "t__OP_0..3_CL_.tar"
    members = [{"type": "nemo", "manifest_filepath": name} for name in "ab"]
    groups = [{"type": "group", "weight": 0.2, "input_cfg": members[:1]}, members[1]]
    groups[1] = groups[1] | {"weight": 0.6}
    assert [s.weight for s in data_of({"input_cfg": groups}).sources] == pytest.approx([0.25, 0.75])
    groups[0]["input_cfg"] = members
    with pytest.raises(ValueError, match=r"input_cfg\[0\]: the group has a weight; give one to ea"):
        data_of({"input_cfg": groups})
    for item, why in (
        ({"type": "lhotse", "cuts_path": "a.jsonl"}, "training.manifest a.jsonl -o FOLDER; then t"),
        (
            {"type": "lhotse_shar", "shar_path": "a"},
            r"input_cfg\[0\].shar_path: Lhotse Shar is not r",
        ),
        (
            {"type": "multimodal_conversation"},
            "'multimodal_conversation' is not read here; give NeM",
        ),
    ):
        with pytest.raises(ValueError, match=why):
            data_of({"input_cfg": [item]})


def test_what_nemo_does_not_leave_out_or_pad_is_not_here():
    data = data_of({"manifest_filepath": "a.json", "shuffle": False, "text_field": "answer"})
    assert (data.pad_to_s, data.min_duration_s, data.max_tokens_per_frame) == (0, 0, None)
    assert not data.shuffle and data.text_field == "answer"
    assert data_of({"manifest_filepath": "a.json", "shuffle": True}).shuffle


def test_an_augmentor():
    augmentor = """
white_noise: {prob: 0.5, min_level: -90, max_level: -46}
speed: {prob: 0.5, sr: 16000, min_speed_rate: 0.9, max_speed_rate: 1.1, num_rates: 3}
noise: {prob: 0.3, manifest_path: noise.json, min_snr_db: 0, max_snr_db: 30}
gain: {prob: 1.0, min_gain_dbfs: -10, max_gain_dbfs: 10}
"""
    section = {"manifest_filepath": "a.json", "augmentor": yaml.safe_load(augmentor)}
    tree = {"model": {"train_ds": section}, "init_from_nemo_model": "x"}
    augment = recipe_from_dict(translate(tree | {"trainer": {"max_steps": 1}}).recipe).augment
    assert (augment.white_noise.probability, augment.white_noise.level_db) == (0.5, (-90, -46))
    assert sorted(augment.speeds) == [0.9, 1.0, 1.0, 1.0, 1.0, 1.1]  # half of the draws, one of 3
    assert (augment.noise.manifests, augment.noise.snr_db) == (("noise.json",), (0, 30))
    assert augment.gain_db == (-10, 10)


# --- as NeMo's commands have them ---------------------------------------------------------------


def test_missing_values_come_from_overrides_of_either_kind(nemo_yaml):
    text = FINETUNE.replace("[[a.json], [b.json]]", "???").replace("dir: tokens", 'dir: "???"')
    nemo_yaml.write_text(text + 'hydra: {run: {dir: "???"}}\n')
    theirs = ["model.train_ds.manifest_filepath=t.json", "++model.tokenizer.dir=tok"]
    for overrides in (theirs, ["data.train=[t.json]", "model.tokenizer=tok"]):
        recipe = load_recipe(nemo_yaml, [*overrides, "init_from_nemo_model=other.nemo"])
        assert (recipe.data.train, recipe.model.tokenizer) == (("t.json",), "tok")
        assert recipe.model.init_from == "other.nemo"
    more = ["model.optim.lr=0.5", "trainer.max_steps=9", "trainer.precision=32", "optim.eps=0.1"]
    more += ["~model.freeze_updates", "exp_manager.exp_dir=x", "+trainer.limit_val_batches=3"]
    recipe = load_recipe(nemo_yaml, [*theirs, *more, "model.optim.sched.warmup_steps=2"])
    assert (recipe.optim.lr, recipe.optim.eps, recipe.trainer.max_steps) == (0.5, 0.1, 9)
    assert recipe.trainer.precision == "fp32" and not recipe.freeze.modules
    assert recipe.output == "x/hindi"
    with pytest.raises(ValueError, match=r"there is no model\.nothing"):
        load_recipe(nemo_yaml, [*theirs, "~model.nothing"])


def test_adapters_become_low_rank_ones_by_overrides(nemo_yaml):
    """NeMo's script for adapters names its start otherwise."""
    text = FINETUNE.replace("init_from_nemo_model: base.nemo\n", "defaults: [{a: b}]\n")
    text = text.replace(
        "  freeze_updates", "  nemo_model: null\n  adapter: {dim: 3}\n  freeze_updates"
    )
    nemo_yaml.write_text(text)
    with pytest.raises(ValueError, match=r"~model\.adapter lora\.rank=32 trains low-rank adapters"):
        load_recipe(nemo_yaml, ["model.nemo_model=b.nemo"])
    recipe = load_recipe(nemo_yaml, ["model.nemo_model=b.nemo", "~model.adapter", "lora.rank=32"])
    assert (recipe.model.init_from, recipe.lora.rank) == ("b.nemo", 32)


def test_products_are_taken_as_nemos_scripts_give_them(nemo_yaml):
    nemo_yaml.write_text(
        FINETUNE.replace("batch_size: 8\n", "batch_size: ${multiply:${sum:1,2},4}\n")
    )
    assert load_recipe(nemo_yaml).data.batch_size == 12


def test_what_a_switch_leaves_out_has_nemos_defaults(nemo_yaml):
    text = FINETUNE.replace(", decay: 0.999", "").replace(
        "monitor: val_wer, patience: 4", "monitor: val_wer"
    )
    nemo_yaml.write_text(text)
    recipe = load_recipe(nemo_yaml)
    assert recipe.trainer.ema_decay == 0.999
    assert (recipe.keep.patience, recipe.keep.min_delta) == (10, 0.001)


LABELS = [" ", "a", "b", "'"]
SMALL = {
    "preprocessor": {"sample_rate": 16000, "features": 80, "n_fft": 512, "pad_to": 0},
    "encoder": {
        "feat_in": 80,
        "n_layers": 2,
        "d_model": 64,
        "n_heads": 4,
        "subsampling": "dw_striding",
        "subsampling_factor": 8,
        "conv_kernel_size": 9,
        "subsampling_conv_channels": 16,
    },
    "optim": {"name": "adamw", "lr": 1e-3},
}


def test_a_tokenizer_for_each_language_from_scratch(tmp_path):
    files = read_nemo(golden("hybrid_tdt_ctc_bpe") / "model.nemo").tokenizer_files
    for name in ("en", "es"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(files["tokenizer.model"])
    langs = {name: {"dir": str(tmp_path / name), "type": "bpe"} for name in ("en", "es")}
    tree = {"model": SMALL | {"train_ds": {"manifest_filepath": "m.json"}}}
    tree["model"] |= {"tokenizer": {"type": "agg", "langs": langs}, "decoder": {"feat_in": None}}
    tree["trainer"] = {"max_steps": 4, "accelerator": "cpu"}
    recipe = recipe_from_dict(translate(tree).recipe)
    model = build_model(recipe.model, recipe.loss, 0)
    size = model.tokenizer.languages["en"].vocab_size
    assert model.tokenizer.of_language("es").encode("it")[0] >= size
    assert model.tokenizer.vocab_size == 2 * size
    model.save(tmp_path / "saved")
    saved = load_model(tmp_path / "saved").tokenizer
    assert saved.of_language("es").encode("it") == model.tokenizer.of_language("es").encode("it")
    langs["es"]["type"] = "wpe"
    with pytest.raises(ValueError, match=r"langs\.es\.type: a wpe tokenizer is not read here"):
        translate(tree)


def test_characters_are_a_vocabulary(nemo_yaml):
    section = "  char_labels: {update_labels: true, labels: [' ', a, b, \"'\"]}\n  encoder:"
    without = FINETUNE.replace(
        "  tokenizer: {update_tokenizer: true, dir: tokens, type: bpe}\n", ""
    )
    nemo_yaml.write_text(without.replace("  encoder:", section))
    model = load_recipe(nemo_yaml).model
    assert model.labels == (" ", "a", "b", "'") and model.changes_vocabulary
    tree = {
        "model": SMALL
        | {
            "labels": LABELS,
            "train_ds": {"manifest_filepath": "m.json", "labels": LABELS},
            "decoder": {"feat_in": None, "num_classes": -1, "vocabulary": LABELS},
        },
        "trainer": {"max_steps": 4, "accelerator": "cpu"},
    }
    recipe = recipe_from_dict(translate(tree).recipe)
    model = build_model(recipe.model, recipe.loss, 0)
    assert model.config.class_name == "EncDecCTCModel" and model.tokenizer.pieces == LABELS
