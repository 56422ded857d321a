"""CTC greedy decoding: the best class of each frame, runs collapsed, blanks dropped."""

from collections.abc import Iterable

import torch

from ..transfers import on_host
from .confidence import Confidence
from .hypothesis import Hypothesis

LOG_PROBS = 1 << 23  # log-probabilities in memory at once where callers give them in pieces


def ctc_greedy(
    log_probs: torch.Tensor | Iterable[torch.Tensor],
    lengths: torch.Tensor,
    bias: torch.Tensor | None = None,
    confidence: Confidence | None = None,
) -> list[Hypothesis]:
    """log_probs (B, T', V+1), blank last; lengths (B,). They may come in pieces, in the order of
    time, of which one at a time is looked at: a day of them would not fit. Runs are found on the
    host, which the best classes reach in one transfer. The score sums the best log-probability of
    every frame that is not blank, as NeMo's greedy CTC does.

    Args:
        bias: (V+1,) added to the log-probabilities, -inf for tokens that must not occur.
        confidence: also give the confidence of each token, aggregated over its run.
    """
    best, labels, of_frame = [], [], []
    for piece in (log_probs,) if isinstance(log_probs, torch.Tensor) else log_probs:
        piece = piece if bias is None else piece + bias.to(piece)
        blank = piece.shape[-1] - 1
        most, label = piece.max(-1)  # (B, T')
        best.append(most)
        labels.append(label)
        if confidence is not None:
            of_frame.append(confidence.of(piece, blank + 1))
    best, labels = torch.cat(best, dim=1), torch.cat(labels, dim=1)
    valid = torch.arange(labels.shape[1], device=labels.device) < lengths[:, None]
    labels = labels.masked_fill(~valid, blank)
    spoken = labels != blank
    scores = (best.float() * spoken).sum(-1)
    if confidence is not None:
        of_frame = [torch.cat(of_frame, dim=1)]
    labels, scores, *of_frame = on_host(labels, scores, *of_frame)
    spoken, scores = labels != blank, scores.tolist()
    rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    # one run a clip boundary at least: the row is part of what must be equal within a run
    runs, run_lengths = torch.unique_consecutive(
        (labels + rows * (blank + 1)).flatten(), return_counts=True
    )
    starts = run_lengths.cumsum(0) - run_lengths
    tokens, row = runs % (blank + 1), runs.div(blank + 1, rounding_mode="floor")
    kept = tokens != blank
    counts = torch.bincount(row[kept], minlength=len(labels)).tolist()
    fields = (tokens[kept], (starts - row * labels.shape[1])[kept], run_lengths[kept])
    tokens, frames, spans = torch.stack(fields).tolist()
    sure = None
    if confidence is not None:
        of_frame = of_frame[0][spoken].tolist()  # runs, back to back
        sure, at = [], 0
        for span in spans:
            sure.append(confidence.aggregate(of_frame[at : at + span]))
            at += span
    hypotheses, first = [], 0
    for count, score in zip(counts, scores):
        part = slice(first, first + count)
        hypotheses.append(
            Hypothesis(
                tokens[part], frames[part], spans[part], score, None if sure is None else sure[part]
            )
        )
        first += count
    return hypotheses


def ctc_next(
    hypotheses: list[Hypothesis],
    log_probs: torch.Tensor,
    first_frames: list[int],
    state: list[torch.Tensor] | None,
) -> list[torch.Tensor]:
    """Goes on with greedy decoding where `state` (None: the start) left off.

    log_probs (B, C, V+1), all valid, whose first frames are the `first_frames`th of their clips;
    what is found is added to the `hypotheses`. Returns the state after them: the class of the last
    frame, (B, 1).
    """
    blank = log_probs.shape[-1] - 1
    most, labels = log_probs.max(-1)
    before = torch.full_like(labels[:, :1], blank) if state is None else state[0]
    rows = zip(hypotheses, first_frames, before[:, 0].tolist(), labels.tolist(), most.tolist())
    for hypothesis, first, last, classes, scores in rows:
        for frame, (label, score) in enumerate(zip(classes, scores), start=first):
            if label != blank:
                hypothesis.score += score
                if label == last:
                    hypothesis.durations[-1] += 1
                else:
                    hypothesis.tokens.append(label)
                    hypothesis.frames.append(frame)
                    hypothesis.durations.append(1)
            last = label
    return [labels[:, -1:]]
