"""A long recording and its text, cut at pauses into clips that know what is said in them.

The text is aligned with the recording by the model's frames (`decoding.loose_alignment`), which may
leave passages of either out. Pauses are found in the sound; the words between two of them are a
part. Parts that end with a sentence are judged by what their text costs against what the model
hears by itself, on average and in its worst few words, beside the other parts of the recording: a
weak model is as good a judge as a strong one of what fits far worse than the rest.
"""

import dataclasses
import itertools
import math

import numpy as np
import torch

from fastconformer.decoding import ctc_align
from fastconformer.decoding.loose_alignment import FILLER, loose_align
from fastconformer.recordings.frame_losses import frame_losses
from training.data.passages import STEP_S, Word, quiet_steps, runs, words_of_text

EDGE_S = 0.15  # of silence that a clip keeps at its ends
MARGIN_S = 0.1  # at the ends of a pause in which a model may still hear a token
PART_S = 2.0  # shorter parts are judged together with the next one
WORST_WORDS = 4  # words of the worst window
DEVIATIONS = 3.5  # from the median of all parts, in median deviations, that a good part may cost
DEVIATION = 0.15  # of the median, at least: a few parts may be alike by chance
BACKWARDS = 1.3  # times the loss of the text, at least, that the same words have from last to first
FILLED_S = 0.25  # of other words between those of a part, that are too many
PACE = 2.5  # times slower or faster than usual, in seconds a token, is no reading of the text
WORST_LOSS, WORST_WINDOW = 1.0, 2.0  # nats a token that are never too many


@dataclasses.dataclass(frozen=True)
class Segment:
    """A clip: its time in the recording, its text, what the model heard, and its score: minus the
    nats that a token of the text costs against what was heard, 0 at best. `worst`: of its worst
    words. `reason`: why it is left out, empty where it is not."""

    start: float
    end: float
    text: str
    heard: str
    score: float
    worst: float
    reason: str = ""


def find_segments(
    model,
    samples: np.ndarray,
    text: str,
    *,
    pause_s: float = 0.3,
    max_s: float = 20.0,
    min_score: float | None = None,
    joined: bool = True,
    head: str | None = None,
    batch_size: int = 16,
    lang: str | None = None,
) -> list[Segment]:
    """The clips of a recording and what is left out of it and of the text, in order of time.

    Args:
        samples: (L,) mono, at the model's rate.
        text: what is said, and maybe more before, behind and between; lines and marks say where
            sentences end.
        pause_s: shortest silence at which a clip may end. max_s: longest clip.
        min_score: parts below it are left out; None: DEVIATIONS from what is usual here.
        joined: good parts that follow one another become one clip of at most max_s.
        head, batch_size: as `frame_losses` takes them.
        lang: of the text, where the model has a tokenizer for each language or is told one.
    Raises:
        ValueError: the model can write no word of the text, gives no frames, or does not know lang.
    """
    words = words_of_text(text, model.tokenizer, lang)
    used = sorted({token for word in words for token in word.tokens})
    if not used:
        raise ValueError("the text has no word that the model can write")
    losses, best = frame_losses(model, samples, used, head, batch_size, lang)
    seconds = len(samples) / model.sample_rate
    frame_s = model.config.frame_seconds
    quiet = quiet_steps(samples, model.sample_rate)
    silences = [(a * STEP_S, b * STEP_S) for a, b in runs(quiet)]
    column = {token: i for i, token in enumerate(used)}
    tokens = [[column[token] for token in word.tokens] for word in words]
    path = loose_align(
        losses,
        tokens,
        _frames_within(silences, frame_s, len(losses)),
        np.array([word.clause for word in words]),
    )
    found = _Aligned(path, losses, words, tokens, frame_s)
    parts = _parts(found, silences, seconds, pause_s, max_s)
    judged = _judge(found, parts, min_score)
    if joined:
        judged = _join(judged, max_s)

    def heard(start: float, end: float) -> str:
        ids = best[int(start / frame_s) : int(end / frame_s) + 1]
        kept = [int(i) for i, _ in itertools.groupby(ids) if i != model.blank_id]
        return model.tokenizer.decode(kept)

    segments = [
        Segment(
            *(part.start, part.end, _text_of(text, words, part.first, part.last)),
            *(heard(part.start, part.end), round(0.0 - part.loss, 3), round(0.0 - part.worst, 3)),
            part.reason,
        )
        for part in judged
    ]
    segments += _not_said(text, words, found, seconds)
    return sorted(segments, key=lambda segment: segment.start)


def _text_of(text: str, words: list[Word], first: int, last: int) -> str:
    return " ".join(text[words[first].start : words[last].end].split()) if last >= first else ""


def _frames_within(silences, frame_s: float, count: int) -> np.ndarray:
    pauses = np.zeros(count, dtype=bool)
    for start, end in silences:
        first, last = (start + MARGIN_S) / frame_s, (end - MARGIN_S) / frame_s
        pauses[int(np.ceil(first)) : max(0, int(last))] = True
    return pauses


# --- parts ---------------------------------------------------------------------------------------


class _Aligned:
    """A path, by word: first and last frame (-1: in no frame), tokens, loss in nats from its first
    frame to the next word's."""

    def __init__(self, path, losses, words, tokens: list[list[int]], frame_s: float):
        self.path, self.losses, self.words, self.frame_s = path, losses, words, frame_s
        self.tokens = tokens
        counts = np.array([len(word.tokens) for word in words])
        tokens = np.array([token for word in tokens for token in word])
        owner = np.repeat(np.arange(len(words)), counts)
        spoken = (path >= 0) & (path % 2 == 1)
        self.word_of = np.where(spoken, owner[np.clip(path // 2, 0, len(owner) - 1)], -1)
        label = np.where(
            spoken, tokens[np.clip(path // 2, 0, len(tokens) - 1)], losses.shape[1] - 1
        )
        loss = -losses[np.arange(len(path)), label]
        loss[path < 0] = FILLER
        self.sums = np.concatenate(([0.0], np.cumsum(loss, dtype=np.float64)))
        frames = np.flatnonzero(spoken)
        self.first = np.full(len(words), -1)
        self.last = np.full(len(words), -1)
        self.last[self.word_of[frames]] = frames
        self.first[self.word_of[frames[::-1]]] = frames[::-1]
        self.counts = counts
        self.marked = any(word.sentence for word in words[:-1])

    def torn(self, part: "_Part") -> bool:
        """Whether words of its first or last sentence are in no frame."""
        before, behind = part.first - 1, part.last + 1
        words, said = self.words, self.first >= 0
        return self.marked and bool(
            (said[: part.first].any() and not said[before] and not words[before].sentence)
            or (said[behind:].any() and not said[behind] and not words[part.last].sentence)
        )

    def longest_filler(self, first: int, last: int) -> float:
        """Seconds of other words in a row between two words."""
        inside = self.path[self.first[first] : self.last[last]] < 0
        return max((b - a for a, b in runs(inside)), default=0) * self.frame_s

    def backwards(self, part: "_Part", words: list[int]) -> float:
        """How many times the loss of a part the same words have there from last to first: near 1
        where the model hears nothing in particular, as in noise."""
        frames = [round(time / self.frame_s) for time in (part.start, part.end)]
        losses = torch.from_numpy(self.losses[frames[0] : frames[1]])[None].expand(2, -1, -1)
        orders = [self.tokens[w] for w in words], [self.tokens[w] for w in reversed(words)]
        texts = [[token for word in order for token in word] for order in orders]
        if len(words) == 1:
            texts[1].reverse()
        ahead, back = ctc_align(losses, torch.tensor([losses.shape[1]] * 2), texts)
        if texts[0] == texts[1] or ahead.score >= -1.0:
            return math.inf
        return back.score / ahead.score

    def loss(self, start: float, end: float) -> float:
        first, last = round(start / self.frame_s), round(end / self.frame_s)
        return self.sums[min(max(last, 0), len(self.path))] - self.sums[max(first, 0)]


@dataclasses.dataclass(frozen=True)
class _Part:
    """Words [first, last] between two cuts; last < first: none."""

    start: float
    end: float
    first: int
    last: int
    loss: float = 0.0  # nats a token
    worst: float = 0.0
    pace: float = 0.0  # seconds a token
    reason: str = ""


def _parts(found: _Aligned, silences, seconds: float, pause_s: float, max_s: float) -> list[_Part]:
    """What lies between two pauses in which no word is being said; parts of less than PART_S, or
    whose last word ends no sentence, go with the next one while that is no longer than max_s."""
    said = np.flatnonzero(found.first >= 0)
    cuts = [(0.0, 0.0, -1)]  # end of what is before, start of what is behind, last word before
    for start, end in silences:
        leads, trails = start <= STEP_S, end >= seconds - 2 * STEP_S
        if end - start < pause_s and not (leads or trails):
            continue
        middle = -1 if leads else len(found.path) if trails else (start + end) / 2 / found.frame_s
        before = said[found.first[said] <= middle]
        last = int(before[-1]) if len(before) else -1
        if last >= 0 and found.last[last] > middle:
            continue  # a pause within a word
        cuts.append((start, end, last))
    cuts.append((seconds, seconds, int(said[-1]) if len(said) else -1))
    parts = []
    for (_, start, before), (end, _, last) in itertools.pairwise(cuts):
        if end - start <= 0:
            continue
        inside = said[(said > before) & (said <= last)]
        first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (0, -1)
        parts += _halves(found, silences, _Part(start, end, first, last), max_s)
    return _with_edges(_sentences(found, parts, max_s), seconds)


def _halves(found: _Aligned, silences, part: _Part, max_s: float) -> list[_Part]:
    """A part that is too long, cut between two words where the silence, else the gap, is widest."""
    words = [w for w in range(part.first, part.last + 1) if found.first[w] >= 0]
    if part.end - part.start <= max_s or len(words) < 2:
        return [part]
    best, cut = (-1.0, -1.0), None
    for before, behind in itertools.pairwise(words):
        low = (found.last[before] + 1) * found.frame_s
        high = max(low, found.first[behind] * found.frame_s)
        inner = [
            (a, b) for a, b in silences if a < high and b > low and part.start < a < b < part.end
        ]
        a, b = max(inner, key=lambda run: run[1] - run[0], default=(low, low))
        if (b - a, high - low) > best:
            middle = (low + high) / 2
            best = b - a, high - low
            cut = (a, b, before, behind) if b > a else (middle, middle, before, behind)
    end, start, before, behind = cut
    left = _Part(part.start, end, part.first, before)
    right = _Part(start, part.end, behind, part.last)
    if left.end <= left.start or right.end <= right.start:
        return [part]
    return [*_halves(found, silences, left, max_s), *_halves(found, silences, right, max_s)]


def _sentences(found: _Aligned, parts: list[_Part], max_s: float) -> list[_Part]:
    built: list[_Part] = []
    for part in parts:
        before = built[-1] if built else None
        follows = (
            before and part.last >= part.first == before.last + 1 and before.last >= before.first
        )
        if follows and part.end - before.start <= max_s:
            short = min(before.end - before.start, part.end - part.start) < PART_S
            within = not found.words[before.last].sentence
            if within and (short or found.marked):
                built[-1] = dataclasses.replace(before, end=part.end, last=part.last)
                continue
        built.append(part)
    return built


def _with_edges(parts: list[_Part], seconds: float) -> list[_Part]:
    """Each with EDGE_S of the silence around it, never more than half of it."""
    ends = [0.0, *(part.end for part in parts)]
    starts = [*(part.start for part in parts), seconds]
    return [
        dataclasses.replace(
            part,
            start=part.start - min(EDGE_S, max(0.0, part.start - ends[i]) / 2),
            end=part.end + min(EDGE_S, max(0.0, starts[i + 1] - part.end) / 2),
        )
        for i, part in enumerate(parts)
    ]


# --- what fits -----------------------------------------------------------------------------------


def _judge(found: _Aligned, parts: list[_Part], min_score: float | None) -> list[_Part]:
    """The parts with their losses, and reasons where they are left out."""
    judged = []
    for part in parts:
        words = [w for w in range(part.first, part.last + 1) if found.first[w] >= 0]
        if not words:
            judged.append(dataclasses.replace(part, reason="no words of the text"))
            continue
        # of each word from its first frame to the next one's; the first and last to the edges
        borders = [found.first[w] * found.frame_s for w in words]
        borders[0] = part.start
        borders.append(part.end)
        nats = [found.loss(a, b) for a, b in itertools.pairwise(borders)]
        counts = found.counts[words]
        size = min(WORST_WORDS, len(words))
        worst = max(
            float(sum(nats[i : i + size]) / counts[i : i + size].sum())
            for i in range(len(words) - size + 1)
        )
        reason = ""
        if len(words) <= part.last - part.first or found.torn(part):
            reason = "words of the text that were not said"
        elif found.longest_filler(words[0], words[-1]) >= FILLED_S:
            reason = "words that the text has not"
        elif found.backwards(part, words) < BACKWARDS:
            reason = "the same words backwards fit as well"
        loss = float(sum(nats) / counts.sum())
        pace = (part.end - part.start) / counts.sum()
        judged.append(dataclasses.replace(part, loss=loss, worst=worst, pace=pace, reason=reason))
    fitting = [part for part in judged if not part.reason]
    usual = float(np.median([part.pace for part in fitting])) if fitting else 1.0
    judged = [
        dataclasses.replace(part, reason="far slower or faster than the rest")
        if not part.reason and not usual / PACE <= part.pace <= usual * PACE
        else part
        for part in judged
    ]
    fitting = [part for part in judged if not part.reason]
    if min_score is None:
        most = _usual([part.loss for part in fitting], WORST_LOSS)
        worst = _usual([part.worst for part in fitting], WORST_WINDOW)
    else:
        most = worst = -min_score
    judged = [
        part
        if part.reason or (part.loss <= most and (part.worst <= worst or min_score is not None))
        else dataclasses.replace(part, reason="the words are not those that were heard")
        for part in judged
    ]
    for this, other in _neighbours(len(judged)):
        bad, part = judged[this], judged[other]
        touch = bad.end == part.start or part.end == bad.start
        if bad.reason and not part.reason and touch:
            reason = "no pause parts it from what is left out"
            judged[other] = dataclasses.replace(part, reason=reason)
    return judged


def _neighbours(count: int):
    """Each part with the next one, then, from the last, with the one before."""
    yield from itertools.pairwise(range(count))
    yield from itertools.pairwise(reversed(range(count)))


def _usual(losses: list[float], least: float) -> float:
    """What a good part may cost: DEVIATIONS above the median, `least` at least."""
    if not losses:
        return least
    median = float(np.median(losses))
    deviation = 1.4826 * float(np.median(np.abs(np.array(losses) - median)))
    return max(least, median + DEVIATIONS * max(deviation, DEVIATION * median))


def _join(parts: list[_Part], max_s: float) -> list[_Part]:
    """Good parts whose words follow one another, together up to max_s."""
    joined: list[_Part] = []
    for part in parts:
        before = joined[-1] if joined else None
        if (
            before
            and not (before.reason or part.reason)
            and part.first == before.last + 1
            and part.end - before.start <= max_s
        ):
            spans = before.end - before.start, part.end - part.start
            loss = float(np.average([before.loss, part.loss], weights=spans))
            worst = max(before.worst, part.worst)
            joined[-1] = dataclasses.replace(
                before, end=part.end, last=part.last, loss=loss, worst=worst
            )
        else:
            joined.append(part)
    return joined


def _not_said(text: str, words: list[Word], found: _Aligned, seconds: float) -> list[Segment]:
    """Passages of the text in no frame, between parts, before and behind them."""
    passages, at = [], 0.0
    for absent, group in itertools.groupby(range(len(words)), lambda w: found.first[w] < 0):
        run = list(group)
        if absent:
            said = _text_of(text, words, run[0], run[-1])
            passages.append(Segment(at, at, said, "", 0.0, 0.0, "the text was not said"))
        else:
            at = min(seconds, (int(found.last[run[-1]]) + 1) * found.frame_s)
    return passages
