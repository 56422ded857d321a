"""Byte-level BPE: Qwen's tokenizer and the tiktoken vocabulary of FunASR's CTC branch.

Both go from text to ids of byte strings and back. A token may hold a part of a character: its
piece then shows U+FFFD, and only `token_bytes` tells all of it.
"""

import base64
import binascii
import itertools
import json
import re
import string

# What tiktoken's files of Whisper and SenseVoice are split by, before bytes are merged.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LANGUAGES = (
    "en", "zh", "de", "es", "ru", "ko", "fr", "ja", "pt", "tr", "pl", "ca", "nl", "ar", "sv",
    "it", "id", "hi", "fi", "vi", "he", "uk", "el", "ms", "cs", "ro", "da", "hu", "ta", "no",
    "th", "ur", "hr", "bg", "lt", "la", "mi", "ml", "cy", "sk", "te", "fa", "lv", "bn", "sr",
    "az", "sl", "kn", "et", "mk", "br", "eu", "is", "hy", "ne", "mn", "bs", "kk", "sq", "sw",
    "gl", "mr", "pa", "si", "km", "sn", "yo", "so", "af", "oc", "ka", "be", "tg", "sd", "gu",
    "am", "yi", "lo", "uz", "fo", "ht", "ps", "tk", "nn", "mt", "sa", "lb", "my", "bo", "tl",
    "mg", "as", "tt", "haw", "ln", "ha", "ba", "jw", "su", "yue", "minnan", "wuyu", "dialect",
    "zh/en", "en/zh",
)  # fmt: skip
EVENTS = (
    "ASR", "AED", "SER", "Speech", "/Speech", "BGM", "/BGM", "Laughter", "/Laughter",
    "Applause", "/Applause", "HAPPY", "SAD", "ANGRY", "NEUTRAL", "translate", "transcribe",
    "startoflm", "startofprev", "nospeech", "notimestamps",
)  # fmt: skip
MAX_RANKS = 1 << 20
MARKS = frozenset(string.punctuation) | frozenset("，。？！；：、“”‘’（）《》【】…—·「」『』")


def _tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "this model needs the package tokenizers: pip install fastconformer[llm]"
        ) from None
    return tokenizers


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


class ByteTokenizer:
    """What both have: `token_bytes` and `pieces` of each id, `vocab_size`, and what `recordings`
    asks of a tokenizer."""

    kind = "bytes"
    unk_id = None
    utterance_ends = frozenset()

    def __init__(self, token_bytes: list[bytes]):
        self.token_bytes = token_bytes
        self.pieces = [token.decode("utf-8", errors="replace") for token in token_bytes]
        self.vocab_size = len(token_bytes)
        self.punctuation = set(MARKS)

    def ids_to_pieces(self, ids: list[int]) -> list[str]:
        return [self.pieces[i] for i in ids]

    def encode_word(self, word: str, is_first: bool) -> list[int]:
        return self.encode(word if is_first else f" {word}")

    def join(self, pieces: list[str]) -> str:
        return "".join(pieces).strip()

    def starts_word(self, piece: str, text: str) -> bool:
        return piece[:1] == " " or _is_ideograph(piece[:1])

    def of_language(self, lang: str | None) -> "ByteTokenizer":
        return self

    def bytes_of(self, ids: list[int]) -> bytes:
        return b"".join(self.token_bytes[i] for i in ids)


def _is_ideograph(char: str) -> bool:
    return bool(char) and ("\u3040" <= char <= "\u30ff" or "\u3400" <= char <= "\u9fff")


class QwenTokenizer(ByteTokenizer):
    """Qwen's, from its `tokenizer.json`. Text such as `<|im_end|>` is read as the token. A model
    may have rows for `n_ids` ids, more than there are tokens: those stand for nothing."""

    def __init__(self, tokenizer_json: bytes, n_ids: int | None = None):
        tokenizers = _tokenizers()
        try:
            self.backend = tokenizers.Tokenizer.from_str(tokenizer_json.decode("utf-8"))
            added = json.loads(tokenizer_json).get("added_tokens") or ()
            special = {token["id"] for token in added if token.get("special")}
        except Exception as error:  # the backend raises bare Exceptions
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"tokenizer.json is not a tokenizer: {reason}") from None
        self.backend.no_padding()
        self.backend.no_truncation()
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        if not 0 < size <= MAX_RANKS:
            raise ValueError(f"tokenizer.json: its largest id is {size - 1}")
        letters, tokens = _byte_letters(), [b""] * size
        added_ids = {token["id"] for token in added}
        for piece, number in vocabulary.items():
            known = number not in added_ids and all(char in letters for char in piece)
            tokens[number] = bytes(letters[c] for c in piece) if known else piece.encode()
        self.special_ids = special
        if n_ids is not None and n_ids < size:
            raise ValueError(f"the tokenizer has {size} tokens, the language model {n_ids}")
        super().__init__(tokens + [b""] * ((n_ids or size) - size))
        self.vocab_size = size

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens; `/sil`, which the model writes for silence, is a space, and
        runs of white space are one."""
        spoken = self.bytes_of([i for i in ids if i not in self.special_ids])
        return re.sub(r"\s+", " ", spoken.decode("utf-8", errors="replace").replace("/sil", " "))


class TiktokenTokenizer(ByteTokenizer):
    """Whisper's format as SenseVoice extends it: a file of `base64 rank` lines, then the special
    tokens, of which there is one for each of the first `n_languages`. The CTC branch has classes
    for the first `n_tokens` of all. In a text to encode, special tokens are ordinary text."""

    def __init__(self, file: bytes, n_tokens: int, n_languages: int = len(LANGUAGES)):
        tokenizers = _tokenizers()
        self.ranks = _read_ranks(file)
        special = ["endoftext", "startoftranscript", *LANGUAGES[:n_languages], *EVENTS]
        special += [f"SPECIAL_TOKEN_{i}" for i in range(1, 51)]
        times = [f"{i * 0.02:.2f}" for i in range(1501)]
        tokens = sorted(self.ranks, key=self.ranks.get)
        self.first_special = len(tokens)
        self.first_time = self.first_special + len(special)
        self.split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
        tokens += [f"<|{name}|>".encode() for name in (*special, *times)]
        if not self.first_special <= n_tokens <= len(tokens):
            raise ValueError(
                f"the tiktoken vocabulary has {self.first_special} to {len(tokens)} tokens, the "
                f"CTC branch {n_tokens} and blank; take the vocabulary that it was trained with"
            )
        super().__init__(tokens[:n_tokens])

    def encode(self, text: str) -> list[int]:
        ids = []
        for word, _ in self.split.pre_tokenize_str(text):
            ids += self._merge(word.encode("utf-8"))
        return ids

    def _merge(self, word: bytes) -> list[int]:
        """Joins the neighbours of lowest rank until none are left."""
        if word in self.ranks:
            return [self.ranks[word]]
        parts = [word[i : i + 1] for i in range(len(word))]
        while len(parts) > 1:
            pairs = (self.ranks.get(a + b) for a, b in itertools.pairwise(parts))
            best = min(
                ((rank, at) for at, rank in enumerate(pairs) if rank is not None), default=None
            )
            if best is None:
                break
            at = best[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ranks[part] for part in parts]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; time tokens and `<|nospeech|>` give none."""
        spoken = self.bytes_of([i for i in ids if i < self.first_time])
        return spoken.decode("utf-8", errors="replace").replace("<|nospeech|>", "")


def _read_ranks(file: bytes) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(file.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"the tiktoken vocabulary: line {number} is no `token rank`") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not 256 <= len(ranks) <= MAX_RANKS:
        raise ValueError(
            f"the tiktoken vocabulary has {len(ranks)} tokens, expected ranks 0, 1, 2 ... without "
            "a gap, and all bytes"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"the tiktoken vocabulary has no token for byte {missing[0]}")
    return ranks
