"""What a trained tokenizer keeps of a script's own signs, and that no line is left out."""

import unicodedata

import pytest

from converters.train_tokenizer import main, train_tokenizer
from fastconformer.text.tokenizer import SentencePieceTokenizer

SIGNS = ["น้ำใจ งดงาม", "می\u200cخواهم بروم", "صلى ﷺ عليه", "ﬁne ½ cup", "ế 각 한국어"]


def written(normalization: str, text: str, texts=SIGNS) -> str:
    size = len(set("".join(texts))) + 40
    model = train_tokenizer(texts * 4, size, normalization=normalization)
    tokenizer = SentencePieceTokenizer(model)
    return tokenizer.decode(tokenizer.encode(text))


@pytest.mark.parametrize("text", SIGNS)
def test_normalization(text):
    assert written("identity", text) == text
    for form in ("NFC", "NFD"):  # composed, whichever way it was typed, and else as it was
        assert written("nfc", unicodedata.normalize(form, text)) == unicodedata.normalize(
            "NFC", text
        )
    assert written("nmt_nfkc", text) == written("nmt_nfkc", unicodedata.normalize("NFKC", text))


def test_the_default_is_nemos_and_folds_nothing():
    assert written("nmt_nfkc", "ﬁne ½ cup") == "fine 1⁄2 cup"
    assert written("nmt_nfkc_cf", "ABC abc", ["abc abc", *SIGNS]) == "abc abc"
    assert written("nmt_nfkc", "ABC", ["ABC abc", *SIGNS]) == "ABC"


def test_long_lines_are_learnt_from_too():
    """SentencePiece leaves out lines of more than 4,192 bytes, without a word."""
    long = " ".join(["zygote"] * 1000)
    tokenizer = SentencePieceTokenizer(train_tokenizer(["a b a b", long], 14))
    assert tokenizer.unk_id not in tokenizer.encode("zygote")


def test_the_command_takes_the_option(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(SIGNS), encoding="utf-8")
    options = ["--normalization", "identity", "--size", "60", "-o", str(tmp_path / "out")]
    assert main([str(tmp_path / "a.txt"), *options]) == 0
    model = SentencePieceTokenizer((tmp_path / "out" / "tokenizer.model").read_bytes())
    assert model.decode(model.encode(SIGNS[0])) == SIGNS[0]
