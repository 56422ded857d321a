"""What a long text and a long recording are made of: words between which they may be cut, and
pauses in which nobody speaks."""

import dataclasses
import re

import numpy as np

from fastconformer.recordings.cuts import power_of_steps
from fastconformer.text.scripts import has_spaceless, units

STEP_S = 0.01  # of loudness
AROUND_S = 15.0  # of the recording, by which a pause is told from speech
QUIET = 0.35  # share of the way from the quietest to the loud, in dB, up to which nobody speaks
LEAST_RANGE_DB = 12.0  # of quiet and loud, where loudness tells pauses at all
MOST_RANGE_DB = 45.0  # what is quieter is digital silence, and tells nothing of the room
_SPACES = ("▁", " ")
_CLOSING = "\"'”’»)]」』）"
_SENTENCE = ".!?…。！？؟।॥"
_CLAUSE = _SENTENCE + ";:,；：，、،؛"


@dataclasses.dataclass(frozen=True)
class Word:
    """Of the text: its characters [start, end), its tokens, whether a clause ends behind it, where
    readers pause, and whether a sentence does."""

    start: int
    end: int
    tokens: tuple[int, ...]
    clause: bool
    sentence: bool


def words_of_text(text: str, tokenizer, lang: str | None = None) -> list[Word]:
    """Words that the path may part: between spaces, in scripts without them of a few characters.
    What the tokenizer cannot write (a dash, maybe a number) belongs to the word before it. `lang`
    is asked for where each language has a tokenizer of its own."""
    own = tokenizer.of_language(lang)
    words: list[Word] = []
    for match in re.finditer(r"\S+", text):
        chunk, at = match.group(), match.start()
        pieces = list(units(chunk)) if has_spaceless(chunk) else [chunk]
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            mark = piece.rstrip(_CLOSING)[-1:]
            line = last and "\n" in text[match.end() : match.end() + 2]
            clause = line or (mark != "" and mark in _CLAUSE)
            sentence = line or (mark != "" and mark in _SENTENCE)
            tokens = _writable(tokenizer, own, piece, not words, number > 0)
            word = Word(at, at + len(piece), tokens, clause, sentence)
            at = word.end
            if tokens:
                words.append(word)
            elif words:
                before = words[-1]
                ends = before.clause or clause, before.sentence or sentence
                words[-1] = Word(before.start, word.end, before.tokens, *ends)
    return words


def _writable(tokenizer, own, piece: str, is_first: bool, glued: bool) -> tuple[int, ...]:
    """Ids of a word as its language's `own` tokenizer can write it: as it stands, else in lower
    case, else without marks, else what it can of it. `glued`: no space before it."""
    bare = re.sub(r"[^\w']|_", "", piece.replace("’", "'"))
    longest: list[int] = []
    for form in (piece, piece.lower(), bare, bare.lower()):
        ids = own.encode_word(form, is_first) if form else []
        ids = [i for i in ids if i != own.unk_id]
        if glued or all(tokenizer.pieces[i] in _SPACES for i in ids):
            ids = [i for i in ids if tokenizer.pieces[i] not in _SPACES]
        if ids and tokenizer.decode(ids).replace(" ", "").casefold() == form.casefold():
            return tuple(ids)
        longest = max(longest, ids, key=len)
    return tuple(longest)


def quiet_steps(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """(L / STEP_S,) bool: where nobody speaks, by the loudness around it."""
    step = int(STEP_S * rate_hz)
    count = len(samples) // step
    if not count:
        return np.zeros(0, dtype=bool)
    scale = 32768.0**2 if samples.dtype == np.int16 else 1.0
    level = 10 * np.log10(power_of_steps(samples, step) / scale + 1e-9)
    level = np.convolve(np.pad(level, 2, mode="edge"), np.ones(5) / 5, "valid")
    quiet = np.zeros(count, dtype=bool)
    around, hop = round(AROUND_S / STEP_S), round(5 / STEP_S)
    for first in range(0, count, hop):
        low, high = np.percentile(level[max(0, first - around) : first + hop + around], (5, 90))
        low = max(low, high - MOST_RANGE_DB)
        if high - low >= LEAST_RANGE_DB:
            bound = low + QUIET * (high - low)
            quiet[first : first + hop] = level[first : first + hop] < bound
    return quiet


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
