"""Keeping what a model knows: the terms against their formulas, the stages in a run."""

import copy
import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import golden
from safetensors.torch import load_file

from converters.merge_tokenizers import merge_tokenizers
from converters.train_tokenizer import train_tokenizer
from fastconformer import load_model
from fastconformer.checkpoint.read import read_checkpoint
from fastconformer.surgery.vocabulary import Change, change_vocabulary
from fastconformer.text.tokenizer import SentencePieceTokenizer, sentencepiece_files
from training.data.store import Batch
from training.data.utterances import Utterance
from training.finetune import main
from training.objective.objective import Objective
from training.objective.retain import Retain, ctc_distillation, encoder_distillation, row_tensors
from training.recipe.sections import RetainRecipe


def test_ctc_distillation_is_the_divergence_over_old_tokens():
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    student = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    lengths = torch.tensor([5, 3])
    change = Change((2, None, 0, 1), 3)  # the new order; old blank is 3, the new one 4
    expected = torch.zeros(2, dtype=torch.float64)
    for clip, length in enumerate(lengths.tolist()):
        for frame in range(length):
            for old, new in ((0, 2), (1, 3), (2, 0), (3, 4)):
                p = teacher[clip, frame, old]
                expected[clip] += p.exp() * (p - student[clip, frame, new]) / length
    torch.testing.assert_close(ctc_distillation(teacher, student, lengths, change), expected)
    same = ctc_distillation(teacher, teacher, lengths, Change((0, 1, 2), 3))
    torch.testing.assert_close(same, torch.zeros(2, dtype=torch.float64))
    # a smaller vocabulary: the teacher's distribution over what is left
    smaller = student[..., :3].log_softmax(-1)
    change = Change((1, 0), 3)
    left = teacher[..., [1, 0, 3]].log_softmax(-1)
    divergence = (left.exp() * (left - smaller)).sum(-1)
    expected = torch.stack([divergence[0].mean(), divergence[1, :3].mean()])
    torch.testing.assert_close(ctc_distillation(teacher, smaller, lengths, change), expected)


def test_encoder_distillation_is_a_share_of_the_variance():
    teacher = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([6, 4])
    assert not encoder_distillation(teacher, teacher, lengths).any()
    means = torch.stack([teacher[0].mean(0), teacher[1, :4].mean(0)])
    constant = means[:, None].expand_as(teacher)
    torch.testing.assert_close(encoder_distillation(teacher, constant, lengths), torch.ones(2))
    other = teacher.clone()
    other[1, 4:] += 100  # beyond the length
    assert not encoder_distillation(teacher, other, lengths).any()


def changed_model():
    original = load_model(golden("train_parity") / "model.nemo")
    b = train_tokenizer(["привет мир", "все свои", "где дом"], 30)
    merged, _ = merge_tokenizers(original.tokenizer_files["tokenizer.model"], b)
    model = copy.deepcopy(original)
    model, change = change_vocabulary(
        model, SentencePieceTokenizer(merged), sentencepiece_files(merged), seed=1
    )
    return original, model, change


def test_only_clips_of_the_old_language_are_distilled():
    original, model, change = changed_model()
    recipe = RetainRecipe(lang="en", distill_ctc=0.5, distill_encoder=2.0)
    retain = Retain(model, original, change, recipe)
    features = torch.randn(2, model.config.preprocessor.n_features, 80)
    lengths = torch.tensor([60, 80])
    encoded, encoded_lengths = model.encode(features, lengths)

    def losses(*languages, states=encoded):
        clips = tuple(
            Utterance("a", "", 1.0, None, "m", i, lang=lang) for i, lang in enumerate(languages)
        )
        empty = torch.zeros(2, 0)
        batch = Batch(clips, empty, lengths, empty, lengths)
        return retain.distances(features, lengths, states, batch)

    assert all(not term.any() for term in losses("hi", "hi").values())
    terms = losses("en", "hi")
    assert terms["distill_encoder"].max() < 1e-6  # nothing has been learnt yet
    # new tokens take little of the old ones' probability
    assert 0 < terms["distill_ctc"][0] < 0.2 and terms["distill_ctc"][1] == 0
    moved = (encoded + 0.5 * torch.randn_like(encoded)).detach().requires_grad_()
    terms = losses("en", "hi", states=moved)
    one, old = encoded[:1, : encoded_lengths[0]], moved[:1, : encoded_lengths[0]]
    expected = encoder_distillation(one, old, encoded_lengths[:1])
    torch.testing.assert_close(terms["distill_encoder"][:1], expected, rtol=1e-4, atol=1e-6)
    sum(term.sum() for term in terms.values()).backward()
    assert moved.grad[0].any() and not moved.grad[1].any()
    assert all(p.grad is None for p in original.parameters())
    objective = retain.objective(Objective(("ctc",)))
    assert objective.kept_weights == {"distill_ctc": 0.5, "distill_encoder": 2.0}
    assert Retain(model, None, change, RetainRecipe()).objective(objective) is objective


def test_l2_pulls_old_weights_and_leaves_new_rows():
    original, model, change = changed_model()
    retain = Retain(model, original, change, RetainRecipe(l2_to_start=0.1))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
            parameter.grad = torch.zeros_like(parameter)
    retain.before_update(0)
    rows = row_tensors(model)
    assert len(rows) == 5 and set(rows) <= start.keys()
    for name, parameter in model.named_parameters():
        if name not in rows:
            torch.testing.assert_close(parameter.grad, torch.full_like(parameter, 0.1))
            continue
        assert not parameter.grad[change.new].any()
        torch.testing.assert_close(
            parameter.grad[change.moved], torch.full_like(parameter[change.moved], 0.1)
        )


@pytest.fixture
def corpus(tmp_path):
    """A recipe that extends a tiny model's vocabulary, on clips of two languages."""
    folder = golden("train_parity")
    tensors = load_file(folder / "golden.safetensors")
    model = load_model(folder / "model.nemo")
    lines = []
    for audio, length in zip(tensors["batch0/audio"], tensors["batch0/audio_len"], strict=True):
        samples = (audio[:length].numpy() * 32768).astype(np.int16)
        soundfile.write(tmp_path / f"{len(lines)}.wav", samples, 16000)
        lang, text = ("en", "no") if len(lines) % 2 else ("ru", "да")
        entry = {"audio_filepath": f"{len(lines)}.wav", "duration": len(samples) / 16000}
        lines.append(json.dumps({**entry, "text": text, "lang": lang}) + "\n")
    (tmp_path / "train.jsonl").write_text("".join(lines))
    b = train_tokenizer(["да да нет нет"], 12)
    merged, _ = merge_tokenizers(model.tokenizer_files["tokenizer.model"], b)
    (tmp_path / "tokenizer").mkdir()
    for name, content in sentencepiece_files(merged).items():
        (tmp_path / "tokenizer" / name).write_bytes(content)
    recipe = {
        "output": str(tmp_path / "run"),
        "model": {
            "init_from": str(folder / "model.nemo"),
            "tokenizer": str(tmp_path / "tokenizer"),
        },
        "data": {"train": [str(tmp_path / "train.jsonl")], "batch_size": 2, "num_workers": 0},
        "retain": {"lang": "en", "new_rows_steps": 2},
        "optim": {"lr": 1e-2, "weight_decay": 0.1},
        "trainer": {"max_steps": 2, "threads": 1, "device": "cpu"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def test_the_first_stage_moves_new_rows_only(corpus, capsys):
    recipe = str(corpus / "recipe.yaml")
    assert main([recipe]) == 0
    assert "greedy outputs are unchanged" in capsys.readouterr().out
    n_old = load_model(golden("train_parity") / "model.nemo").tokenizer.vocab_size
    before = read_checkpoint(golden("train_parity") / "model.nemo").state_dict
    after = read_checkpoint(corpus / "run" / "last").state_dict
    moved = 0
    for name, value in after.items():
        if value.shape == before[name].shape:
            assert torch.equal(value, before[name]), name
        else:
            assert torch.equal(value[:n_old], before[name][:n_old]), name
            n_tail = len(before[name]) - n_old
            assert torch.equal(value[len(value) - n_tail :], before[name][n_old:]), name
            moved += 1
    assert moved == 5
    # and then everything moves
    options = ["trainer.max_steps=4", f"output={corpus / 'second'}", "retain.distill_ctc=0.5"]
    options += ["retain.distill_encoder=0.5", "retain.l2_to_start=0.01"]
    assert main([recipe, *options]) == 0
    second = read_checkpoint(corpus / "second" / "last").state_dict
    assert sum(not torch.equal(second[name], value) for name, value in after.items()) > 50
    logged = [json.loads(x) for x in (corpus / "second" / "log.jsonl").read_text().splitlines()]
    assert any("distill_ctc" in line and "distill_encoder" in line for line in logged)


def test_a_transfer_that_changes_the_output_stops_the_run(corpus, capsys, monkeypatch):
    from training.setup import prepare

    build = prepare.build_model

    def damaged(*arguments):
        model = build(*arguments)
        if arguments[0].tokenizer is not None:
            return model
        with torch.no_grad():  # the original
            embed = model.decoder.prediction["embed"].weight
            embed[:] = embed.roll(1, 0)
        return model

    monkeypatch.setattr(prepare, "build_model", damaged)
    assert main([str(corpus / "recipe.yaml")]) == 1
    assert "change of vocabulary alters" in capsys.readouterr().err
    assert not (corpus / "run" / "last").exists()


def test_recipes_that_cannot_be(corpus, capsys):
    recipe = str(corpus / "recipe.yaml")
    assert main([recipe, "model.tokenizer=null"]) == 2
    assert "retain.new_rows_steps needs new rows" in capsys.readouterr().err
    assert main([recipe, "model.transfer=both"]) == 2
    assert main([recipe, f"model.tokenizer={corpus / 'absent'}"]) == 1
    assert "absent" in capsys.readouterr().err
