"""Transcripts as subtitles: cues, SubRip and WebVTT."""

import html
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..recordings.timestamps import Span, joined
from ..text.scripts import CLAUSE_ENDS, has_spaceless, units, width
from .transcripts import need_times

if TYPE_CHECKING:
    from ..recordings.transcript import Transcript

# Subtitle limits that broadcasters share: two lines of 42 characters, seven seconds.
LINE_CHARACTERS, CUE_LINES, CUE_SECONDS = 42, 2, 7.0
READING_SPEED = 17.0  # characters a second that viewers read: a cue stays as long as it takes
PAUSE_SECONDS = 1.5  # a silence this long ends a cue even inside a segment
SHORTEST_CUE_SECONDS = 0.5  # a word of one frame would flash; held as far as the next cue allows
LEAST_CUE_SECONDS = 0.002  # whatever the times: players drop a cue that ends where it starts


def to_srt(transcript: "Transcript", **limits) -> str:
    """SubRip subtitles; empty for an empty text. `limits`: see `cues`. ValueError: the transcript
    has no times."""
    return subtitles_of([("", transcript)], "srt", **limits)


def to_vtt(transcript: "Transcript", **limits) -> str:
    """WebVTT subtitles. `limits`: see `cues`. ValueError: the transcript has no times."""
    return subtitles_of([("", transcript)], "vtt", **limits)


def _srt(found: list[Span]) -> str:
    """SubRip of cues whose texts are ready."""
    blocks = [
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{cue.text}\n"
        for number, cue in enumerate(found, start=1)
    ]
    return "\n".join(blocks)


def _vtt(found: list[Span]) -> str:
    """WebVTT of cues whose texts are ready."""
    blocks = [f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{cue.text}\n" for cue in found]
    return "\n".join(["WEBVTT\n", *blocks])


def _escape(text: str) -> str:
    """What WebVTT would take for markup."""
    return html.escape(text, quote=False)


def subtitles_of(
    parts: list[tuple[str, "Transcript"]], style: str, highlight: bool = False, **limits
) -> str:
    """Subtitles ("srt" or "vtt") of one recording: of each channel (its name, or "", transcript).

    Several are merged by time, and each cue says whose it is. `highlight`: a cue for each word,
    in which that word is underlined.
    """
    mark = _escape if style == "vtt" else str
    found = []
    for name, transcript in parts:
        told = f"<v {_escape(name)}>" if style == "vtt" else f"{name}: "
        for cue in cues(transcript, **limits):
            spans = _highlighted(cue, transcript, mark) if highlight else [cue]
            for span in spans:
                text = span.text if highlight else mark(span.text)
                found.append(Span(f"{told if name else ''}{text}", span.start, span.end))
    found.sort(key=lambda cue: (cue.start, cue.end))
    return _vtt(found) if style == "vtt" else _srt(found)


def _highlighted(cue: Span, transcript: "Transcript", mark) -> list[Span]:
    """The cue once for each of its words, that word underlined, until the next one begins."""
    words = [w for w in transcript.words if w.text.strip() and cue.start <= w.start < cue.end]
    places, at = [], 0
    for word in words:  # where each stands in the cue's lines
        at = cue.text.find(word.text, at)
        if at < 0:
            return [Span(mark(cue.text), cue.start, cue.end)]
        places.append(at)
        at += len(word.text)
    spans = []
    for k, (word, at) in enumerate(zip(words, places)):
        end = at + len(word.text)
        text = f"{mark(cue.text[:at])}<u>{mark(word.text)}</u>{mark(cue.text[end:])}"
        start = cue.start if k == 0 else word.start
        until = words[k + 1].start if k + 1 < len(words) else cue.end
        if until > start:
            spans.append(Span(text, start, until))
    return spans or [Span(mark(cue.text), cue.start, cue.end)]


def cues(
    transcript: "Transcript",
    line_characters: int = LINE_CHARACTERS,
    lines: int = CUE_LINES,
    reading_speed: float = READING_SPEED,
) -> list[Span]:
    """Subtitles: spans whose text has at most so many lines of so many characters and lasts at
    most seven seconds. They end with segments and at pauses, and are cut between words.

    They stay for as long as they take to read, `reading_speed` characters a second, or until the
    next cue. A single longer word stays whole. Where a script has no spaces, lines are cut between
    characters, which count by the room they take, and cues behind clauses. Cues are in order, do
    not overlap and are never of length 0. ValueError: a limit below 1, or no times.
    """
    if line_characters < 1 or lines < 1 or not reading_speed >= 1:
        raise ValueError(
            f"subtitles of {lines} lines of {line_characters} characters, {reading_speed} read a "
            "second: expected at least 1 of each"
        )
    need_times(transcript)
    groups: list[list[Span]] = []
    for word, starts_segment in _words_of_segments(transcript):
        group = groups[-1] if groups else None
        if group is None or starts_segment or word.start - group[-1].end >= PAUSE_SECONDS:
            groups.append([word])
        elif (
            word.end - group[0].start > CUE_SECONDS
            or len(_lines([*group, word], line_characters)) > lines
        ):
            groups.append([*_behind_clause(group), word])
        else:
            group.append(word)
    spans = []
    for k, group in enumerate(groups):
        start = group[0].start
        start = max(start, spans[-1].end if spans else 0.0)
        reading_s = sum(width(word.text) + 1 - word.glued for word in group) / reading_speed
        end = max(group[-1].end, start + SHORTEST_CUE_SECONDS, start + reading_s)
        if transcript.duration > start:
            end = min(end, max(transcript.duration, start + LEAST_CUE_SECONDS))
        if k + 1 < len(groups):
            end = min(end, groups[k + 1][0].start)
        end = min(max(end, start + LEAST_CUE_SECONDS), start + CUE_SECONDS)
        spans.append(Span("\n".join(_lines(group, line_characters)), start, end))
    return spans


def _words_of_segments(transcript: "Transcript") -> Iterator[tuple[Span, bool]]:
    """Each word, and whether a segment starts with it. Words of scripts without spaces come in the
    parts that they may be cut in."""
    remaining = [_n_characters(segment) for segment in transcript.segments or ()]
    starts = True
    for word in transcript.words:
        if not word.text.strip():
            continue
        for part in _parts(word):
            yield part, starts
            starts = False
        if remaining:
            remaining[0] -= _n_characters(word)
            if remaining[0] <= 0:
                remaining.pop(0)
                starts = True


def _n_characters(span: Span) -> int:
    return len("".join(span.text.split()))


def _parts(word: Span) -> list[Span]:
    """A word that has no times within it is cut evenly."""
    texts = list(units(word.text)) if has_spaceless(word.text) else []
    if len(texts) < 2:
        return [word]
    parts, at, whole = [], 0, sum(map(len, texts))
    step = (word.end - word.start) / whole
    for text in texts:
        start, at = word.start + at * step, at + len(text)
        glued = bool(parts) or word.glued
        parts.append(Span(text, start, word.start + at * step, word.confidence, glued))
    return parts


def _behind_clause(group: list[Span]) -> list[Span]:
    """Takes what follows the last clause from the end of a group of a script without spaces, if
    that leaves a half of it or more."""
    for k in range(len(group) - 1, len(group) // 2 - 1, -1):
        if k and group[k].glued and group[k - 1].text[-1:] in CLAUSE_ENDS:
            rest = group[k:]
            del group[k:]
            return rest
    return []


def _lines(words: list[Span], characters: int) -> list[str]:
    text = joined(words)
    is_wide = width(text) > len(text)  # Korean is, and has spaces
    if text.isascii() or not (is_wide or any(word.glued for word in words)):
        return textwrap.wrap(text, characters, break_long_words=False, break_on_hyphens=False)
    lines = [""]
    for word in words:
        longer = f"{lines[-1]}{'' if word.glued or not lines[-1] else ' '}{word.text}"
        if lines[-1] and width(longer) > characters:
            lines.append(word.text)
        else:
            lines[-1] = longer
    return lines


def _clock(seconds: float, decimal_mark: str) -> str:
    milliseconds = round(max(seconds, 0.0) * 1000)
    minutes, milliseconds = divmod(milliseconds, 60000)
    return (
        f"{minutes // 60:02d}:{minutes % 60:02d}:"
        f"{milliseconds // 1000:02d}{decimal_mark}{milliseconds % 1000:03d}"
    )
