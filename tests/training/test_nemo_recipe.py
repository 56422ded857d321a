"""NeMo's fine-tuning YAML, taken as it is."""

import logging

import pytest
import yaml

from training.recipe.nemo import is_nemo, translate
from training.recipe.recipe import load_recipe

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
    use_a_new_thing: true
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
  max_epochs: 50
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
  early_stopping_callback_params: {patience: 4}
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
    assert (trainer.precision, trainer.device, trainer.val_every_steps) == ("bf16", "cpu", 250)
    assert trainer.ema_decay == 0.999
    keep = recipe.keep
    assert (keep.metric, keep.top_k, keep.patience) == ("wer", 3, 4)


def test_the_translation_and_keys_without_effect_are_told(nemo_yaml, caplog):
    with caplog.at_level(logging.INFO, logger="finetune"):
        load_recipe(nemo_yaml)
    told = caplog.text
    assert "model.optim.lr" in told and "optim.lr: 0.0001" in told
    unused = told[told.index("keys without effect here") :]
    for key in ("model.train_ds.use_a_new_thing", "trainer.devices", "model.encoder.n_layers"):
        assert key in unused, key
    assert "start the command with torchrun" in unused and "nothing here reads it" in unused


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
    quiet |= {"exp_manager.create_early_stopping_callback", "exp_manager.early_stopping_callback"}
    missing = [key for key in leaves(tree) if key not in told and key not in quiet]
    assert not missing


@pytest.mark.parametrize(
    "change, message",
    [
        (("name: adamw", "name: novograd"), "optim.name is 'novograd'"),
        (("CosineAnnealing", "CyclicLR"), "sched.name is 'CyclicLR'"),
        (("precision: bf16", "precision: 64"), "precision is 64"),
        (("shuffle: true", "trim_silence: true"), "trim_silence"),
        (("init_from_nemo_model: base.nemo", "init_from_pretrained_model: a/b"), "download"),
        (("[[a.json], [b.json]]", "???"), "Missing mandatory value: manifest_filepath"),
    ],
)
def test_what_would_change_the_result_is_refused(nemo_yaml, change, message):
    assert change[0] in FINETUNE
    nemo_yaml.write_text(FINETUNE.replace(*change))
    with pytest.raises(ValueError, match=message):
        load_recipe(nemo_yaml)


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
