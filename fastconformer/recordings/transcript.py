"""What a decoder found -> text, with the times of its words."""

import html
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..decoding import Confidence, Hypothesis
from .align import align_tokens
from .timestamps import Span, in_seconds, segment_spans, without_collection

logger = logging.getLogger(__name__)


@dataclass(repr=False)
class Transcript:
    """The text of one clip.

    tokens: ids; token_frames: encoder frame of each; token_durations: frames each spans (None for
    RNNT); words and segments: times in seconds, None unless asked for; score: sum of the
    log-probabilities that were chosen (see docs/formats.md); head: which head spoke; duration: the
    clip's seconds; confidences: of each token, None unless asked for (words then have theirs);
    retries: stretches of speech over which the head had gone silent, with the text that a second
    try found there; error: why there is no text, where that was asked for; doubtful: why the text
    may be of no speech, None where nothing tells so.
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
    error: str | None = None
    doubtful: str | None = None

    def __repr__(self) -> str:
        said = self.text if len(self.text) <= 60 else f"{self.text[:59]}…"
        failed = f", error={self.error!r}" if self.error else ""
        failed += ", doubtful" if self.doubtful else ""
        return f"Transcript({said!r}, {self.head}, {self.duration:.2f} s{failed})"

    def _repr_html_(self) -> str:
        """In a notebook: the text, with the times of its segments where there are some."""
        rows = [
            f"<tr><td>{s.start:.2f}</td><td>{s.end:.2f}</td><td>{html.escape(s.text)}</td></tr>"
            for s in self.segments or ()
        ]
        text = html.escape(self.text or self.error or "")
        return f"<table>{''.join(rows)}</table>" if rows else f"<p>{text}</p>"


def transcript(
    model,
    hypothesis: Hypothesis,
    head: str,
    duration_s: float,
    timestamps: bool = False,
    shift_s: float = 0.0,
    confidence: Confidence | None = None,
    retries: Sequence[tuple[int, int, str]] = (),
    samples: np.ndarray | None = None,
) -> Transcript:
    """Text and, if asked for, times of what a decoder found; `shift_s` is silence that was put in
    front of the clip; `confidence` is how tokens' confidences become words'; `retries` is what
    `retry_stuck` gave; `samples`, of the clip, are for a model whose words another one aligns."""
    words = segments = None
    config, chosen = model.config, model.head(head)
    times = config.frame_seconds, shift_s, duration_s
    text = chosen.text(hypothesis)
    if timestamps and chosen.aligner is not None and samples is not None:
        words = _aligned_words(chosen.aligner, samples, text)
        segments = segment_spans(words, config.segment_separators)
    elif timestamps:
        with without_collection():
            words = chosen.words(hypothesis, confidence.aggregate if confidence else min)
            segments = segment_spans(words, config.segment_separators, config.segment_gap_frames)
            words, segments = in_seconds(words, *times), in_seconds(segments, *times)
    return Transcript(
        text=text,
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


def _aligned_words(aligner, samples: np.ndarray, text: str) -> list[Span]:
    """Words of a text, timed by the model for it; none where they do not fit into the clip."""
    _, tokens, ends = aligned_tokens(aligner, samples, text)
    bounds = itertools.pairwise([0, *ends]) if tokens else ()
    return [
        Span(word, tokens[first].start, tokens[end - 1].end)
        if first < end
        else Span(word, tokens[max(0, first - 1)].end, tokens[max(0, first - 1)].end)
        for word, (first, end) in zip(text.split(), bounds)
    ]


def aligned_tokens(aligner, samples: np.ndarray, text: str):
    """`align_tokens`, or nothing of a text that does not fit into the clip."""
    try:
        return align_tokens(aligner, samples, text) if text.split() else ([], [], [])
    except ValueError as error:
        logger.warning("no times for %r: %s", text[:60], error)
        return [], [], []
