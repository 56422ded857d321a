"""A long recording and its text, cut at pauses into clips that know what is said in them.

The model transcribes the recording with times; what it heard is aligned with the text, character
by character, so that scripts without spaces do as well as others. A clip whose words are not those
that were heard is left out: words that are missing or too many, music, another text.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from fastconformer.recordings.timestamps import Span
from fastconformer.text.metrics import align

LOST_CHARS = 2  # of the text between two clips: more were said and not heard, or not said
RUN = 4  # characters that agree one after another; fewer agree by chance anywhere
LONGEST_WORD = 30  # characters; what is longer is a script without spaces
PASSAGE_CHARS = 40  # of the text that nobody said: a passage that was left out, no missed word


@dataclasses.dataclass(frozen=True)
class Segment:
    """A clip: its time in the recording, its text, what the model heard, and the share of
    characters in which they agree. `reason`: why it is left out, empty where it is not."""

    start: float
    end: float
    text: str
    heard: str
    score: float
    reason: str = ""


def cut_at_pauses(words: Sequence[Span], pause_s: float, max_s: float) -> list[tuple[int, int]]:
    """(first, after the last) word of each clip: cut at pauses, joined up to max_s, and cut at the
    widest gaps where there is no pause within that."""
    gaps = [b.start - a.end for a, b in itertools.pairwise(words)]
    ends = [i + 1 for i, gap in enumerate(gaps) if gap >= pause_s] + [len(words)]
    clips, first = [], 0
    for end in ends:
        clips += _halves(words, gaps, first, end, max_s)
        first = end
    joined: list[tuple[int, int]] = []
    for first, end in clips:
        if joined and words[end - 1].end - words[joined[-1][0]].start <= max_s:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((first, end))
    return joined


def _halves(words, gaps, first: int, end: int, max_s: float) -> list[tuple[int, int]]:
    if end - first < 2 or words[end - 1].end - words[first].start <= max_s:
        return [(first, end)] if end > first else []
    widest = max(range(first, end - 1), key=lambda i: gaps[i])
    left = _halves(words, gaps, first, widest + 1, max_s)
    return left + _halves(words, gaps, widest + 1, end, max_s)


def find_segments(
    words: Sequence[Span],
    text: str,
    duration_s: float,
    *,
    pause_s: float = 0.3,
    max_s: float = 20.0,
    min_score: float = 0.75,
    edge_s: float = 0.25,
) -> list[Segment]:
    """The clips of a recording, those that are left out too.

    Args:
        words: what the model heard, with times in seconds.
        text: what is said, and maybe more before, behind and between.
        pause_s: gap between two words at which a clip may end. max_s: longest clip.
        min_score: clips below this agreement are left out.
        edge_s: silence that a clip keeps at most at its ends.
    """
    heard = [(char, i) for i, word in enumerate(words) for char in _plain(word.text)]
    said = [(char, i) for i, char in enumerate(text) if not char.isspace()]
    clips = cut_at_pauses(words, pause_s, max_s)
    owner = {word: n for n, (first, end) in enumerate(clips) for word in range(first, end)}
    clip_of = [owner[word] for _, word in heard]
    place = _places([_one(char) for char, _ in said], [char for char, _ in heard], clip_of)
    spans: list[list[int]] = [[] for _ in clips]  # numbers in `said`
    matched: list[list[int]] = [[] for _ in clips]  # numbers in `heard`
    for number, at in enumerate(place):
        if at is not None:
            spans[owner[heard[at][1]]].append(number)
            matched[owner[heard[at][1]]].append(at)
    bounds = [_whole_words(text, said, (s[0], s[-1] + 1)) if s else None for s in spans]
    chars: list[list[int]] = [[] for _ in clips]  # of `heard`, all of each clip
    for at, (_, word) in enumerate(heard):
        chars[owner[word]].append(at)
    lost = _settle_lost(text, bounds, matched, chars)
    segments = []
    for n, ((first, end), bound) in enumerate(zip(clips, bounds, strict=True)):
        start, stop = _cut_times(words, first, end, duration_s, edge_s)
        told = " ".join(word.text for word in words[first:end])
        part = "" if bound is None else " ".join(text[slice(*bound)].split())
        score = agreement(part, told)
        reason = "" if score >= min_score else "the words are not those that were heard"
        if not reason and n in lost:
            reason = "words of the text beside it were not heard"
        segments.append(Segment(start, stop, part, told, round(score, 3), reason))
    return segments


def agreement(text: str, heard: str) -> float:
    """Share of characters, without spaces and case, in which two texts agree."""
    a, b = _plain(text), _plain(heard)
    wrong = sum(edit.op != "equal" for edit in align(a, b))
    return max(0.0, 1 - wrong / max(1, len(a), len(b)))


def _plain(text: str) -> str:
    return "".join(c for char in text if not char.isspace() for c in _one(char))


def _one(char: str) -> str:
    """A character to compare by: one for one, so that places stay."""
    return char.lower()[:1]


def _places(said: list[str], heard: list[str], clip_of: list[int]) -> list[int | None]:
    """Of each character that is said, the number of the one that was heard in its place; None
    also where only a few of a clip agree between others that do not."""
    places, at = [], 0
    for edit in align("".join(said), "".join(heard)):
        if edit.reference is not None:
            places.append(at if edit.op == "equal" else None)
        if edit.hypothesis is not None:
            at += 1
    runs, first = [], 0
    for number in range(1, len(places) + 1):
        now, before = places[number] if number < len(places) else None, places[number - 1]
        if now is None or before is None or now != before + 1 or clip_of[now] != clip_of[before]:
            runs.append((first, number))
            first = number
    for first, end in runs:
        if end - first < RUN:
            places[first:end] = [None] * (end - first)
    return places


def _whole_words(text: str, said, span: tuple[int, int]) -> tuple[int, int]:
    """Characters of `said` to places in the text, out to the ends of their words; as they are in
    a script without spaces."""
    first, last = said[span[0]][1], said[span[1] - 1][1]
    return _word_around(text, first)[0], _word_around(text, last)[1]


def _word_around(text: str, place: int) -> tuple[int, int]:
    start, end = place, place + 1
    while start > 0 and not text[start - 1].isspace():
        start -= 1
    while end < len(text) and not text[end].isspace():
        end += 1
    return (start, end) if end - start <= LONGEST_WORD else (place, place + 1)


def _settle_lost(text: str, bounds: list, matched: list, chars: list) -> set[int]:
    """Words of the text between two clips go to the one that has heard something in their place;
    gives the clips beside words of which nobody knows who said them. Changes `bounds`."""
    doubtful, known = set(), [n for n, bound in enumerate(bounds) if bound is not None]
    for n, m in itertools.pairwise(known):
        end, start = bounds[n][1], bounds[m][0]
        between = len(_plain(text[end:start])) if start > end else 0
        if start >= end and (between <= LOST_CHARS or between >= PASSAGE_CHARS):
            continue
        behind, before = chars[n][-1] - matched[n][-1], matched[m][0] - chars[m][0]
        if start > end and behind and not before:
            bounds[n] = bounds[n][0], start
        elif start > end and before and not behind:
            bounds[m] = end, bounds[m][1]
        else:
            doubtful |= {n, m}
    return doubtful


def _cut_times(words, first: int, end: int, duration_s: float, edge_s: float):
    """In the middle of the gaps around a clip, at most edge_s from its words."""
    before = words[first - 1].end if first else 0.0
    after = words[end].start if end < len(words) else duration_s
    start, stop = words[first].start, words[end - 1].end
    return (
        max(0.0, start - min(edge_s, max(0.0, start - before) / 2)),
        min(duration_s, stop + min(edge_s, max(0.0, after - stop) / 2)),
    )
