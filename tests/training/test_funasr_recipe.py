"""FunASR's configuration and fine-tuning script as recipes: each key has a counterpart, is an
error, or is listed as dead there or without effect here."""

import re
import shutil

import pytest
import yaml
from conftest import golden

from fastconformer.formats.manifest import manifest_lines
from training import compare, finetune
from training.recipe.funasr import DEAD, Translation, is_funasr, translate
from training.recipe.recipe import load_recipe

CASE = "fun_asr_nano_tiny"
SCRIPT = """#!/usr/bin/env bash
export CUDA_VISIBLE_DEVICES="0,1"
gpu_num=$(echo $CUDA_VISIBLE_DEVICES | awk -F "," '{{print NF}}')
model_dir="{folder}"
train_data=${{model_dir}}/train.jsonl
torchrun --nproc_per_node ${{gpu_num}} train_ds.py \\
++model="${{model_dir}}" \\
++train_data_set_list="${{train_data}}" \\
++valid_data_set_list="${{train_data}}" \\
++dataset_conf.max_token_length=1024 \\
++dataset_conf.data_split_num=512 \\
++train_conf.max_epoch=2 \\
++train_conf.keep_nbest_models=3 \\
++train_conf.avg_nbest_model=3 \\
++optim_conf.lr=0.0001 \\
++optim_conf.weight_decay=0.01 \\
++scheduler_conf.warmup_steps=2 \\
++frontend_conf.fs=8000 \\
++audio_encoder_conf.freeze=false \\
++specaug=SpecAugLFR \\
++specaug_conf.time_mask_width_range="[0, 50]" \\
++output_dir="{out}" &> log.txt
"""


@pytest.fixture
def config():
    return yaml.safe_load((golden(CASE) / "config.yaml").read_text())


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "finetune.sh"
    path.write_text(SCRIPT.format(folder=golden(CASE).resolve(), out=tmp_path / "run"))
    return path


def keys(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}"


def test_no_key_is_lost(config):
    config["specaug"], config["something_new"] = "SpecAugLFR", 1
    found = translate(config, "config.yaml")
    told = " ".join(key for group in (found.taken, found.dead, found.unused) for key, _ in group)
    switches = ("optim", "scheduler", "scheduler_conf.warmup_steps", "llm_conf.llm_dtype")
    quiet = (*switches, "llm_conf.use_lora", "dataset_conf.batch_type")  # told by what they choose
    for key in keys(config):
        assert key in told or key in quiet, key
    assert ("something_new", "nothing here reads it") in found.unused


def test_what_was_dead_there_is_named_so(config):
    config |= {"specaug": "SpecAugLFR", "specaug_conf": {"num_time_mask": 2}, "ctc_weight": 0.3}
    dead = dict(translate(config, "x").dead)
    for key in ("specaug", "specaug_conf.num_time_mask", "ctc_weight", "ctc_decoder_conf.freeze",
                "model_conf.lsm_weight", "model_conf.length_normalized_loss", "detach_ctc_decoder",
                "dataset_conf.audio_encoder_downsample_rate"):  # fmt: skip
        assert key in dead
    assert "spec_augment does it here" in dead["specaug"]
    assert "loss: {heads: all, ctc_weight: W}" in dead["ctc_weight"]
    assert all(text for text in DEAD.values())


def test_the_script_is_read_over_the_model_s_config(script, tmp_path):
    recipe = load_recipe(script, ["++train_conf.accum_grad=4", "trainer.device=cpu"])
    assert recipe.model.init_from == str(golden(CASE).resolve())
    assert (recipe.model.sample_rate, recipe.model.mel_edges) == (8000, "stretch")
    assert recipe.output == str(tmp_path / "run")
    assert recipe.loss.heads == "llm"
    assert recipe.freeze.modules == ("adaptor", "llm", "ctc")
    assert recipe.data.max_duration_s == 10.24 and recipe.data.batch_duration_s == 60.0
    assert recipe.data.batch_size == 10 and recipe.data.validation
    assert (recipe.optim.lr, recipe.optim.weight_decay) == (1e-4, 0.01)
    assert recipe.optim.betas == (0.9, 0.999)
    assert recipe.schedule.name == "inverse_sqrt" and recipe.schedule.warmup_steps == 1
    assert recipe.schedule.min_lr == 0 and recipe.trainer.clip_grad_norm == 5.0
    assert recipe.trainer.accumulate == 4 and recipe.trainer.device == "cpu"
    assert (recipe.keep.metric, recipe.keep.top_k, recipe.keep.average) == ("cer", 3, True)


def test_lora_as_funasr_has_it(config):
    config["llm_conf"] |= {"use_lora": True, "lora_conf": {"r": 4}}
    config["audio_adaptor_conf"]["freeze"] = False
    recipe = translate(config, "x").recipe
    assert recipe["lora"] == {"rank": 4, "alpha": 32.0, "dropout": 0.05, "also": ["adaptor"],
                              "targets": ["q_proj", "v_proj"]}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim", "adam", "optim is 'adam'"),
        ("scheduler", "tri_stage", "scheduler is 'tri_stage'"),
        ("dataset_conf.batch_type", "frames", "batch_type is 'frames'"),
        ("dataset_conf.noise_list", "n.scp", "adds noise"),
        ("optim_conf.amsgrad", True, "optim_conf.amsgrad is True, which has no counterpart"),
    ],
)
def test_what_would_change_the_result_is_an_error(config, key, value, message):
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
    with pytest.raises(ValueError, match=message):
        translate(config, "config.yaml")


def test_what_a_script_needs(tmp_path, capsys):
    path = tmp_path / "other.sh"
    path.write_text("echo hello\n")
    assert finetune.main([str(path)]) == 2
    assert "no ++key=value in it" in capsys.readouterr().err
    assert not is_funasr({"model": {"train_ds": {}}}) and is_funasr({"train_conf": {}})
    assert str(Translation()).startswith("a FunASR configuration")


def test_compare_shows_the_plan_with_what_was_dead(script, tmp_path, capsys):
    """Main (16 kHz) beside stage 1 (8 kHz), both over the pretrained configuration."""
    main = tmp_path / "main.sh"
    main.write_text(script.read_text().replace("fs=8000", "fs=16000").replace("0.0001", "0.00005"))
    assert compare.main([str(script), str(main), "trainer.device=cpu", "trainer.threads=1"]) == 0
    out = capsys.readouterr().out
    assert "keys that never did anything there" in out and "FunASRNano takes it and lets it" in out
    assert "8000 Hz, 80 mel bins of 20 to 4000 Hz" in out and "16000 Hz, 80 mel bins" in out
    assert "each hears another frequency"[:20] in out
    assert re.search("parameters that move .*0.28 M of 0.56 M", out)
    capsys.readouterr()
    frozen = script.read_text().replace("encoder_conf.freeze=false", "encoder_conf.freeze=true")
    script.write_text(frozen)
    assert compare.main([str(script), "trainer.device=cpu"]) == 1
    assert "every parameter is frozen" in capsys.readouterr().err


def test_a_translated_script_trains(script, tmp_path):
    assert finetune.main([str(script), "trainer.device=cpu", "trainer.threads=1"]) == 0
    assert (tmp_path / "run" / "model_funasr" / "model.pt").is_file()


def test_chats_are_lines_of_a_manifest(tmp_path):
    shutil.copy(golden(CASE) / "train.jsonl", tmp_path / "train.jsonl")
    clips = list(manifest_lines(tmp_path / "train.jsonl"))
    assert [clip.duration_s for clip in clips] == pytest.approx([3.86, 3.52, 2.85, 0.94])
    assert clips[1].text == "The child almost hurt the small dog."
    assert clips[3].others["prompt"] == "语音转写：" and clips[3].audio == "audio/clip_3.wav"
