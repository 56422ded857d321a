"""What a decoder found -> text, with the times of its words."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..decoding import Confidence, Hypothesis
from .timestamps import Span, in_seconds, segment_spans, without_collection


@dataclass
class Transcript:
    """The text of one clip.

    tokens: ids; token_frames: encoder frame of each; token_durations: frames each spans (None for
    RNNT); words and segments: times in seconds, None unless asked for; score: log-probability of
    the path that was taken; head: which head spoke; duration: the clip's seconds; confidences: of
    each token, None unless asked for (words then have theirs); retries: stretches of speech over
    which the head had gone silent, with the text that a second try found there.
    """

    text: str
    tokens: list[int]
    token_frames: list[int]
    token_durations: list[int] | None
    words: list[Span] | None
    segments: list[Span] | None
    score: float
    head: str
    duration: float
    confidences: list[float] | None = None
    retries: list[Span] = field(default_factory=list)


def transcript(
    model,
    hypothesis: Hypothesis,
    head: str,
    duration_s: float,
    timestamps: bool = False,
    shift_s: float = 0.0,
    confidence: Confidence | None = None,
    retries: Sequence[tuple[int, int, str]] = (),
) -> Transcript:
    """Text and, if asked for, times of what a decoder found; `shift_s` is silence that was put in
    front of the clip; `confidence` is how tokens' confidences become words'; `retries` is what
    `retry_stuck` gave."""
    words = segments = None
    config, chosen = model.config, model.head(head)
    times = config.frame_seconds, shift_s, duration_s
    if timestamps:
        with without_collection():
            words = chosen.words(hypothesis, confidence.aggregate if confidence else min)
            segments = segment_spans(words, config.segment_separators, config.segment_gap_frames)
            words, segments = in_seconds(words, *times), in_seconds(segments, *times)
    return Transcript(
        text=chosen.text(hypothesis),
        tokens=hypothesis.tokens,
        token_frames=hypothesis.frames,
        token_durations=hypothesis.durations,
        words=words,
        segments=segments,
        score=hypothesis.score,
        head=head,
        duration=duration_s,
        confidences=hypothesis.confidences,
        retries=in_seconds([Span(text, first, end) for first, end, text in retries], *times),
    )
