"""A SentencePiece model as data: its pieces and its two specs, read and written.

Source: the protocol buffer of sentencepiece's `sentencepiece_model.proto` (ModelProto: 1 pieces,
2 trainer_spec, 3 normalizer_spec). Fields that are not used here are kept byte for byte, so that
reading and writing changes nothing, and no protobuf package is needed.
"""

import functools
import struct
from dataclasses import dataclass, replace

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # Piece.type
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # TrainerSpec.model_type

# (message, field) -> name, of what is read from the specs; the proto's default beside it
TRAINER = {"model_type": (3, 1), "vocab_size": (4, 8000), "treat_whitespace_as_suffix": (24, 0),
           "byte_fallback": (35, 0), "unk_piece": (45, "<unk>"), "bos_piece": (46, "<s>"),
           "eos_piece": (47, "</s>"), "pad_piece": (48, "<pad>")}  # fmt: skip
NORMALIZER = {"name": (1, ""), "precompiled_charsmap": (2, b""), "add_dummy_prefix": (3, 1),
              "remove_extra_whitespaces": (4, 1), "escape_whitespaces": (5, 1)}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: int = NORMAL
    rest: bytes = b""  # fields that this file does not know


@dataclass(frozen=True)
class SentencePieceModel:
    """`trainer` and `normalizer` are the specs' values by name (see TRAINER, NORMALIZER);
    `*_bytes` and `rest` are the encoded messages, which `to_bytes` writes back as they are."""

    pieces: tuple[Piece, ...]
    trainer_bytes: bytes
    normalizer_bytes: bytes
    rest: bytes

    @functools.cached_property
    def trainer(self) -> dict:
        return _values(self.trainer_bytes, TRAINER)

    @functools.cached_property
    def normalizer(self) -> dict:
        return _values(self.normalizer_bytes, NORMALIZER)

    @property
    def kind(self) -> str:
        """unigram, bpe, word or char."""
        return MODEL_TYPES.get(self.trainer["model_type"], "unknown")

    @property
    def special_pieces(self) -> tuple[str, ...]:
        """Names of the unknown, begin, end and padding pieces, whether or not they are there."""
        return tuple(self.trainer[f"{name}_piece"] for name in ("unk", "bos", "eos", "pad"))

    @staticmethod
    def from_bytes(data: bytes) -> "SentencePieceModel":
        """ValueError: not a SentencePiece model."""
        pieces, trainer, normalizer, rest = [], b"", b"", b""
        try:
            for number, value, raw in _fields(data):
                if number == 1:
                    pieces.append(_piece(value))
                elif number == 2:
                    trainer += value  # protobuf merges a message that comes twice
                elif number == 3:
                    normalizer += value
                else:
                    rest += raw
        except (IndexError, struct.error, UnicodeDecodeError, TypeError, AttributeError):
            raise ValueError("not a SentencePiece model") from None
        if not pieces:
            raise ValueError("not a SentencePiece model: it holds no pieces")
        return SentencePieceModel(tuple(pieces), trainer, normalizer, rest)

    def to_bytes(self) -> bytes:
        parts = []
        for piece in self.pieces:
            message = (
                _bytes_field(1, piece.text.encode()) + b"\x15" + struct.pack("<f", piece.score)
            )
            if piece.type != NORMAL:
                message += b"\x18" + _varint(piece.type)
            parts.append(_bytes_field(1, message + piece.rest))
        if self.trainer_bytes:
            parts.append(_bytes_field(2, self.trainer_bytes))
        if self.normalizer_bytes:
            parts.append(_bytes_field(3, self.normalizer_bytes))
        return b"".join(parts) + self.rest

    def with_pieces(self, pieces) -> "SentencePieceModel":
        return replace(self, pieces=tuple(pieces))


def _piece(message: bytes) -> Piece:
    text, score, kind, rest = "", 0.0, NORMAL, b""
    for number, value, raw in _fields(message):
        if number == 1:
            text = value.decode()
        elif number == 2:
            score = struct.unpack("<f", value)[0]
        elif number == 3:
            kind = value
        else:
            rest += raw
    return Piece(text, score, kind, rest)


def _values(message: bytes, known: dict) -> dict:
    numbers = {number: (name, default) for name, (number, default) in known.items()}
    found = dict(numbers.values())
    for number, value, _ in _fields(message):
        if number in numbers:
            name, default = numbers[number]
            found[name] = value.decode() if isinstance(default, str) else value
    return found


def spec_bytes(values: dict, known: dict) -> bytes:
    """The message of a spec: values by the names in TRAINER or NORMALIZER; what is left out, or is
    the default, is not written."""
    parts = []
    for name, value in values.items():
        number, default = known[name]
        if value == default:
            continue
        if isinstance(value, str | bytes):
            parts.append(_bytes_field(number, value.encode() if isinstance(value, str) else value))
        else:
            parts.append(_varint(number << 3) + _varint(int(value)))
    return b"".join(parts)


def _fields(data: bytes):
    """(number, value, encoded field) of each field: int for varints, bytes for the rest."""
    position = 0
    while position < len(data):
        start = position
        key, position = _read_varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _read_varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, position = data[position : position + size], position + size
        elif wire == 2:
            size, position = _read_varint(data, position)
            value, position = data[position : position + size], position + size
        else:
            raise IndexError
        if position > len(data) or not number:
            raise IndexError
        yield number, value, data[start:position]


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise IndexError


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _bytes_field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content
