"""What a script asks of those who cut and show texts: spaces between words, and room."""

import bisect
import unicodedata
from collections.abc import Iterator

# First and last code points of scripts that part no words: Thai, Lao, Burmese, Khmer, Chinese and
# Japanese with their punctuation and full-width forms.
_SPACELESS = (
    (0x0E01, 0x0E3A), (0x0E40, 0x0E4E), (0x0E80, 0x0EFF), (0x1000, 0x103F), (0x1050, 0x109F),
    (0x1780, 0x17DD), (0x2E80, 0x2FDF), (0x3001, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF01, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40),
    (0xFF5B, 0xFF9F), (0x20000, 0x3FFFF),
)  # fmt: skip
_FIRSTS = [first for first, _ in _SPACELESS]
CLAUSE_ENDS = frozenset("。、，．？！；：…｡､")
SENTENCE_ENDS = frozenset("。？！｡")
_NOT_FIRST = CLAUSE_ENDS | frozenset(
    "」』）】〉》〕］｝・ーゝゞ々ぁぃぅぇぉっゃゅょァィゥェォッャュョฯๆ"
)
_WITH_NEXT = frozenset("「『（【〈《〔［｛" + "เแโใไ")


def is_spaceless(character: str) -> bool:
    """Whether it is of a script that puts no spaces between words."""
    code = ord(character)
    k = bisect.bisect_right(_FIRSTS, code) - 1
    return k >= 0 and code <= _SPACELESS[k][1]


def has_spaceless(text: str) -> bool:
    return not text.isascii() and any(map(is_spaceless, text))


def stands_alone(text: str) -> bool:
    """Whether a line may begin with this: it is no mark on the letter before it, and nothing that
    printers keep with what precedes it."""
    return (
        bool(text)
        and not unicodedata.combining(text[0])
        and text[0] not in _NOT_FIRST
        and (unicodedata.category(text[0]) not in ("Mn", "Mc", "Me"))
    )


def takes_next(text: str) -> bool:
    """Whether a line must not end with this."""
    return bool(text) and text[-1] in _WITH_NEXT


def units(text: str) -> Iterator[str]:
    """The shortest parts between which a text without spaces may be cut: characters of such
    scripts with their marks and punctuation, and runs of other ones."""
    built = ""
    for character in text:
        joins = built and (
            not stands_alone(character)
            or takes_next(built)
            or not (is_spaceless(character) or is_spaceless(built[-1]))
        )
        if joins or not built:
            built += character
        else:
            yield built
            built = character
    if built:
        yield built


def width(text: str) -> int:
    """Columns that a text takes: full-width characters two, marks on others none."""
    if text.isascii():
        return len(text)
    return sum(
        0
        if unicodedata.category(c) in ("Mn", "Me", "Cf")
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )
