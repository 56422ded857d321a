"""Encoder frames -> token, word and segment times.

Source: NeMo's timestamp_utils and decoding classes.
"""

import contextlib
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..decoding import Hypothesis
from ..text.scripts import SENTENCE_ENDS, has_spaceless, is_spaceless, stands_alone, takes_next
from ..text.tokenizer import Tokenizer


@dataclass
class Span:
    """A word or a segment and its times, in seconds (inside this file also in frames), the
    confidence of a word where it was asked for, and whether no space stands before it."""

    text: str
    start: float
    end: float
    confidence: float | None = None
    glued: bool = field(default=False, compare=False, repr=False)


@contextlib.contextmanager
def without_collection():
    """No garbage collection inside. The spans of hours hold no cycles, and as they add up Python
    would look through all objects alive, torch's too, again and again: half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def spans_of_tokens(
    hypothesis: Hypothesis, tokenizer: Tokenizer, starts: Sequence[int], ends: Sequence[int]
) -> list[Span]:
    """Each token between its two frames, its text decoded alone, with its confidence."""
    texts = (tokenizer.join([piece]) for piece in tokenizer.ids_to_pieces(hypothesis.tokens))
    sure = hypothesis.confidences or [None] * len(hypothesis.tokens)
    return [Span(*fields) for fields in zip(texts, starts, ends, sure)]


def word_spans(
    tokens: list[Span], pieces: list[str], tokenizer: Tokenizer, aggregate=min
) -> list[Span]:
    """Joins tokens to words; marks are glued to the word before them. Where a script has no spaces,
    as Chinese, a word is what a token writes.

    Args:
        tokens: from a head's `token_spans`; pieces: the same tokens as vocabulary pieces.
        aggregate: the confidences of a word's tokens -> the word's.
    """
    words, built, first = [], [], 0
    members, inside = [], []  # tokens of each word, and of the one being built
    following = _next_text(tokens)

    def close(last):
        words.append(Span(tokenizer.join(built), tokens[first].start, tokens[last].end))
        members.append(inside)

    for i, (token, piece) in enumerate(zip(tokens, pieces)):
        mark = token.text in tokenizer.punctuation and token.text != " "
        boundary = token.text == " " and following[i] not in tokenizer.punctuation
        if not mark and (boundary or tokenizer.starts_word(piece, token.text)):
            if built:
                close(i - 1)
            built, inside = ([], []) if token.text == " " else ([piece], [i])
            first = i
        elif mark and words and not built:
            words[-1].end = token.end
            words[-1].text = words[-1].text.removesuffix(" ") + token.text
            members[-1].append(i)
        elif mark and built:
            if built[-1] in (" ", "_", "▁") and built.pop() == " ":
                inside.pop()  # NeMo's word counts the confidence of a "▁", not that of a space
            built.append(piece)
            inside.append(i)
        else:
            if not built:
                first = i
            built.append(piece)
            inside.append(i)
    if built:
        close(-1)
    if words:
        words[0].start = tokens[0].start
    for word, of_word in zip(words, members):
        sure = [tokens[i].confidence for i in of_word]
        word.confidence = aggregate(sure) if sure and None not in sure else None
    if not any(has_spaceless(word.text) for word in words):
        return words
    parts = (_by_tokens(word, [tokens[i] for i in m]) for word, m in zip(words, members))
    return [part for several in parts for part in several]


def _by_tokens(word: Span, tokens: list[Span]) -> list[Span]:
    """A word of a script without spaces as one for each token: their marks, and letters of other
    scripts, stay together."""
    if len(tokens) < 2 or not has_spaceless(word.text):
        return [word]
    parts: list[Span] = []
    for token in tokens:
        text = token.text.strip()
        if not text:
            continue
        before = parts[-1].text if parts else ""
        cut = is_spaceless(text[0]) or (before and is_spaceless(before[-1]))
        if parts and not (cut and stands_alone(text) and not takes_next(before)):
            parts[-1].text += text
            parts[-1].end = token.end
            sure = (parts[-1].confidence, token.confidence)
            parts[-1].confidence = None if None in sure else min(sure)
        else:
            parts.append(Span(text, token.start, token.end, token.confidence, bool(parts)))
    if "".join(part.text for part in parts) != "".join(word.text.split()):
        return [word]  # the tokenizer writes them otherwise together than alone
    parts[0].start, parts[-1].end = word.start, max(parts[-1].end, word.end)
    return parts


def joined(words: list[Span]) -> str:
    """The text of words, with spaces where there are some."""
    return "".join(("" if k == 0 or w.glued else " ") + w.text for k, w in enumerate(words))


def _next_text(tokens: list[Span]) -> list[str | None]:
    """For each token the text of the next one that is neither empty nor a space."""
    following, text = [], None
    for token in reversed(tokens):
        following.append(text)
        if token.text not in ("", " "):
            text = token.text
    return following[::-1]


def segment_spans(
    words: list[Span], separators: tuple[str, ...], gap_frames: int | None = None
) -> list[Span]:
    """Joins words to segments that end at a separator (or 。？！, which NeMo's lack), or where a
    pause of `gap_frames` is given and reached."""
    segments, built = [], []

    def close():
        segments.append(Span(joined(built), built[0].start, built[-1].end, glued=built[0].glued))
        built.clear()

    for word in words:
        if gap_frames and built:
            # NeMo quirk kept: with a gap, separators close a segment only right after another
            # closed
            if word.start - built[-1].end >= gap_frames:
                close()
            built.append(word)
            continue
        built.append(word)
        ends = word.text and (word.text[-1] in separators or word.text in separators)
        if ends or word.text[-1:] in SENTENCE_ENDS:
            close()
    if built:
        close()
    return segments


def in_seconds(spans: list[Span], frame_s: float, shift_s: float, duration_s: float) -> list[Span]:
    """Frames to seconds. `shift_s` is silence put in front of a short clip: it is taken off, and
    the times are kept inside the clip. Without it they are NeMo's, whose last TDT token may end
    later."""

    def at(frame):
        seconds = frame * frame_s
        return min(max(seconds - shift_s, 0.0), duration_s) if shift_s else seconds

    return [
        Span(span.text, at(span.start), at(span.end), span.confidence, span.glued) for span in spans
    ]
