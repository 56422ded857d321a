"""Word and character error rates, alignments, text normalisation, and how sure a difference is.

Strings in, counts out; nothing here knows of models or files. Corpus rates are total errors over
total reference words, never a mean of rates. Edit distance: Myers 1999 (J. ACM 46(3)), with the bit
vectors as Python integers; totals, and which of several best alignments is taken, as in jiwer.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Edit(NamedTuple):
    """One step of an alignment: op is "equal", "substitute", "delete" or "insert"; the side that
    an insertion or deletion does not have is None."""

    op: str
    reference: str | None
    hypothesis: str | None


@dataclass(frozen=True)
class ErrorCounts:
    """Errors of one utterance or a corpus; `words` counts reference words (characters where
    `char_errors` made it). Counts add up with `+`."""

    words: int = 0
    insertions: int = 0
    deletions: int = 0
    substitutions: int = 0

    @property
    def errors(self) -> int:
        return self.insertions + self.deletions + self.substitutions

    @property
    def rate(self) -> float:
        """errors / words. Without reference words the divisor is 1: the number of inserted words,
        0.0 if there are none either."""
        return self.errors / max(self.words, 1)

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(
            self.words + other.words,
            self.insertions + other.insertions,
            self.deletions + other.deletions,
            self.substitutions + other.substitutions,
        )


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Edit]:
    """A shortest sequence of edits that turns `reference` into `hypothesis`.

    Args:
        reference, hypothesis: lists of words, or strings for characters.
    Returns:
        The edits in order, equal items included.
    Of the shortest ones it is the one that jiwer (rapidfuzz) reports: common ends are set aside;
    then, from the right, a deletion is taken before an insertion before a substitution. Takes time
    and memory (bits) in proportion to the product of the lengths: 1 GB for 60000 x 60000.
    """
    edits, i, j = [], 0, 0
    for op in _operations(reference, hypothesis):
        word = reference[i] if op != INSERT else None
        other = hypothesis[j] if op != DELETE else None
        edits.append(Edit(NAMES[op], word, other))
        i, j = i + (op != INSERT), j + (op != DELETE)
    return edits


EQUAL, SUBSTITUTE, DELETE, INSERT = range(4)
NAMES = ("equal", "substitute", "delete", "insert")


def _operations(reference: Sequence[str], hypothesis: Sequence[str]) -> bytes:
    """The edits of `align`, in order, a byte each."""
    n, m = len(reference), len(hypothesis)
    start = 0
    while start < min(n, m) and reference[start] == hypothesis[start]:
        start += 1
    end = 0
    while end < min(n, m) - start and reference[n - 1 - end] == hypothesis[m - 1 - end]:
        end += 1
    i, j = n - start - end, m - start - end
    rises, falls = _vertical_deltas(
        reference[start : start + i], hypothesis[start : start + j]
    )  # column j: whether D[i+1][j+1] - D[i][j+1] is +1, is -1
    backwards = bytearray([EQUAL]) * end
    while i and j:
        place, bit = (i - 1) >> 3, 1 << (i - 1 & 7)
        if rises[j - 1][place] & bit:
            backwards.append(DELETE)
            i -= 1
        elif j > 1 and falls[j - 2][place] & bit:
            backwards.append(INSERT)
            j -= 1
        else:
            same = reference[start + i - 1] == hypothesis[start + j - 1]
            backwards.append(EQUAL if same else SUBSTITUTE)
            i, j = i - 1, j - 1
    backwards += bytes([DELETE]) * i + bytes([INSERT]) * j + bytes([EQUAL]) * start
    return bytes(backwards[::-1])


def _vertical_deltas(reference, hypothesis) -> tuple[list[bytes], list[bytes]]:
    """Myers' bit vectors, little-endian bytes for each hypothesis item: bit i of the first is set
    where the edit distance grows from reference prefix i to i + 1, of the second where it falls."""
    full, size = (1 << len(reference)) - 1, len(reference) // 8 + 1
    places = {item: bytearray(size) for item in set(hypothesis)}
    for i, item in enumerate(reference):
        if item in places:
            places[item][i >> 3] |= 1 << (i & 7)
    positions = {item: int.from_bytes(bits, "little") for item, bits in places.items()}
    rise, fall = full, 0
    rises, falls = [], []
    for item in hypothesis:
        match = positions.get(item, 0)
        diagonal_zero = ((((match & rise) + rise) ^ rise) | match | fall) & full
        right_rise = (fall | ~(diagonal_zero | rise)) << 1 | 1
        right_fall = (diagonal_zero & rise) << 1
        rise = (right_fall | ~(diagonal_zero | right_rise)) & full
        fall = right_rise & diagonal_zero & full
        rises.append(rise.to_bytes(size, "little"))
        falls.append(fall.to_bytes(size, "little"))
    return rises, falls


def _count(reference: Sequence[str], hypothesis: Sequence[str]) -> ErrorCounts:
    ops = _operations(reference, hypothesis)
    return ErrorCounts(len(reference), ops.count(INSERT), ops.count(DELETE), ops.count(SUBSTITUTE))


def _check_pairs(references, hypotheses):
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise ValueError("references and hypotheses are lists of texts, one was a single string")
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{len(references)} references and {len(hypotheses)} hypotheses; give one of each"
        )


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Word errors summed over a corpus; words are what white space separates.

    Raises ValueError where the lists differ in length.
    """
    _check_pairs(references, hypotheses)
    pairs = zip(references, hypotheses, strict=True)
    return sum((_count(r.split(), h.split()) for r, h in pairs), ErrorCounts())


def char_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Character errors summed over a corpus. Spaces inside a text count as characters, those
    around it do not. Raises ValueError where the lists differ in length."""
    _check_pairs(references, hypotheses)
    pairs = zip(references, hypotheses, strict=True)
    return sum((_count(r.strip(), h.strip()) for r, h in pairs), ErrorCounts())


def normalize_none(text: str) -> str:
    """The text as it is."""
    return text


# What people type for an apostrophe; NFKC makes a space of some.
_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u201b\u2032\u02bc\u00b4`"), "'")
_PARTING = "\u200b\u200c"  # format characters that part words: SentencePiece makes spaces of them


def normalize_basic(text: str) -> str:
    """Unicode NFKC, lower case, no punctuation or symbols, single spaces.

    An apostrophe between two letters or digits stays (typographic ones become '); every other
    punctuation mark or symbol parts words, as a space does. Format characters vanish (joiners, soft
    hyphens, marks of direction), but those that part words.
    """
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).lower()
    text = unicodedata.normalize("NFKC", text).replace("i\u0307", "i")  # of a Turkish capital
    text = "".join(c for c in text if unicodedata.category(c) != "Cf" or c in _PARTING)
    kept = []
    for k, c in enumerate(text):
        around = text[max(k - 1, 0) : k + 2]
        inside_word = c == "'" and len(around) == 3 and around[0].isalnum() and around[2].isalnum()
        kept.append(c if inside_word or unicodedata.category(c)[0] not in "PSZC" else " ")
    return " ".join("".join(kept).split())


_ARABIC_SIGNS = re.compile("[\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0640]")


def normalize_arabic(text: str) -> str:
    """`basic` without what Arabic leaves out at will: vowel signs, the small signs of the Quran,
    and the stroke that stretches words."""
    return normalize_basic(_ARABIC_SIGNS.sub("", text))


def normalize_english(text: str) -> str:
    """The English normaliser of Whisper and of the Open ASR Leaderboard: numbers as digits, British
    spellings as American, contractions apart. ValueError without the extra `eval`."""
    return _whisper_english()(text)


@functools.cache
def _whisper_english():
    try:
        from whisper_normalizer.english import EnglishTextNormalizer  # optional
    except ModuleNotFoundError:
        raise ValueError(
            'the normalizer english needs whisper-normalizer: pip install "fastconformer[eval]"'
        ) from None
    return EnglishTextNormalizer()


NORMALIZERS = {
    "none": normalize_none,
    "basic": normalize_basic,
    "arabic": normalize_arabic,
    "english": normalize_english,
}


def normalize(text: str, normalizer: str) -> str:
    """`text` under the normaliser of that name, one of NORMALIZERS; else ValueError."""
    if normalizer not in NORMALIZERS:
        names = ", ".join(sorted(NORMALIZERS))
        raise ValueError(f"normalizer is {normalizer!r}, expected one of {names}")
    return NORMALIZERS[normalizer](text)


def bootstrap_difference(
    new_errors, old_errors, words, samples=10000, confidence=0.95, seed=0
) -> tuple[float, float]:
    """Interval of the difference in corpus error rate between two systems, new minus old.

    Args:
        new_errors, old_errors: errors of each utterance under either system, (N,).
        words: reference words of each utterance, (N,).
    Returns:
        Lower and upper end; negative numbers favour the new system. Paired percentile bootstrap
        over utterances: both systems are always resampled together.
    Raises:
        ValueError: the three differ in length or are empty.
    Source: Bisani and Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance
    evaluation".
    """
    new_errors, old_errors, words = (np.asarray(a) for a in (new_errors, old_errors, words))
    n = len(words)
    if n == 0 or len(new_errors) != n or len(old_errors) != n:
        raise ValueError(
            f"{len(new_errors)}, {len(old_errors)} and {n} utterances; "
            "expected the same number of each, at least one"
        )
    rng = np.random.default_rng(seed)
    change = new_errors.astype(np.int64) - old_errors
    differences = np.empty(samples)
    step = max(1, (1 << 22) // n)  # 32 MB of indices at a time
    for begin in range(0, samples, step):
        drawn = rng.integers(n, size=(min(step, samples - begin), n))
        total_words = np.maximum(words[drawn].sum(1), 1)
        differences[begin : begin + step] = change[drawn].sum(1) / total_words
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return float(low), float(high)
