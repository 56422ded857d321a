"""Training an attention decoder: slots from manifests, NeMo's loss, lines that cannot be used."""

import json

import pytest
import soundfile
import torch
from conftest import load_case, logged
from safetensors.torch import load_file

from fastconformer import load_model
from fastconformer.checkpoint.nemo_archive import write_nemo
from training import compare, find_batch, finetune
from training.data.limits import Limits, check_for_training
from training.data.store import collate
from training.data.utterances import read_utterances
from training.objective.objective import batch_loss, make_views, objective_of, views_loss
from training.optim.ema import plain_checkpoint
from training.optim.optim import build_optimizer
from training.recipe.data_sections import SpecAugmentRecipe
from training.recipe.recipe import load_recipe
from training.recipe.sections import (
    FreezeRecipe,
    LoraRecipe,
    LossRecipe,
    ModelRecipe,
    OptimRecipe,
    PromptRecipe,
    TrainerRecipe,
)
from training.setup.start import build_model, ready_to_train

PLAIN = SpecAugmentRecipe(freq_masks=0, time_masks=0)
CASES = ["canary_flash_agg", "canary_v2_unified", "canary_v1_agg"]


def manifest_of(case, folder, numbers, change=lambda line: line):
    """A manifest of the case's own lines, and their clips."""
    path, lines = folder / "train.jsonl", []
    for clip, length in enumerate(case.tensors["audio_len"]):
        samples = case.tensors["audio"][clip, :length].numpy()
        soundfile.write(folder / f"{clip}.wav", samples, 16000, subtype="PCM_16")
    for number in numbers:
        line = dict(case.expected["manifest_lines"][number]["line"])
        clip = line.pop("utterance")
        seconds = case.tensors["audio_len"][clip].item() / 16000
        line = change(line | {"audio_filepath": f"{clip}.wav", "duration": seconds})
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
    return path


def usable(model, path, prompt=None):
    lines, bad = read_utterances(path)
    kept, dropped = check_for_training(lines, model.tokenizer, Limits(), None, model.head(), prompt)
    return kept, bad + dropped


@pytest.mark.parametrize("name", CASES)
def test_a_batch_is_nemos(name, tmp_path):
    """Tokens, prompts and the loss of NeMo's training_step, from a manifest, with every option."""
    case = load_case(name)
    numbers = case.expected["training_batch_lines"]
    path = manifest_of(case, tmp_path, numbers)
    for smoothing in (0.0, 0.1):
        for masked in (False, True):
            loss = LossRecipe(label_smoothing=smoothing, mask_prompt=masked)
            model = build_model(ModelRecipe(init_from=str(case.folder / "model.nemo")), loss, 0)
            kept, dropped = usable(model, path)
            assert not dropped
            clips = [
                case.tensors["audio"][i, :n].numpy()
                for i, n in enumerate(case.tensors["audio_len"])
            ]
            audio = [
                clips[case.expected["manifest_lines"][n]["line"]["utterance"]] for n in numbers
            ]
            batch = collate(kept, audio)
            assert torch.equal(batch.target_lengths, case.tensors["prompted_transcript_len"])
            assert torch.equal(batch.prompt_lengths, case.tensors["prompt_len"])
            for row, length in enumerate(batch.target_lengths):
                expected = case.tensors["prompted_transcript"][row, :length]
                assert torch.equal(batch.targets[row, :length], expected)
            total, _ = batch_loss(model.eval(), batch, objective_of(model, loss, PLAIN))
            key = f"label_smoothing_{smoothing}_mask_prompt_{str(masked).lower()}"
            step = case.expected["training_step_loss_eval_mode"][key]
            assert total.item() == pytest.approx(step, rel=1e-4)
            saved = load_saved(model, tmp_path)
            assert saved.config.loss.mask_prompt == masked
            assert saved.config.loss.label_smoothing == smoothing


def load_saved(model, folder):
    model.save(folder / "saved")
    return load_model(folder / "saved")


def test_a_batch_in_parts_has_the_gradient_of_the_batch(tmp_path):
    """As over processes and where memory runs out: the mean is over all tokens of the batch."""
    case = load_case("canary_v2_unified")
    path = manifest_of(case, tmp_path, case.expected["training_batch_lines"])
    loss = LossRecipe(mask_prompt=True)
    model = build_model(ModelRecipe(init_from=str(case.folder / "model.nemo")), loss, 0).eval()
    kept, _ = usable(model, path)
    audio = [case.tensors["audio"][i, :n].numpy() for i, n in enumerate(case.tensors["audio_len"])]
    batch, objective = collate(kept, audio), objective_of(model, loss, PLAIN)
    views = make_views(model, batch, objective)
    whole, _, _ = views_loss(model, views, objective)
    parts = [views_loss(model, views.rows(torch.tensor([i])), objective)[0] for i in range(3)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


def test_lines_that_cannot_be_used(tmp_path):
    case = load_case("canary_flash_agg")
    model = load_model(case.folder / "model.nemo")
    wrong = [
        ({"target_lang": None}, "lang is None; to encode a text, this model needs its language"),
        ({"target_lang": None, "lang": "en"}, "no target_lang; prompts of format canary2 need"),
        ({"source_lang": "xx"}, "slot source_lang is 'xx', expected one of"),
        ({"pnc": "maybe"}, "slot pnc is 'maybe', expected one of"),
        ({"lang": "es"}, "lang is 'es'; to encode a text"),
        ({"text": "word " * 1025}, "tokens with the prompt, the decoder takes at most 129"),
        ({"decodercontext": "word " * 1025}, "tokens with the prompt, the decoder takes"),
    ]
    changes = iter(change for change, _ in wrong)
    path = manifest_of(case, tmp_path, [0] * len(wrong), lambda line: line | next(changes))
    kept, dropped = usable(model, path)
    assert not kept
    for item, (_, reason) in zip(dropped, wrong, strict=True):
        assert reason in item.detail


def test_slots_that_lines_lack(tmp_path):
    case = load_case("canary_flash_agg")
    model = load_model(case.folder / "model.nemo")
    path = manifest_of(
        case,
        tmp_path,
        [0],
        lambda line: {key: value for key, value in line.items() if not key.endswith("_lang")},
    )
    assert not usable(model, path)[0]
    (kept,), _ = usable(model, path, {"source_lang": "de", "target_lang": "en", "pnc": False})
    prompt = model.prompt_ids(source_lang="de", target_lang="en", pnc="no")
    assert list(kept.tokens[: kept.prompt_length]) == prompt


def test_silence_ends_after_the_prompt(tmp_path):
    case = load_case("canary_flash_agg")
    model = load_model(case.folder / "model.nemo")
    path = manifest_of(case, tmp_path, [0], lambda line: line | {"text": ""})
    (kept,), _ = usable(model, path)
    assert list(kept.tokens[kept.prompt_length :]) == [model.tokenizer.eos_id]


def recipe_of(case, folder, **sections):
    path = manifest_of(case, folder, case.expected["training_batch_lines"])
    recipe = {
        "output": str(folder / "run"),
        "model": {"init_from": str(case.folder / "model.nemo")},
        "data": {
            "train": [str(path)],
            "validation": {"dev": str(path)},
            "batch_size": 3,
            "num_workers": 0,
        },
        "optim": {"lr": 1e-3},
        "trainer": {"max_steps": 4, "threads": 1, "val_every_steps": 2, "device": "cpu"},
        "spec_augment": {"freq_masks": 0, "time_masks": 0},
    }
    for name, section in sections.items():
        recipe[name] = recipe.get(name, {}) | section
    written = folder / "recipe.yaml"
    written.write_text(json.dumps(recipe))
    return written


@pytest.mark.parametrize("name", ["canary_flash_agg", "canary_v2_unified"])
def test_a_run(name, tmp_path, capsys):
    """Trains, measures each line with its own prompt, saves; what is saved has one tied table, its
    own slot values, and the model for times."""
    case = load_case(name)
    values = {"pnc": {"verse": "<|spltoken0|>"}}
    recipe = recipe_of(
        case,
        tmp_path,
        prompt={"values": values},
        loss={"mask_prompt": True},
        trainer={"ema_decay": 0.9},
    )
    assert finetune.main([str(recipe)]) == 0
    records = logged(tmp_path / "run")
    assert records and all(0 < record["loss"] < 10 for record in records)
    model = load_model(tmp_path / "run" / "best")
    table = model.transf_decoder._embedding.token_embedding.weight
    assert model.log_softmax.mlp["layer0"].weight is table
    assert model.prompt_ids(pnc="verse") != model.prompt_ids()
    assert (model.aligner is None) == (load_model(case.folder / "model.nemo").aligner is None)
    written = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert torch.equal(
        written["log_softmax.mlp.layer0.weight"],
        written["transf_decoder._embedding.token_embedding.weight"],
    )
    assert finetune.main([str(recipe), "trainer.max_steps=5"]) == 0  # goes on


def test_what_a_recipe_cannot_ask(tmp_path):
    case = load_case("canary_flash_agg")
    archive = ModelRecipe(init_from=str(case.folder / "model.nemo"))
    for loss, reason in (
        (LossRecipe(sigma=0.1), "loss.sigma belongs to TDT"),
        (LossRecipe(reduction="mean"), "a mean over tokens"),
        (LossRecipe(ctc_weight=0.5), "loss.ctc_weight belongs to hybrids"),
    ):
        with pytest.raises(ValueError, match=reason):
            build_model(archive, loss, 0)
    other = ModelRecipe(init_from=str(load_case("ctc_bpe").folder / "model.nemo"))
    with pytest.raises(ValueError, match="loss.mask_prompt belongs to attention decoders"):
        build_model(other, LossRecipe(mask_prompt=True), 0)
    with pytest.raises(ValueError, match="this model takes no prompt"):
        build_model(other, LossRecipe(), 0, prompt=PromptRecipe({"pnc": {"a": "<|b|>"}}))
    with pytest.raises(ValueError, match="no special token of this model"):
        build_model(archive, LossRecipe(), 0, prompt=PromptRecipe({"pnc": {"a": "<|b|>"}}))


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        (("transf_decoder",), {"transf_decoder"}),
        (("attention", "feed_forward"), {"encoder", "transf_decoder"}),
    ],
)
def test_lora_in_the_decoder(targets, parts, tmp_path):
    """Two steps move adapters alone; the archive that is saved has them merged into the original's
    tensors, and says what the adapted model said."""
    case = load_case("canary_flash_agg")
    archive, plain = ModelRecipe(init_from=str(case.folder / "model.nemo")), LossRecipe()
    model = build_model(archive, plain, 0)
    objective = objective_of(model, plain, PLAIN)
    lora, trainer = LoraRecipe(rank=4, alpha=8.0, targets=targets), TrainerRecipe(max_steps=2)
    ready_to_train(model, objective, FreezeRecipe(), lora, trainer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(model, OptimRecipe(lr=1e-2), 0)
    path = manifest_of(case, tmp_path, case.expected["training_batch_lines"])
    audio = [case.tensors["audio"][i, :n].numpy() for i, n in enumerate(case.tensors["audio_len"])]
    batch = collate(usable(model, path)[0], audio)
    for _ in range(2):
        optimizer.zero_grad()
        batch_loss(model, batch, objective)[0].backward()
        optimizer.step()
    after = model.eval().state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in moved} == {"lora_a", "lora_b"}
    assert {name.partition(".")[0] for name in moved} == parts
    adapted = sum(".layers.0." in name for name in moved if name.startswith("transf_decoder"))
    assert adapted == 2 * (4 + 4 + 2)  # all matrices of a layer
    write_nemo(tmp_path / "saved.nemo", plain_checkpoint(model))
    saved = load_model(tmp_path / "saved.nemo")
    names = load_model(case.folder / "model.nemo").state_dict().keys()
    assert saved.state_dict().keys() == names
    with torch.no_grad():
        said = [
            one.aed_log_probs(*one.encode(*one.featurize(batch.audio, batch.audio_lengths)), ids)
            for one, ids in ((model, batch.targets), (saved, batch.targets))
        ]
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)
    original = load_model(case.folder / "model.nemo")
    with torch.no_grad():
        encoded = original.encode(*original.featurize(batch.audio, batch.audio_lengths))
        assert (original.aed_log_probs(*encoded, batch.targets) - said[0]).abs().max() > 0.01


def test_frozen_all_but_the_decoder(tmp_path):
    case = load_case("canary_flash_agg")
    recipe = recipe_of(
        case,
        tmp_path,
        freeze={"modules": ["encoder"], "batch_norm": "adapt"},
        trainer={"max_steps": 2},
    )
    assert finetune.main([str(recipe)]) == 0
    before = load_model(case.folder / "model.nemo").state_dict()
    after = (
        load_model(tmp_path / "run" / "last").state_dict()
        if (tmp_path / "run" / "last").is_dir()
        else load_model(tmp_path / "run" / "best").state_dict()
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("transf_decoder") for name in moved)
    assert {name for name in moved if name.startswith("encoder.")} == {
        name for name in before if "batch_norm.running" in name or "num_batches_tracked" in name
    }


NEMO = """
name: canary
init_from_nemo_model: {archive}
spl_tokens: {{model_dir: spl, tokens: [translate, transcribe, en, de], force_rebuild: false}}
model:
  sample_rate: 16000
  label_smoothing: 0.1
  use_loss_mask_for_prompt: true
  log_prediction: true
  prompt_format: canary2
  prompt_defaults:
    - {{role: user, slots: {{source_lang: "<|en|>", target_lang: "<|en|>", pnc: "<|pnc|>"}}}}
  model_defaults: {{asr_enc_hidden: 40, lm_enc_hidden: 48, lm_dec_hidden: 48}}
  train_ds:
    use_lhotse: true
    manifest_filepath: train.jsonl
    sample_rate: ${{model.sample_rate}}
    shuffle: true
    num_workers: 8
    batch_duration: 360
    quadratic_duration: 15
    use_bucketing: true
    num_buckets: 20
    bucket_buffer_size: 20000
    text_field: text
    lang_field: target_lang
    max_duration: 40.0
    min_duration: 0.1
    concurrent_bucketing: false
  validation_ds: {{use_lhotse: true, manifest_filepath: dev.jsonl, batch_size: 8, shuffle: false}}
  tokenizer:
    dir: null
    type: agg
    langs: {{spl_tokens: {{dir: spl, type: bpe}}, en: {{dir: en, type: bpe}}}}
    custom_tokenizer: {{_target_: x.CanaryTokenizer, tokenizers: null}}
  preprocessor: {{features: 128}}
  spec_augment: {{_target_: x.SpectrogramAugmentation, freq_masks: 2, time_masks: 10,
    freq_width: 27, time_width: 0.05}}
  encoder: {{n_layers: 2}}
  transf_encoder: {{num_layers: 0}}
  transf_decoder: {{config_dict: {{max_sequence_length: 128, num_layers: 2}}}}
  head: {{num_layers: 1, activation: relu, log_softmax: true}}
  decoding: {{strategy: beam, beam: {{beam_size: 1, len_pen: 0.0, max_generation_delta: 50}}}}
  loss:
    _target_: x.SmoothedCrossEntropyLoss
    label_smoothing: ${{model.label_smoothing}}
  optim:
    name: adamw
    lr: 3e-4
    betas: [0.9, 0.98]
    weight_decay: 1e-3
    sched: {{name: InverseSquareRootAnnealing, warmup_steps: 2500, min_lr: 1e-6}}
trainer: {{devices: -1, accelerator: cpu, max_steps: 100, precision: bf16-mixed,
  accumulate_grad_batches: 1, gradient_clip_val: 0.0}}
exp_manager: {{exp_dir: out, checkpoint_callback_params: {{monitor: val_loss, mode: min}}}}
"""


def test_nemos_own_configuration_is_taken(tmp_path):
    """speech_to_text_aed.yaml as people copy it: the architecture is the checkpoint's, data,
    loss and optimizer the file's."""
    case = load_case("canary_flash_agg")
    path = tmp_path / "speech_to_text_aed.yaml"
    path.write_text(NEMO.format(archive=case.folder / "model.nemo"))
    recipe = load_recipe(path)
    assert recipe.loss.label_smoothing == 0.1 and recipe.loss.mask_prompt is True
    assert recipe.optim.lr == 3e-4 and recipe.schedule.name == "inverse_sqrt"
    assert recipe.data.batch_duration_s == 360 and recipe.data.lang_field == "target_lang"
    model = build_model(recipe.model, recipe.loss, 0)
    assert model.config.loss.label_smoothing == 0.1 and model.config.loss.mask_prompt
    path.write_text(NEMO.format(archive="null"))
    with pytest.raises(ValueError, match="init_from_nemo_model"):
        load_recipe(path)


def spanish(folder):
    """A tokenizer of a language that canary_flash_agg lacks."""
    from conftest import TESTS

    from fastconformer.text.sentencepiece_model import SentencePieceModel

    model = load_model(TESTS / "golden" / "canary_flash_agg" / "model.nemo")
    german = model.tokenizer.languages["de"].processor.serialized_model_proto()
    pieces = SentencePieceModel.from_bytes(german).pieces[:60]
    (folder / "es.model").write_bytes(
        SentencePieceModel.from_bytes(german).with_pieces(pieces).to_bytes()
    )
    return str(folder / "es.model")


@pytest.mark.parametrize("steps", [0, 1])
def test_a_language_is_added(tmp_path, steps):
    """Old tokens keep their rows at their places and their logits; padding is as wide as it must
    be; a run trains it, new rows first."""
    case = load_case("canary_flash_agg")
    archive = str(case.folder / "model.nemo")
    before = load_model(archive)
    added = {"es": spanish(tmp_path)}
    model = build_model(ModelRecipe(init_from=archive, tokenizer=added), LossRecipe(), 0)
    assert list(model.tokenizer.languages) == ["spl_tokens", "en", "de", "es"]
    assert model.config.aed.vocab_size == 424 and model.tokenizer.vocab_size == 363 + 60
    table = model.log_softmax.mlp["layer0"].weight
    assert table is model.transf_decoder._embedding.token_embedding.weight
    assert torch.equal(table[:363], before.log_softmax.mlp["layer0"].weight[:363])
    clips, lengths = case.tensors["audio"], case.tensors["audio_len"]
    for one, other in zip(before.transcribe(list(clips)), model.transcribe(list(clips))):
        assert one.tokens == other.tokens
    line = {"text": "das Wetter", "source_lang": "es", "target_lang": "es"}
    ids, n_prompt = load_saved(model, tmp_path).decoder_ids(line)
    assert all(id >= 363 for id in ids[n_prompt:-1])
    if steps:
        recipe = recipe_of(
            case,
            tmp_path,
            model={"init_from": archive, "tokenizer": added},
            retain={"new_rows_steps": 1},
            trainer={"max_steps": 2},
        )
        assert finetune.main([str(recipe)]) == 0
        assert load_model(tmp_path / "run" / "best").config.aed.vocab_size == 424
    assert lengths is not None


def test_tokenizers_of_another_kind(tmp_path):
    cases = [load_case(name).folder / "model.nemo" for name in CASES[:2]]
    agg, unified = (ModelRecipe(init_from=str(path)) for path in cases)
    import dataclasses

    for recipe, tokenizer, reason in (
        (agg, "some.model", "expected {language: path}"),
        (unified, {"es": "some.model"}, "expected one path"),
        (unified, spanish(tmp_path), "has no piece <|startoftranscript|>"),
    ):
        with pytest.raises(ValueError, match=reason.replace("{", r"\{").replace("|", r"\|")):
            build_model(dataclasses.replace(recipe, tokenizer=tokenizer), LossRecipe(), 0)


def test_a_recipe_is_compared_and_measured(tmp_path, capsys):
    """training.compare knows the loss and the languages of an aggregate tokenizer; find_batch the
    decoder's memory."""
    case = load_case("canary_flash_agg")
    loss = {"mask_prompt": True, "label_smoothing": 0.1}
    recipe = recipe_of(case, tmp_path, loss=loss, data={"batch_duration_s": "auto"})
    assert compare.main([str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "0.000% of characters unknown" in said
    assert "label_smoothing 0.0, of prompt and text" in said
    assert "label_smoothing 0.1, of the text" in said
    assert find_batch.main([str(recipe)]) == 0
