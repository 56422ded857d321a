"""Transcripts as text, JSON and CTM: functions of one Transcript."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..recordings.transcript import Transcript


def escaped(text: str) -> str:
    """Control characters, which a file's name may hold, as escapes; tab and newline stay."""
    if text.isprintable():
        return text
    return "".join(
        c if c in "\t\n" or not (c < " " or "\x7f" <= c < "\xa0") else f"\\x{ord(c):02x}"
        for c in text
    )


def to_text(transcript: "Transcript", name: str | None = None) -> str:
    """The text on a line, after `name` and a tab if there is a name. Where words have times, one
    line for each follows: start, end (seconds), word, after tabs where there is a name."""
    prefix = "" if name is None else "\t"
    name = escaped(name or "").replace("\n", "\\n").replace("\t", "\\t")
    lines = [f"{name}{prefix}{transcript.text}"]
    lines += [f"{prefix}{w.start:.2f}\t{w.end:.2f}\t{w.text}" for w in transcript.words or ()]
    return "\n".join(lines) + "\n"


def to_ctm(transcript: "Transcript", name: str, offset_s: float = 0.0, channel: int = 1) -> str:
    """NIST CTM, a line a word: `name channel start duration word`, seconds counted from the start
    of the recording, in which the clip begins at `offset_s`; channels from 1. ValueError: the
    transcript has no times."""
    need_times(transcript)
    name = escaped("_".join(name.split()) or "-")
    return "".join(
        f"{name} {channel} {offset_s + w.start:.3f} {max(w.end - w.start, 0):.3f} {w.text}\n"
        for w in transcript.words
        if w.text.strip()
    )


def to_json(transcript: "Transcript", **fields) -> dict:
    """All fields of the transcript after `fields`, of types that JSON has; spans become objects
    with text, start, end and, where there is one, confidence. A score that is not finite becomes
    None. Confidences, retries and doubts are left out where there are none."""

    def of_span(span):
        sure = {} if span.confidence is None else {"confidence": round(span.confidence, 6)}
        times = {"start": round(span.start, 6), "end": round(span.end, 6)}
        return {"text": span.text} | times | sure

    def spans(items):
        return None if items is None else [of_span(item) for item in items]

    seldom = {}
    if transcript.confidences is not None:
        seldom["confidences"] = [round(value, 6) for value in transcript.confidences]
    if transcript.doubtful:
        seldom["doubtful"] = transcript.doubtful
    if transcript.retries:
        seldom["retries"] = spans(transcript.retries)
    return (
        fields
        | {
            "text": transcript.text,
            "duration": round(transcript.duration, 6),
            "head": transcript.head,
            "score": float(transcript.score) if math.isfinite(transcript.score) else None,
            "tokens": transcript.tokens,
            "token_frames": transcript.token_frames,
            "token_durations": transcript.token_durations,
            "words": spans(transcript.words),
            "segments": spans(transcript.segments),
        }
        | seldom
    )


def need_times(transcript: "Transcript") -> None:
    """ValueError: the transcript has no times."""
    if transcript.words is None:
        raise ValueError("the transcript has no times; transcribe with timestamps=True")
