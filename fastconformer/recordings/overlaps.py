"""Long recordings in pieces that share a second, joined where their tokens agree: NeMo's way for
Canary.

Source: NeMo 3.0.0's `_find_optimal_chunk_size` and `lcs_alignment_merge_buffer`.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from ..decoding import Hypothesis
from .timestamps import Span, segment_spans, word_spans
from .transcript import Transcript, aligned_tokens

SHORTEST_S, LONGEST_S, OVERLAP_S = 30, 40, 1.0
HOUR_S = 3600  # NeMo cuts hours first, which share nothing
# Of an overlap's frames so many are taken for tokens, and the text before it is searched so far
# back, in frames of the overlap.
_SHARE, _BACK = 0.6, 2


def cut_with_overlap(n_samples: int, rate_hz: int) -> list[tuple[int, int]]:
    """(first, end) samples of pieces of 30 to 40 s; one piece of what is shorter than 40 s."""
    bounds = []
    for hour in range(0, n_samples, HOUR_S * rate_hz):
        total = min(n_samples - hour, HOUR_S * rate_hz)
        size, overlap = _piece_samples(total, rate_hz), int(OVERLAP_S * rate_hz)
        starts = range(0, max(1, total - overlap), size - overlap) if size < total else [0]
        bounds += [(hour + start, hour + min(start + size, total)) for start in starts]
    return bounds


def _piece_samples(total: int, rate: int) -> int:
    """The length, in whole seconds, whose last piece is longest."""
    if total < LONGEST_S * rate:
        return total
    overlap, best, longest_last = int(OVERLAP_S * rate), SHORTEST_S * rate, 0
    for seconds in range(SHORTEST_S, LONGEST_S + 1):
        step = seconds * rate - overlap
        last = total - step * (-(-total // step) - 1)
        if seconds * rate <= total and last > longest_last:
            best, longest_last = seconds * rate, last
    return best


def seam(left: Sequence[int], right: Sequence[int], overlap_frames: int) -> tuple[int, int]:
    """How tokens of two pieces that share `overlap_frames` of audio are joined, as NeMo does it:
    (tokens of `left` that stay, tokens at the beginning of `right` that go), after the longest run
    that the end of `left` and the beginning of `right` have in common."""
    left, begin = list(left), list(right[: int(overlap_frames * _SHARE)])
    if overlap_frames < 1 or not left:
        return len(left), 0
    base = max(0, len(left) - _BACK * overlap_frames)
    at, first, length = _common_run(left[base:], begin)
    if length < 1:
        return len(left), 0
    return base + at + length, min(first + length, len(begin))


def _common_run(x: list[int], y: list[int]) -> tuple[int, int, int]:
    """Where the end of x agrees with the beginning of y: (place in x, place in y, length), length
    0 where nothing does.

    runs[i, j] counts the tokens that agree right before place i of x and j of y. A longest run that
    ends where x ends is taken. Otherwise the run must be longer than one token; of those ending
    late in x and early in y it is the longest, and it grows on towards the end of x with one
    mismatch more at each step that finds none.
    """
    m, n = len(x), len(y)
    runs = np.zeros((m + 1, n + 1), dtype=int)
    for i in range(1, m + 1):
        for j in range(1, n + 1):
            if x[i - 1] == y[j - 1]:
                runs[i, j] = runs[i - 1, j - 1] + 1
    longest = int(runs.max())
    if not longest:
        return 0, 0, 0
    i, j = (int(k) for k in np.argwhere(runs == longest)[-1])
    if i == m:
        return i - longest, j - longest, longest
    best, i, j = 0, m, -1
    bound = n
    for row in range(m, -1, -1):
        for column in range(bound + 1):
            if runs[row, column] > best and column <= bound:
                best, bound, i, j = int(runs[row, column]), column, row, column
    if best <= 1:
        return i, 0, 0
    skipped = grown = 0
    for step, row in enumerate(range(i + 1, m + 1), start=1):
        missed = 0
        for column in range(j + step, min(j + step + skipped, n) + 1):
            if runs[row, column]:
                grown = 1 + skipped + missed
            else:
                missed = 1
        skipped += missed
    j += grown
    length = jumped = 0
    while i > 0 and j > 0:
        if not runs[i, j]:
            j, jumped = j - 1, jumped + 1
        if j > 0:
            i, j, length = i - 1, j - 1, length + 1
    return max(i, 0), max(j, 0), length + jumped


def matched(
    spans: Sequence[Sequence[Span]], ids: Sequence[Sequence[int]], joined: Sequence[int]
) -> list[Span]:
    """The timed tokens of all pieces that make the joined text, in its order: each is the next one
    that is the token wanted (so does NeMo). None starts before the one before it ends."""
    kept: list[Span] = []
    for of_piece, numbers in zip(spans, ids):
        for token, number in zip(of_piece, numbers):
            if len(kept) < len(joined) and number == joined[len(kept)]:
                end = kept[-1].end if kept else token.start
                if token.start < end:
                    token = Span(token.text, end, end, token.confidence)
                kept.append(token)
    return kept


def by_times(pieces: Sequence[Sequence[Span]], seams_s: Sequence[float]) -> list[Span]:
    """Words of pieces that overlap around `seams_s`, in seconds: each word whose middle lies on its
    piece's side of the seams."""
    edges = [-np.inf, *seams_s, np.inf]
    return [
        word
        for words, begin, end in zip(pieces, edges, edges[1:])
        for word in words
        if begin <= (word.start + word.end) / 2 < end
    ]


def join_overlapping(
    model,
    parts: Sequence[Transcript],
    clips: Sequence[np.ndarray],
    cut: Sequence[tuple[int, int]],
    timestamps: bool,
) -> Transcript:
    """The transcripts of a recording's pieces, which may overlap, as one. `cut`: their bounds in
    samples."""
    config, chosen = model.config, model.head(parts[0].head)
    rate, frame_s = model.sample_rate, config.frame_seconds
    starts_s = [start / rate for start, _ in cut]
    shared_s = [max(0, end - start) / rate for (_, end), (start, _) in itertools.pairwise(cut)]
    whole = _Joined([part.tokens for part in parts], [int(s / frame_s) for s in shared_s])
    tokens = whole.of([part.tokens for part in parts])
    text, words, segments = chosen.text(Hypothesis(tokens)), None, None
    if timestamps and chosen.aligner is not None:
        words, text = _aligned_pieces(chosen.aligner, parts, clips, starts_s, shared_s)
    elif timestamps:
        shifted = [_later(part.words, start) for part, start in zip(parts, starts_s)]
        seams_s = [start + shared / 2 for start, shared in zip(starts_s[1:], shared_s)]
        words = by_times(shifted, seams_s) if any(shared_s) else list(itertools.chain(*shifted))
        text = " ".join(word.text for word in words) if any(shared_s) and words else text
    if timestamps:
        gap = config.segment_gap_frames
        segments = segment_spans(words, config.segment_separators, gap and gap * frame_s)
    frames = [
        [f + round(start / frame_s) for f in p.token_frames] for p, start in zip(parts, starts_s)
    ]
    has_durations = all(part.token_durations is not None for part in parts)
    has_confidences = all(part.confidences is not None for part in parts)
    return Transcript(
        text=text,
        tokens=tokens,
        token_frames=whole.of(frames),
        token_durations=whole.of([p.token_durations for p in parts]) if has_durations else None,
        words=words,
        segments=segments,
        score=sum(part.score for part in parts),
        head=chosen.name,
        duration=cut[-1][1] / rate,
        confidences=whole.of([p.confidences for p in parts]) if has_confidences else None,
        retries=[r for p, start in zip(parts, starts_s) for r in _later(p.retries, start)],
    )


class _Joined:
    """Which of the pieces' tokens the joined text has."""

    def __init__(self, tokens: Sequence[Sequence[int]], shared_frames: Sequence[int]):
        joined, self.places = list(tokens[0]), [(0, i) for i in range(len(tokens[0]))]
        for number, (of_piece, shared) in enumerate(zip(tokens[1:], shared_frames), start=1):
            stay, go = seam(joined, of_piece, shared)
            joined = joined[:stay] + list(of_piece[go:])
            added = [(number, i) for i in range(go, len(of_piece))]
            self.places = self.places[:stay] + added

    def of(self, values: Sequence[Sequence]) -> list:
        """Of one value for each piece's token, those of the tokens that are left."""
        return [values[piece][i] for piece, i in self.places if values[piece]]


def _later(spans: Sequence[Span], start_s: float) -> list[Span]:
    return [Span(s.text, s.start + start_s, s.end + start_s, s.confidence, s.glued) for s in spans]


def _aligned_pieces(aligner, parts, clips, starts_s, shared_s) -> tuple[list[Span], str]:
    """Words and text of pieces whose tokens, as the aligner has them, are joined where they agree:
    NeMo's way, which may leave a word spread over what two pieces say."""
    ids, spans = [], []
    for part, clip, start in zip(parts, clips, starts_s):
        tokens, timed, _ = aligned_tokens(aligner, clip, part.text)
        ids.append(tokens)
        spans.append(_later(timed, start))
    frame_s = aligner.config.frame_seconds
    tokens = _Joined(ids, [int(shared / frame_s) for shared in shared_s]).of(ids)
    kept = matched(spans, ids, tokens)
    tokenizer = aligner.tokenizer
    words = word_spans(kept, tokenizer.ids_to_pieces(tokens[: len(kept)]), tokenizer)
    return words, tokenizer.decode(tokens)
