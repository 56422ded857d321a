"""Text <-> token ids: SentencePiece models and character vocabularies."""

import re
import unicodedata

import sentencepiece

from .sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED, SentencePieceModel

# Pieces by which a model says that a speaker has finished, or only confirmed. Source: NeMo 3.0's
# end-of-utterance models (audio_to_eou_label_lhotse.py, parakeet_realtime_eou).
UTTERANCE_ENDS = ("<EOU>", "<EOB>")


class Tokenizer:
    """Common to all kinds: `pieces` (list of str), `vocab_size`, `unk_id` (None: cannot occur),
    the ids of an attention decoder's marks (None: the tokenizer has none), and of the pieces that
    end an utterance and are no text."""

    utterance_ends: frozenset[int] = frozenset()
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None

    def __init__(self, pieces: list[str], unk_id: int | None):
        self.pieces, self.vocab_size, self.unk_id = pieces, len(pieces), unk_id
        self.utterance_ends = frozenset(i for i, p in enumerate(pieces) if p in UTTERANCE_ENDS)
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
        """Text of `ids`, without a space before punctuation marks (as NeMo's decoders give it).
        Ends of utterances are left out, as in NeMo where they are control pieces; as user-defined
        ones NeMo writes their names."""
        text = self.join([self.pieces[i] for i in ids if i not in self.utterance_ends])
        return self._space_before_mark.sub(r"\1", text) if self._space_before_mark else text

    def encode_word(self, word: str, is_first: bool) -> list[int]:
        """Ids of a word between others of a sentence, the space before it included where it is a
        token."""
        return self.encode(word)

    def ids_to_pieces(self, ids: list[int]) -> list[str]:
        return [self.pieces[i] for i in ids]

    def of_language(self, lang: str | None) -> "Tokenizer":
        """What encodes text in this language."""
        return self

    def n_pieces(self, text: str) -> int:
        """With how many pieces a text is written."""
        return len(self.encode(text))


class SentencePieceTokenizer(Tokenizer):
    """`first_id` is added to what it encodes: it then is a part of an AggregateTokenizer."""

    kind = "bpe"

    def __init__(self, model: bytes, first_id: int = 0):
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"the tokenizer is not a SentencePiece model: {error}") from None
        n = self.processor.get_piece_size()
        pieces = [self.processor.id_to_piece(i) for i in range(n)]
        super().__init__(pieces, first_id + self.processor.unk_id())
        self.first_id = first_id

    def encode(self, text: str) -> list[int]:
        ids = self.processor.encode_as_ids(text)
        return [self.first_id + i for i in ids] if self.first_id else ids

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

    def encode_word(self, word: str, is_first: bool) -> list[int]:
        ids = self.encode(word)
        spaces = [self.ids[label] for label in (" ", "▁") if label in self.ids]
        return ids if is_first or not ids else spaces + ids

    def join(self, pieces: list[str]) -> str:
        return "".join(pieces)

    def starts_word(self, piece: str, text: str) -> bool:
        return False


class AggregateTokenizer(Tokenizer):
    """A SentencePiece tokenizer for each of several languages, their ids one after the other, as
    multilingual checkpoints have them. To encode a text its language must be known."""

    kind = "agg"

    def __init__(self, models: dict[str, bytes]):
        self.languages, first_id = {}, 0
        for lang, model in models.items():
            self.languages[lang] = self._part(lang, model, first_id)
            first_id += self.languages[lang].vocab_size
        super().__init__([p for part in self.languages.values() for p in part.pieces], None)

    def _part(self, lang: str, model: bytes, first_id: int) -> SentencePieceTokenizer:
        return SentencePieceTokenizer(model, first_id)

    def of_language(self, lang: str | None) -> Tokenizer:
        if lang not in self.languages:
            known = ", ".join(self.languages)
            raise ValueError(
                f"lang is {lang!r}; to encode a text, this model needs its language, one of {known}"
            )
        return self.languages[lang]

    def encode(self, text: str) -> list[int]:
        return self.of_language(None).encode(text)  # raises

    def n_pieces(self, text: str) -> int:
        """In the language that needs fewest, of those that can write it."""
        parts = [(part, part.encode(text)) for part in self._text_parts()]
        able = [len(ids) for part, ids in parts if part.unk_id not in ids]
        return min(able or [len(ids) for _, ids in parts])

    def _text_parts(self) -> list[SentencePieceTokenizer]:
        return list(self.languages.values())

    def join(self, pieces: list[str]) -> str:
        # NeMo leaves a space in front (and gives this tokenizer no CTC text and no times)
        return "".join(pieces).replace("▁", " ").removeprefix(" ")

    def starts_word(self, piece: str, text: str) -> bool:
        return piece != text


BOS, EOS, PAD = "<|startoftranscript|>", "<|endoftext|>", "<pad>"  # Canary's marks
CONTEXT = "<|startofcontext|>"
SPECIAL = "spl_tokens"  # the part of an aggregate tokenizer that holds the special tokens
_SPECIAL_TOKEN = re.compile(r"<\|.*?\|>|<pad>")
_TIME_TOKEN = re.compile(r"<\|\d+\|>")
# Canary-1b names its languages otherwise than later models
_FALLBACK = {"en": "en-US", "de": "de-DE", "es": "es-ES", "fr": "fr-FR"}


def _special_tokens(tokenizer: Tokenizer, pieces: list[str]) -> dict[str, int]:
    """Special tokens by piece; gives `tokenizer` the ids of its marks and its way to decode.
    ValueError: a mark is missing."""
    tokenizer._space_before_mark = None  # NeMo's decoder of these models takes no space away
    special = {piece: i for i, piece in enumerate(pieces) if _SPECIAL_TOKEN.fullmatch(piece)}
    for name, piece in (("bos_id", BOS), ("eos_id", EOS), ("pad_id", PAD)):
        if piece not in special:
            raise ValueError(f"the tokenizer of this model has no piece {piece}")
        setattr(tokenizer, name, special[piece])
    return special


class CanaryBPETokenizer(SentencePieceTokenizer):
    """Canary's unified tokenizer: one SentencePiece model, which knows special tokens in any
    text."""

    def __init__(self, model: bytes):
        super().__init__(model)
        self.special_tokens = _special_tokens(self, self.pieces)


class _CanaryPart(SentencePieceTokenizer):
    """One language of a CanaryTokenizer: of special tokens its texts know time tokens and a last
    <|endoftext|> alone."""

    special_tokens: dict[str, int]

    def encode(self, text: str) -> list[int]:
        end = [self.special_tokens[EOS]] if text.endswith(EOS) else []
        text = text.removesuffix(EOS)
        if not _TIME_TOKEN.search(text):
            return super().encode(text) + end
        # a time token before the first word, two after each (its end, the next one's start)
        times = [self._special_id(token) for token in _TIME_TOKEN.findall(text)]
        ids, used = [], 0
        for word in _TIME_TOKEN.sub("", text).split():
            if not ids:
                ids, used = times[:1], 1
            ids += super().encode(word) + times[used : used + 2]
            used += 2
        return ids + (times[-1:] if used < len(times) else []) + end

    def _special_id(self, token: str) -> int:
        if token not in self.special_tokens:
            raise ValueError(f"{token} is not a special token of this model's tokenizer")
        return self.special_tokens[token]


class _CanarySpecial(_CanaryPart):
    """The part with the special tokens: encodes prompts."""

    def __init__(self, model: bytes, first_id: int, whole: "CanaryTokenizer"):
        super().__init__(model, first_id)
        self.whole = whole

    def encode(self, text: str) -> list[int]:
        """Special tokens one after the other; text between <|startofcontext|> and
        <|startoftranscript|> is of the target language, the fourth token after it."""
        context, ids = "", []
        if text.startswith(CONTEXT) and BOS in text:
            ids, context = [self._special_id(CONTEXT)], text[len(CONTEXT) : text.find(BOS)]
            text = text[text.find(BOS) :]
        tokens = _SPECIAL_TOKEN.findall(text)
        if "".join(tokens) != text:
            raise ValueError(f"{text!r} does not consist of special tokens")
        if context:
            target = tokens[3][2:-2] if len(tokens) > 3 else None
            ids = ids + self.whole.of_language(target).encode(context)
        return ids + [self._special_id(token) for token in tokens]


class CanaryTokenizer(AggregateTokenizer):
    """Canary's aggregate tokenizer: special tokens, then the languages."""

    def __init__(self, models: dict[str, bytes]):
        if SPECIAL not in models:
            raise ValueError(f"the tokenizer's languages are {', '.join(models)}, not {SPECIAL}")
        super().__init__(models)
        part = self.languages[SPECIAL]
        ids = _special_tokens(self, part.pieces)
        self.special_tokens = {piece: part.first_id + i for piece, i in ids.items()}
        for name in ("bos_id", "eos_id", "pad_id"):
            setattr(self, name, part.first_id + getattr(self, name))
        for part in self.languages.values():
            part.special_tokens = self.special_tokens

    def _part(self, lang: str, model: bytes, first_id: int) -> SentencePieceTokenizer:
        special = lang == SPECIAL
        return _CanarySpecial(model, first_id, self) if special else _CanaryPart(model, first_id)

    def _text_parts(self) -> list[SentencePieceTokenizer]:
        return [part for lang, part in self.languages.items() if lang != SPECIAL]

    def of_language(self, lang: str | None) -> Tokenizer:
        if lang not in self.languages and _FALLBACK.get(lang) in self.languages:
            lang = _FALLBACK[lang]
        return super().of_language(lang)


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
        # `labels` last: NeMo's change_vocabulary leaves the old ones there
        labels = (
            (config.get("joint") or {}).get("vocabulary")
            or (config.get("decoder") or {}).get("vocabulary")
            or config.get("labels")
        )
        if not labels:
            raise ValueError("the config names neither a tokenizer nor character labels")
        return CharTokenizer(labels)
    custom = section.get("custom_tokenizer") or {}
    target = str(custom.get("_target_", "")).rsplit(".", 1)[-1] if custom else None
    if str(section.get("type")).lower() != "agg":
        return _named_class(target, SentencePieceTokenizer, CanaryBPETokenizer)(
            _model_file("tokenizer", section, files)
        )
    languages = section.get("langs")
    sections = languages.values() if isinstance(languages, dict) else ()
    if not sections or not all(isinstance(part, dict) for part in sections):
        raise ValueError(f"tokenizer.langs is {languages!r}, expected a section for each language")
    return _named_class(target, AggregateTokenizer, CanaryTokenizer)(
        {lang: _model_file(f"tokenizer.langs.{lang}", languages[lang], files) for lang in languages}
    )


def _named_class(target: str | None, default: type, custom: type) -> type:
    """What a config's `tokenizer.custom_tokenizer` names, beside a tokenizer of this type."""
    if target is None:
        return default
    if target != custom.__name__:
        raise ValueError(
            f"tokenizer.custom_tokenizer is {target!r}, expected {custom.__name__} for this type"
        )
    return custom


def _model_file(name: str, section: dict, files: dict[str, bytes]) -> bytes:
    kind = section.get("type", "bpe")
    if str(kind).lower() != "bpe":
        raise ValueError(f"{name}.type is {kind!r}, supported is bpe (SentencePiece)")
    file = str(section.get("model_path") or "").removeprefix("nemo:")
    if file not in files:
        raise ValueError(f"{name}.model_path names {file!r}, which is not among {sorted(files)}")
    return files[file]
