"""Merging tokenizers: against the recorded merge, and on English with French, Russian and Arabic
prompts of real recordings."""

import contextlib
import io
import json
import math
import random
import unicodedata

import pytest
import sentencepiece
from conftest import golden, speech
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import merge_tokenizers as command
from converters import train_tokenizer as train_command
from converters.merge_tokenizers import merge_tokenizers
from converters.train_tokenizer import extend_tokenizer, read_texts, train_tokenizer
from fastconformer.surgery.pieces import CharacterModel
from fastconformer.text.sentencepiece_model import (
    BYTE,
    CONTROL,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
)
from fastconformer.text.tokenizer import sentencepiece_files


def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def pieces(model: bytes) -> list[str]:
    return [piece.text for piece in SentencePieceModel.from_bytes(model).pieces]


def prompts(lang: str, *splits: str) -> list[str]:
    folder = speech("asterisk_prompts")
    lines = [
        json.loads(line)
        for split in splits
        for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [line["text"] for line in lines if line["lang"] == lang]


def train(texts: list[str], size: int, kind: str, **options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=size,
        model_type=kind,
        character_coverage=1.0,
        minloglevel=2,
        **{"bos_id": -1, "eos_id": -1, **options},
    )
    return model.getvalue()


# --- the file format ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["old", "aux", "merged"])
def test_reading_and_writing_a_model_changes_no_byte(name):
    data = (golden("vocab_expansion") / "tokenizers" / name / "tokenizer.model").read_bytes()
    model = SentencePieceModel.from_bytes(data)
    assert model.to_bytes() == data and model.kind == "bpe"
    reference = processor(data)
    assert pieces(data) == [reference.id_to_piece(i) for i in range(reference.get_piece_size())]


@given(st.binary(max_size=60))
def test_bytes_that_are_no_model_are_refused_or_read(data):
    with contextlib.suppress(ValueError):
        SentencePieceModel.from_bytes(data)


def test_the_word_list_is_nemos():
    folder = golden("vocab_expansion") / "tokenizers"
    for name in ("old", "aux"):
        model = (folder / name / "tokenizer.model").read_bytes()
        expected = (folder / name / "vocab.txt").read_text(encoding="utf-8").split("\n")
        # the published tokenizer comes from a NeMo that left the line of "▁" empty
        expected = [word or "▁" for word in expected[:-1]]
        assert sentencepiece_files(model)["vocab.txt"].decode().split("\n")[:-1] == expected
        vocab = (folder / name / "tokenizer.vocab").read_bytes()
        assert sentencepiece_files(model)["tokenizer.vocab"] == vocab
    options = dict(user_defined_symbols=["<|hi|>"], control_symbols=["<c>"], bos_id=1, eos_id=2)
    model = train(["a b c d e f"] * 4, 14, "bpe", **options)
    words = sentencepiece_files(model)["vocab.txt"].decode().split("\n")[:-1]
    assert not {"<|hi|>", "##<|hi|>", "##<c>", "##<s>", "##</s>"} & set(words)
    assert len(words) == 14 - 5


# --- merging ------------------------------------------------------------------------------------


def test_the_recorded_merge():
    folder = golden("vocab_expansion")
    old, aux, reference = (
        (folder / "tokenizers" / name / "tokenizer.model").read_bytes()
        for name in ("old", "aux", "merged")
    )
    merged, report = merge_tokenizers(old, aux)
    assert pieces(merged) == pieces(reference)
    assert report["overlap"] == 1 and report["new"] == 254
    expected = json.loads((folder / "expected.json").read_text())["tokenizers"]["merged"]
    assert len(expected["rows"]) == 24
    for row in expected["rows"]:
        assert processor(merged).encode(row["text"]) == row["ids"]
        assert processor(merged).decode(row["ids"]) == row["decoded"]
    # the circulating script takes B's; A's is what A's pieces were made for
    model, a = SentencePieceModel.from_bytes(merged), SentencePieceModel.from_bytes(old)
    assert (model.normalizer_bytes, model.trainer_bytes) == (a.normalizer_bytes, a.trainer_bytes)


def share_of_new(a: bytes, merged: bytes, lines: list[str]) -> float:
    ids = [i for line in processor(merged).encode(lines) for i in line]
    return sum(i >= len(pieces(a)) for i in ids) / len(ids)


def changed_lines(a: bytes, merged: bytes, lines: list[str]) -> int:
    before, after = processor(a).encode(lines), processor(merged).encode(lines)
    return sum(x != y for x, y in zip(before, after, strict=True))


# least share of new pieces on unseen text: the circulating rules reach 6 % (Unigram)
@pytest.mark.parametrize("kind, least", [("bpe", 0.13), ("unigram", 0.10)])
def test_a_shared_script_keeps_the_old_segmentation_and_uses_new_pieces(kind, least):
    english, french = prompts("en", "train", "dev", "test"), prompts("fr", "train")
    unseen_french = prompts("fr", "dev", "test")
    n_changed = n_unseen = 0
    shares = []
    for seed in range(2):
        random.Random(seed).shuffle(english)
        seen, unseen = english[:342], english[342:]
        a, b = train_tokenizer(seen, 400, kind), train_tokenizer(french, 200, kind)
        merged, report = merge_tokenizers(a, b, seen, french)
        assert pieces(merged)[:400] == pieces(a)
        assert pieces(merged)[400:] == [p for p in pieces(b) if p not in set(pieces(a))]
        n_changed += changed_lines(a, merged, unseen)
        n_unseen += len(unseen)
        shares.append(share_of_new(a, merged, unseen_french))
        found = report["new_language"]
        assert found["merged"]["tokens_per_word"] < found["A"]["tokens_per_word"]
        assert found["merged"]["unknown_rate"] == 0 < found["A"]["unknown_rate"]
    assert n_changed <= 0.02 * n_unseen
    assert sum(shares) / 2 >= least, shares


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("old_text", [True, False])
def test_another_script_is_used_whole(kind, old_text):
    english, russian = prompts("en", "train"), prompts("ru", "train")
    a, b = train_tokenizer(english, 400, kind), train_tokenizer(russian, 300, kind)
    texts = (english, russian) if old_text else ()
    merged, report = merge_tokenizers(a, b, *texts)
    assert changed_lines(a, merged, prompts("en", "dev", "test")) == 0
    unseen = prompts("ru", "dev", "test")
    assert share_of_new(a, merged, unseen) > 0.85
    per_b = sum(map(len, processor(b).encode(unseen)))
    assert sum(map(len, processor(merged).encode(unseen))) < 1.1 * per_b
    assert ("%" in report["old_language"]["segmentation_changed"]) if not old_text else True


@pytest.mark.parametrize("kinds", [("bpe", "unigram"), ("unigram", "bpe"), ("unigram", "char")])
def test_mixed_types(kinds):
    english, french = prompts("en", "train"), prompts("fr", "train")
    a = train(english, 300, kinds[0])
    b = train(french, 60 if kinds[1] == "char" else 150, kinds[1], hard_vocab_limit=False)
    merged, report = merge_tokenizers(a, b, english, french)
    assert report["types"]["merged"] == kinds[0]
    assert pieces(merged)[:300] == pieces(a)
    assert changed_lines(a, merged, prompts("en", "test")) <= 1
    assert report["new_language"]["merged"]["new_piece_share"] > 0.03


def test_without_text_nothing_that_a_can_write_changes():
    english, french = prompts("en", "train"), prompts("fr", "train")
    for kind in ("bpe", "unigram"):
        a, b = train_tokenizer(english, 300, kind), train_tokenizer(french, 200, kind)
        merged, report = merge_tokenizers(a, b)
        assert changed_lines(a, merged, english + prompts("en", "dev", "test")) == 0
        assert share_of_new(a, merged, french) > 0.03
        assert report["old_language"]["segmentation_changed"].startswith("0 %")


def train_largest(lines: list[str], kind: str) -> bytes:
    if kind == "unigram":
        return train(lines, 40, kind, hard_vocab_limit=False)
    for size in range(20, 2, -1):  # few letters give few pairs to merge
        with contextlib.suppress(RuntimeError):
            return train(lines, size, kind)
    raise AssertionError(lines)


words = st.lists(st.text("abcdé", min_size=1, max_size=6), min_size=1, max_size=5)
texts = st.lists(words.map(" ".join), min_size=12, max_size=40)


@settings(max_examples=15, deadline=None)
@given(texts, texts, st.sampled_from(["bpe", "unigram"]), st.booleans())
def test_any_pair_keeps_the_old_ids_and_merges_once(old, new, kind, with_text):
    old = [line.replace("é", "") + " ab" for line in old]
    new = [line + " éa" for line in new]
    a, b = (train_largest(lines, kind) for lines in (old, new))
    given_texts = (old, new) if with_text else ()
    merged, _ = merge_tokenizers(a, b, *given_texts)
    assert pieces(merged)[: len(pieces(a))] == pieces(a)
    assert len(set(pieces(merged))) == len(pieces(merged))
    assert set(pieces(merged)) == set(pieces(a)) | set(pieces(b))
    assert merge_tokenizers(a, b, *given_texts)[0] == merged
    with pytest.raises(ValueError, match="changes nothing"):
        merge_tokenizers(merged, b, *given_texts)
    if not with_text:
        assert changed_lines(a, merged, old) == 0


def test_special_pieces():
    english, french = prompts("en", "train"), prompts("fr", "train")
    a = train(english, 200, "bpe", user_defined_symbols=["<|en|>"], bos_id=1, eos_id=2)
    options = dict(user_defined_symbols=["<|fr|>", "vous"], control_symbols=["<task>"],
                   bos_id=1, eos_id=2, unk_piece="[UNK]", unk_surface="?")  # fmt: skip
    b = train(french, 200, "bpe", **options)
    merged, report = merge_tokenizers(a, b, english, french)
    model = SentencePieceModel.from_bytes(merged)
    types = {piece.text: piece.type for piece in model.pieces}
    assert types["<|en|>"] == types["<|fr|>"] == types["vous"] == USER_DEFINED
    assert types["<task>"] == CONTROL and "[UNK]" not in types
    assert report["left_out_of_B"] == {"[UNK]": "unknown"}
    assert processor(merged).unk_id() == processor(a).unk_id()
    assert processor(merged).encode("<|fr|> vous", out_type=str)[-1] == "vous"
    # where A's own text holds the symbol, it competes like any other piece
    merged, _ = merge_tokenizers(a, b, [*english, *["rendez vous"] * 20], french)
    types = {p.text: p.type for p in SentencePieceModel.from_bytes(merged).pieces}
    assert types["vous"] == UNUSED and types["<|fr|>"] == USER_DEFINED


def test_byte_fallback():
    english, russian = prompts("en", "train"), prompts("ru", "train")
    with_bytes = train(english, 600, "bpe", byte_fallback=True)
    plain = train(russian, 200, "bpe")
    merged, report = merge_tokenizers(with_bytes, plain, english, russian)
    assert pieces(merged)[:600] == pieces(with_bytes)
    assert processor(merged).decode(processor(merged).encode("漢 привет")) == "漢 привет"
    found = report["new_language"]
    assert found["merged"]["tokens_per_word"] < 0.5 * found["A"]["tokens_per_word"]
    # A without bytes takes none of B's: its trainer spec, which stays, has none
    a, b = train(english, 200, "bpe"), train(russian, 500, "bpe", byte_fallback=True)
    merged, report = merge_tokenizers(a, b)
    assert BYTE not in {p.type for p in SentencePieceModel.from_bytes(merged).pieces}
    assert list(report["left_out_of_B"].values()).count("byte") == 256
    assert "byte" in command.describe(report)


def test_rules_that_differ_are_told():
    english = prompts("en", "train")
    french = [line.title() for line in prompts("fr", "train")]
    a = train(english, 200, "bpe", normalization_rule_name="nmt_nfkc_cf")
    b = train(french, 200, "bpe")
    merged, report = merge_tokenizers(a, b, english, french)
    assert processor(merged).encode("PRESS ONE") == processor(a).encode("press one")
    rules = report["normalisation"]
    assert "name" in rules["differing"] and rules["pieces_that_A_never_makes"] > 20
    assert rules["new_lines_written_otherwise"] == len(french)
    assert "nmt_nfkc_cf" in command.describe(report)


def test_what_cannot_be_merged_is_refused(tmp_path, capsys):
    english, french = prompts("en", "train"), prompts("fr", "train")
    bpe = train_tokenizer(english, 100, "bpe")
    char, word = train(english, 40, "char", hard_vocab_limit=False), train(french, 90, "word")
    with pytest.raises(ValueError, match="--extend"):
        merge_tokenizers(char, bpe)
    with pytest.raises(ValueError, match="B is a word model"):
        merge_tokenizers(bpe, word)
    with pytest.raises(ValueError, match="changes nothing"):
        merge_tokenizers(bpe, bpe)
    # nothing but A's characters, and no text to choose by
    other = train_tokenizer([line.replace("e", "") for line in english], 90, "bpe")
    with pytest.raises(ValueError, match="give --old-text"):
        merge_tokenizers(bpe, other)
    (tmp_path / "a.model").write_bytes(bpe)
    (tmp_path / "b.model").write_bytes(b"not a model")
    arguments = [str(tmp_path / "a.model"), str(tmp_path / "b.model"), "-o", str(tmp_path / "out")]
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "B is not a SentencePiece model" in error
    assert not (tmp_path / "out").exists()


def test_texts_of_files(tmp_path):
    """Lines of a manifest end where JSON's do, wherever Unicode would break a line."""
    texts = ["one\u2028two", "three\x85four", "five"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    manifest, plain = tmp_path / "a.jsonl", tmp_path / "a.txt"
    manifest.write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
    assert read_texts(manifest) == texts
    plain.write_text("one\ntwo\n")
    assert read_texts(plain) == ["one", "two"]
    for content, words in ((b'{"text": null}', "a.jsonl:1: not a JSON line"), (b"\xff", "UTF-8")):
        manifest.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_texts(manifest)


def test_the_command_writes_what_nemo_reads(tmp_path, capsys):
    for name, lang in (("a", "en"), ("b", "ru")):
        lines = prompts(lang, "train")
        (tmp_path / f"{name}.model").write_bytes(train_tokenizer(lines, 200))
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    names = ("a.model", "b.model", "-o", "out", "--old-text", "a.txt", "--new-text", "b.txt")
    arguments = [name if name.startswith("-") else str(tmp_path / name) for name in names]
    assert command.main(arguments) == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert written.keys() == {"tokenizer.model", "tokenizer.vocab", "vocab.txt", "report.json"}
    report = json.loads(written["report.json"])
    assert report["old_language"]["segmentation_changed"] <= 0.02
    assert "tokens per word" in capsys.readouterr().out
    assert command.main(arguments) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == written


@pytest.mark.parametrize("kind", ["bpe", pytest.param("unigram", marks=pytest.mark.slow)])
def test_large_vocabularies(kind):
    """8192 + 8192 pieces; words of random syllables stand for two languages of one script."""
    rng = random.Random(1)

    def language(syllables):
        vocabulary = ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(9000)]
        return [" ".join(rng.choices(vocabulary, k=12)) for _ in range(2500)]

    parts = [x + y for x in "bcdfghjklmnprstvwz" for y in ("a", "e", "i", "o", "u", "an", "er")]
    old, new = language(parts[:90]), language([*parts[60:], "né", "çu", "ôt"])
    a = train(old, 8192, kind, hard_vocab_limit=False)
    b = train(new, 8192, kind, hard_vocab_limit=False)
    merged, report = merge_tokenizers(a, b, old[:2000], new[:500])
    assert pieces(merged)[: len(pieces(a))] == pieces(a)
    assert changed_lines(a, merged, old[2000:]) <= 0.02 * 500
    assert report["new_language"]["merged"]["new_piece_share"] > 0.3


def test_character_model():
    model = CharacterModel({"▁the": 50, "▁then": 5, "▁cat": 5})
    assert model.expected("▁the") > 40 and model.expected("th") > 40
    assert model.expected("he") > model.expected("ca") > model.expected("xq")
    assert math.isclose(sum(model.counts[1].values()), model.total)


# --- characters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_extension_by_characters(kind, tmp_path, capsys):
    english, french = prompts("en", "train"), prompts("fr", "train")
    model = train_tokenizer(english, 200, kind)
    extended, characters = extend_tokenizer(model, french)
    assert set(characters) == {c for line in french for c in line} - set("".join(english))
    assert pieces(extended) == pieces(model) + characters
    assert changed_lines(model, extended, english + prompts("en", "dev", "test")) == 0
    unseen = prompts("fr", "dev", "test")
    decoded = [processor(extended).decode(processor(extended).encode(line)) for line in unseen]
    assert decoded == [" ".join(line.split()) for line in unseen]
    with pytest.raises(ValueError, match="nothing to add"):
        extend_tokenizer(extended, french)
    (tmp_path / "a.model").write_bytes(model)
    (tmp_path / "fr.txt").write_text("\n".join(french), encoding="utf-8")
    arguments = [str(tmp_path / "fr.txt"), "-o", str(tmp_path / "out")]
    assert train_command.main([*arguments, "--extend", str(tmp_path / "a.model")]) == 0
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == extended
    with pytest.raises(SystemExit) as usage:
        train_command.main(arguments)
    assert usage.value.code == 2


def test_arabic_with_diacritics():
    english = prompts("en", "train")
    folder = speech("arabic_commands")
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    arabic = sorted({json.loads(line)["text_diacritized"] for line in lines})
    a, b = train_tokenizer(english, 200), train_tokenizer(arabic, 60)
    merged, report = merge_tokenizers(a, b, english, arabic)
    assert changed_lines(a, merged, english) == 0
    ids = processor(merged).encode(arabic)
    normal = [unicodedata.normalize("NFKC", text) for text in arabic]
    assert [processor(merged).decode(line) for line in ids] == normal
    assert report["new_language"]["merged"]["unknown_rate"] == 0
    assert any(char in "".join(normal) for char in "\u064e\u0650\u0651")
