"""Training of models that are told a language behind their encoder, beside NeMo's own steps
(golden/record_prompts.py)."""

import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import golden, load_case, logged
from safetensors.torch import load_file

from converters.merge_tokenizers import merge_tokenizers
from converters.train_tokenizer import train_tokenizer
from fastconformer import load_model
from fastconformer.checkpoint.nemo_archive import read_nemo, write_nemo
from fastconformer.surgery.language import with_languages
from training.data.batching import Draw
from training.data.sources import load_data
from training.data.store import AudioStore, Batch
from training.data.utterances import Utterance
from training.finetune import main
from training.objective.objective import batch_loss, objective_of
from training.recipe.data_sections import AugmentRecipe, DataRecipe, SpecAugmentRecipe
from training.recipe.sections import LossRecipe

FOLDER = golden("stream_chunked_hybrid_rnnt")
EXPECTED = json.loads((FOLDER / "prompts.json").read_text())
CASE = load_case(FOLDER)
NAMES = {index: name for name, index in EXPECTED["model_defaults"]["prompt_dictionary"].items()}


def write(path, **defaults):
    checkpoint = read_nemo(FOLDER / "model.nemo")
    checkpoint.config |= {"target": EXPECTED["target"], "num_prompts": EXPECTED["num_prompts"]}
    checkpoint.config["model_defaults"] = EXPECTED["model_defaults"] | defaults
    kernel = load_file(FOLDER / "prompts.safetensors")
    checkpoint.state_dict |= {k: v for k, v in kernel.items() if k != "encoded"}
    write_nemo(path, checkpoint)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write(tmp_path_factory.mktemp("prompts") / "prompted.nemo")


@pytest.fixture
def manifest(tmp_path):
    """Three clips that say their languages, one of which the model does not know."""
    audio, lengths = CASE.tensors["audio"], CASE.tensors["audio_len"].tolist()
    lines = []
    for i, lang in enumerate(("de-DE", "en", "xx")):
        clip = audio[i, : lengths[i]].numpy()
        soundfile.write(tmp_path / f"c{i}.wav", clip, 16000, subtype="FLOAT")
        line = {"audio_filepath": f"c{i}.wav", "duration": len(clip) / 16000, "text": "yes"}
        lines.append(line | {"lang": lang})
    lines += [lines[0] | {"lang": None}, lines[0] | {"prompt_mode": "langID"}]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def utterance(**changes):
    return Utterance("c.wav", "yes", 1.0, None, "m", 1, **changes)


def test_steps_are_nemos(archive):
    model, tensors = load_model(archive), CASE.tensors
    names = ("audio", "audio_len", "targets", "targets_len")
    slots = [{"target_lang": NAMES[index]} for index in EXPECTED["mixed"]]
    lines = tuple(utterance(encoder_slots=own) for own in slots)
    batch = Batch(lines, *(tensors[name] for name in names))
    no_masks = SpecAugmentRecipe(freq_masks=0, time_masks=0)
    objective = objective_of(model, LossRecipe(eps=0.0), no_masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for expected in EXPECTED["training"]:
        optimizer.zero_grad()
        total, _ = batch_loss(model, batch, objective)
        total.backward()
        optimizer.step()
        assert float(total.detach()) == pytest.approx(expected, rel=1e-4)
    untold = Batch((), *(tensors[name] for name in names))
    assert float(batch_loss(model, untold, objective)[0]) != pytest.approx(float(total), rel=1e-3)


def test_languages_of_lines_and_how_often_they_are_said(archive, manifest, tmp_path):
    model = load_model(archive)
    data = DataRecipe(train=(str(manifest),), auto_share=0.5)
    train, _ = load_data(data, AugmentRecipe(), 7, model, model.heads, tmp_path / "dropped.jsonl")
    assert [u.encoder_slots.get("target_lang") for u in train.utterances] == [
        *("de-DE", "en", None, "de-DE")
    ]
    assert [u.auto_share for u in train.utterances] == [0.5, 0.5, 0.0, 0.0]
    dropped = json.loads((tmp_path / "dropped.jsonl").read_text())
    assert (
        dropped["reason"] == "bad_prompt" and "target_lang is 'xx', expected" in dropped["detail"]
    )
    draws = [Draw(0, epoch, number, 1.0) for epoch in range(2) for number in range(50)]
    told = [bool(train.store.batch([draw]).utterances[0].encoder_slots) for draw in draws]
    assert 30 < sum(told) < 70 and told[:50] != told[50:]
    again = [bool(train.store.batch([draw]).utterances[0].encoder_slots) for draw in draws]
    assert again == told, "of the seed and the draw alone, so that a run can go on"
    always = AudioStore([utterance(encoder_slots={"target_lang": "en"}, auto_share=1.0)], 1, 0.0)
    always._kept[0] = np.zeros(4, np.int16)
    assert not always.batch([Draw(0, 0, 3, 1.0)]).utterances[0].encoder_slots
    assert always.batch([0]).utterances[0].encoder_slots  # outside an epoch nothing is drawn
    few = load_model(write(tmp_path / "few.nemo", prompt_dictionary={"de-DE": 3, "en": 0}))
    with pytest.raises(
        ValueError, match="data.auto_share is 0.5, but this model's prompts have no"
    ):
        load_data(data, AugmentRecipe(), 7, few, few.heads)


def test_a_run_with_a_further_language(archive, manifest, tmp_path):
    recipe = {
        "output": str(tmp_path / "run"),
        "model": {"init_from": str(archive)},
        "data": {"train": [str(manifest)], "validation": {"dev": str(manifest)}, "num_workers": 0},
        "prompt": {"values": {"target_lang": {"xx": "de-DE"}}},
        "retain": {"distill_ctc": 1.0, "distill_encoder": 0.1},
        "loss": {"use_cr_ctc": True},
        "spec_augment": {"time_masks": 2, "freq_masks": 0},
        "stages": [{"trainer": {"max_steps": 1}}, {"freeze": {"modules": ["encoder"]}}],
        "trainer": {"max_steps": 2, "threads": 1, "device": "cpu", "val_every_steps": 100},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    assert main([str(path)]) == 0
    assert len(logged(tmp_path / "run" / "stage_2")) == 2
    made, before = (read_nemo(p) for p in (tmp_path / "run" / "model.nemo", archive))
    assert made.config["target"] == EXPECTED["target"]
    names = made.config["model_defaults"]["prompt_dictionary"]
    assert names == EXPECTED["model_defaults"]["prompt_dictionary"] | {"xx": 1}
    moved, was = (c.state_dict["prompt_kernel.0.weight"] for c in (made, before))
    assert moved.shape == was.shape and not torch.equal(moved, was)


def test_further_languages_start_as_asked(archive):
    model = load_model(archive)
    grown = with_languages(model, {"at-AT": "de-DE", "fr": 4, "en": 0, "de-DE": "auto"})
    assert grown.config.prompts.names == model.config.prompts.names | {"at-AT": 1, "fr": 4}
    before, after = (m.prompt_kernel[0].weight for m in (model, grown))
    first = before.shape[1] - EXPECTED["num_prompts"]
    assert torch.equal(after[:, first + 1], before[:, first + 3])
    others = [i for i in range(before.shape[1]) if i != first + 1]
    assert torch.equal(after[:, others], before[:, others])
    for added, message in (
        ({"de-DE": 0}, "is 0, but the model has it at 3"),
        ({"fr": "it"}, "is 'it', expected a place or one of auto"),
        ({"fr": 6}, "prompt_dictionary.fr is 6, expected 0 to 5"),
        ({f"l{i}": "en" for i in range(4)}, "all 6 places are taken"),
    ):
        with pytest.raises(ValueError, match=message):
            with_languages(model, added)


def test_keys_of_a_prompt_that_a_model_lacks(archive, manifest):
    plain, told = load_model(golden("ctc_bpe") / "model.nemo"), load_model(archive)
    for model, keys, message in (
        (plain, {"prompt": {"pnc": "yes"}}, r"data.prompt.pnc: this model's prompt .* \(none\)"),
        (told, {"prompt": {"pnc": "yes"}}, r"no such slot \(target_lang\)"),
        (plain, {"auto_share": 0.9}, "auto_share: this model is told no language"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(DataRecipe((str(manifest),), **keys), AugmentRecipe(), 7, model, model.heads)


def test_a_vocabulary_that_grows(archive, manifest, tmp_path):
    """Proven on each line's own language before the first step."""
    tokenizer, own = tmp_path / "tokenizer.model", read_nemo(archive).tokenizer_files
    greek = train_tokenizer(["καλημέρα κόσμε", "ναι ή όχι", "καλό βράδυ σε όλους"], 40)
    tokenizer.write_bytes(merge_tokenizers(own["tokenizer.model"], greek)[0])
    recipe = {
        "output": str(tmp_path / "run"),
        "model": {"init_from": str(archive), "tokenizer": str(tokenizer)},
        "data": {"train": [str(manifest)], "auto_share": 0.0, "num_workers": 0},
        "trainer": {"max_steps": 1, "threads": 1, "device": "cpu"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    assert main([str(path)]) == 0
    model, before = load_model(tmp_path / "run" / "model.nemo"), load_model(archive)
    assert model.config.prompts.names == before.config.prompts.names
    assert model.tokenizer.decode(model.tokenizer.encode("yes ναι")) == "yes ναι"
    assert model.tokenizer.vocab_size > before.tokenizer.vocab_size
    assert main([str(path), "model.tokenizer=null", "model.labels=[a, b]"]) == 1
