"""With a vocabulary that grew, lines of the old language are written as they were before it."""

import dataclasses
import itertools
import json

import pytest
import soundfile
import torch
from conftest import golden

from fastconformer import load_model
from fastconformer.surgery.vocabulary import change_vocabulary
from fastconformer.text.sentencepiece_model import Piece, SentencePieceModel
from fastconformer.text.tokenizer import SentencePieceTokenizer
from training.data.old_language import old_language
from training.recipe.recipe import recipe_from_dict, stage_recipes
from training.setup.prepare import prepare_run
from training.setup.start import read_tokenizer

START = golden("hybrid_tdt_ctc_bpe") / "model.nemo"
ENGLISH, MIXED = "turn off the lights", "turn ж off"


@pytest.fixture(scope="module")
def greedy(tmp_path_factory):
    """A merge that changes how old lines are written: a new piece that always wins."""
    model = load_model(START)
    old = SentencePieceModel.from_bytes(model.tokenizer_files["tokenizer.model"])
    pieces = [model.tokenizer.pieces[i] for i in model.tokenizer.encode(ENGLISH)]
    pairs = itertools.pairwise(pieces)
    joined = next(first + second for first, second in pairs if not second.startswith("▁"))
    extra = [Piece(text, 100.0) for text in (joined, "ж")]
    merged = dataclasses.replace(old, pieces=(*old.pieces, *extra), rest=b"")
    folder = tmp_path_factory.mktemp("merged")
    (folder / "tokenizer.model").write_bytes(merged.to_bytes())
    return folder


def recipe_of(folder, greedy, sources=None, **retain):
    rows = [(ENGLISH, "en"), (ENGLISH, "ru"), (MIXED, "en"), (ENGLISH, None)]
    soundfile.write(folder / "a.wav", torch.randn(32000).numpy() * 0.1, 16000)
    with open(folder / "m.jsonl", "w", encoding="utf-8") as file:
        for text, lang in rows:
            line = {"audio_filepath": "a.wav", "duration": 2.0, "text": text}
            file.write(json.dumps(line | ({"lang": lang} if lang else {})) + "\n")
    train = sources or [str(folder / "m.jsonl")]
    return recipe_from_dict(
        {
            "output": str(folder / "run"),
            "model": {"init_from": str(START), "tokenizer": str(greedy)},
            "data": {"train": train},
            "retain": {"check_clips": 0} | retain,
            "trainer": {"max_steps": 1, "device": "cpu"},
        }
    )


def written(recipe) -> list[list[int]]:
    return [list(utterance.tokens) for utterance in prepare_run(recipe).train.utterances]


def test_lines_of_the_old_language_keep_their_ids(tmp_path, greedy, caplog):
    old = SentencePieceTokenizer(load_model(START).tokenizer_files["tokenizer.model"])
    whole = SentencePieceTokenizer((greedy / "tokenizer.model").read_bytes())
    before, after = old.encode(ENGLISH), whole.encode(ENGLISH)
    assert before != after
    # mixed: what the old pieces cannot write is written with the whole vocabulary
    with caplog.at_level("INFO", logger="finetune"):
        found = written(recipe_of(tmp_path, greedy, lang="en"))
    assert found == [before, after, whole.encode(MIXED), after]
    assert "2 lines are written with the pieces of before" in caplog.text
    assert "would write 50.0 % of 2 otherwise" in caplog.text
    assert written(recipe_of(tmp_path, greedy)) == [after, after, whole.encode(MIXED), after]


def test_a_source_says_it_for_all_its_lines(tmp_path, greedy):
    manifest = str(tmp_path / "m.jsonl")
    old, whole = [{"manifest": manifest, "pieces": name} for name in ("old", "all")]
    [before, *_] = written(recipe_of(tmp_path, greedy, lang="en"))
    found = written(recipe_of(tmp_path, greedy, [old]))
    assert found[:2] == [before, before] and found[3] == before
    found = written(recipe_of(tmp_path, greedy, [whole], lang="en"))
    assert before not in found
    # the language of lines that say none
    found = written(recipe_of(tmp_path, greedy, [{"manifest": manifest, "lang": "en"}], lang="en"))
    assert found[-1] == before


def test_later_stages_know_the_vocabulary_from_before(tmp_path, greedy):
    recipe = recipe_of(tmp_path, greedy, lang="en")
    tree = {"stages": ({"trainer": {"max_steps": 1}}, {"trainer": {"max_steps": 2}})}
    first, second = stage_recipes(dataclasses.replace(recipe, **tree))
    assert first.retain.tokenizer is None and second.retain.tokenizer == str(START)
    grown = load_model(START)
    # a model that has grown, as the second stage starts from one
    model, _ = change_vocabulary(grown, *read_tokenizer(str(greedy)))
    model.save(tmp_path / "grown")
    start = dataclasses.replace(second.model, init_from=str(tmp_path / "grown"))
    [before, after, *_] = written(dataclasses.replace(second, model=start))
    assert (
        before
        != after
        == SentencePieceTokenizer((greedy / "tokenizer.model").read_bytes()).encode(ENGLISH)
    )


def test_what_did_not_grow_is_told(tmp_path, greedy):
    whole = SentencePieceTokenizer((greedy / "tokenizer.model").read_bytes())
    old = load_model(START).tokenizer
    assert old_language(old, old, "en") is None and old_language(whole, old, "en") is None
    manifest = str(tmp_path / "m.jsonl")
    recipe = recipe_of(tmp_path, greedy, [{"manifest": manifest, "pieces": "old"}])
    plain = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, tokenizer=None))
    with pytest.raises(ValueError, match="has pieces old, but no vocabulary that grew is known"):
        prepare_run(plain)
    named = dataclasses.replace(recipe.retain, tokenizer=str(greedy))
    with pytest.raises(ValueError, match="the model's vocabulary is not that one with pieces"):
        prepare_run(dataclasses.replace(plain, retain=named))
