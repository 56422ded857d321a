"""Text <-> token ids: SentencePiece models and character vocabularies."""

import re
import unicodedata

import sentencepiece

from .sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED, SentencePieceModel


class Tokenizer:
    """Common to both kinds: `pieces` (list of str), `vocab_size`, `unk_id` (None: cannot occur)."""

    def __init__(self, pieces: list[str], unk_id: int | None):
        self.pieces, self.vocab_size, self.unk_id = pieces, len(pieces), unk_id
        # the marks that are glued to the word before them, as NeMo finds them
        special = re.compile(r"^\[.*\]$|^<.*>$|^##|^▁|^\s*$")
        self.punctuation = {
            char
            for piece in pieces
            if not special.match(piece)
            for char in piece
            if unicodedata.category(char).startswith("P")
        }
        marks = "|".join(re.escape(mark) for mark in sorted(self.punctuation))
        self._space_before_mark = re.compile(rf"\s({marks})") if marks else None

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, without a space before punctuation marks (as NeMo's decoders give it)."""
        text = self.join([self.pieces[i] for i in ids])
        return self._space_before_mark.sub(r"\1", text) if self._space_before_mark else text

    def ids_to_pieces(self, ids: list[int]) -> list[str]:
        return [self.pieces[i] for i in ids]


class SentencePieceTokenizer(Tokenizer):
    kind = "bpe"

    def __init__(self, model: bytes):
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"the tokenizer is not a SentencePiece model: {error}") from None
        n = self.processor.get_piece_size()
        super().__init__([self.processor.id_to_piece(i) for i in range(n)], self.processor.unk_id())

    def encode(self, text: str) -> list[int]:
        return self.processor.encode_as_ids(text)

    def join(self, pieces: list[str]) -> str:
        return self.processor.decode_pieces(pieces)

    def starts_word(self, piece: str, text: str) -> bool:
        return piece != text


class CharTokenizer(Tokenizer):
    """One token a character; characters outside the vocabulary are dropped, as in NeMo."""

    kind = "char"

    def __init__(self, labels: list[str]):
        super().__init__(list(labels), None)
        self.ids = {label: i for i, label in enumerate(labels)}

    def encode(self, text: str) -> list[int]:
        return [self.ids[char] for char in text if char in self.ids]

    def join(self, pieces: list[str]) -> str:
        return "".join(pieces)

    def starts_word(self, piece: str, text: str) -> bool:
        return False


def sentencepiece_files(model: bytes) -> dict[str, bytes]:
    """The three files that a NeMo archive keeps of a SentencePiece model, by name: the model, its
    pieces with scores, and a BERT-like list ("##" where no word starts; without unknown, control
    and user-defined pieces; "▁" alone stays, where older NeMo versions wrote an empty line).
    Source: NeMo's create_spt_model. ValueError: not a SentencePiece model."""
    tokenizer = SentencePieceTokenizer(model)
    pieces, score = tokenizer.pieces, tokenizer.processor.get_score
    scores = [f"{piece}\t{score(i):g}\n" for i, piece in enumerate(pieces)]
    words = [
        (piece.text[1:] or piece.text) if piece.text.startswith("▁") else f"##{piece.text}"
        for piece in SentencePieceModel.from_bytes(model).pieces
        if piece.type not in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return {
        "tokenizer.model": model,
        "tokenizer.vocab": "".join(scores).encode(),
        "vocab.txt": "".join(f"{word}\n" for word in words).encode(),
    }


def load_tokenizer(config: dict, files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer that NeMo's config names, its files given by name.

    Raises:
        ValueError: an unsupported type, a missing file, or a config that names no vocabulary.
    """
    section = config.get("tokenizer")
    if not section:
        labels = (
            (config.get("joint") or {}).get("vocabulary")
            or config.get("labels")
            or (config.get("decoder") or {}).get("vocabulary")
        )
        if not labels:
            raise ValueError("the config names neither a tokenizer nor character labels")
        return CharTokenizer(labels)
    kind = section.get("type", "bpe")
    if kind != "bpe":
        raise ValueError(f"tokenizer.type is {kind!r}, supported is bpe (SentencePiece)")
    name = str(section.get("model_path") or "").removeprefix("nemo:")
    if name not in files:
        raise ValueError(f"tokenizer.model_path names {name!r}, which is not among {sorted(files)}")
    return SentencePieceTokenizer(files[name])
