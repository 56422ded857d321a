"""Beam search of RNNT and TDT over a batch, with scores beside the audio's.

All hypotheses of all clips take one arc a step: a blank or a token, with each of the durations.
Hypotheses of a clip that have come to the same frame with the same tokens are merged. A hypothesis
that has passed the clip's end leaves the beam; the best of those that left, by its score per token,
is the answer. With a beam of 1 every step takes the arc that greedy decoding takes.

Source: alignment-length synchronous search (Saon et al. 2020) with TDT's durations as NeMo's
`malsd_batch` has it; blank and language model as in NeMo's `lm_weighted_full`: what a language
model may redistribute is the probability that is not blank's.
"""

import numpy as np
import torch

from ..networks.heads import Joint, PredictionNetwork
from .confidence import Confidence
from .ctc_beam import HASH_BASE
from .fusion import Fusion
from .hypothesis import Hypothesis

_CANDIDATES = 32  # tokens that may follow a hypothesis: the most probable ones


@torch.no_grad()
def transducer_beam(
    encoded: torch.Tensor,
    lengths: torch.Tensor,
    decoder: PredictionNetwork,
    joint: Joint,
    blank: int,
    beam: int,
    durations: tuple[int, ...] = (),
    max_symbols: int | None = 10,
    fusion: Fusion | None = None,
    blank_scale: float = 0.0,
    bias: torch.Tensor | None = None,
    confidence: Confidence | None = None,
    score_norm: bool = True,
) -> list[Hypothesis]:
    """The best hypothesis of each clip.

    Args:
        encoded: (B, T', D); lengths: (B,). Empty `durations`: RNNT.
        beam: hypotheses kept after each step.
        fusion: a language model, phrases; None: the audio alone.
        blank_scale: weight of the language model, for what it leaves to blank.
        bias: (V+1,) added to the token logits, -inf for tokens that must not occur.
        score_norm: compare finished hypotheses by score / (tokens + 1), not by score.
    Returns:
        Hypotheses whose score is the log-probability of their arcs plus the fusion's.
    """
    batch, device = len(lengths), encoded.device
    n, infinity = batch * beam, torch.inf
    projected = joint.enc(encoded)  # (B, T', J)
    arcs = torch.tensor(durations or (0,), device=device)  # of a token
    blank_arcs = arcs.clamp(min=1)
    n_arcs, n_tokens = len(arcs), min(_CANDIDATES, blank)
    bias = None if bias is None else bias.to(projected)

    rows = torch.arange(batch, device=device)[:, None]
    slots = torch.arange(beam, device=device)
    scores = torch.full((batch, beam), -infinity, dtype=torch.float32, device=device)
    scores[:, 0] = torch.where(lengths > 0, 0.0, -infinity)
    frame = torch.zeros(batch, beam, dtype=torch.long, device=device)
    on_frame, count = torch.zeros_like(frame), torch.zeros_like(frame)
    hashes = torch.zeros_like(frame) + slots
    output, state = decoder.start(n)
    predicted = joint.pred(output)
    h, c = (torch.stack(part) for part in zip(*state))  # (layers, B*K, H)
    states = fusion.start().expand(batch, beam, -1) if fusion else None
    if isinstance(blank_scale, torch.Tensor):
        blank_scale = blank_scale.repeat_interleave(beam)  # (B*K,)
    offset = torch.zeros(batch, 1, dtype=torch.double, device=device)  # taken off from all scores
    best = torch.full_like(offset[:, 0], -infinity)  # normalised, of the finished
    best_score = torch.zeros_like(best)
    best_at = torch.zeros(batch, 2, dtype=torch.long, device=device)  # step + 1, slot
    trail, surenesses = [], []
    last_frame = (lengths - 1).clamp(min=0)[:, None]

    while bool((scores > -infinity).any()):
        frames = projected[rows, torch.minimum(frame, last_frame)].view(n, -1)
        logits = joint.step(frames, predicted).float()
        token_logits = logits[:, : blank + 1]
        if bias is not None:
            token_logits = token_logits + bias
        log_probs = token_logits.log_softmax(-1)
        of_blank = log_probs[:, blank]
        top, tokens = log_probs[:, :blank].topk(n_tokens, -1)  # (B*K, C)
        if fusion:
            score, after = fusion.score(states.reshape(n, -1), tokens)
            spoken = torch.log(-torch.expm1(of_blank.clamp(max=-1e-7)))
            top = top + score + (blank_scale * spoken)[:, None]
            of_blank = of_blank * (1 + blank_scale)
        of_arc = logits[:, blank + 1 :].log_softmax(-1) if durations else logits.new_zeros(n, 1)
        # a choice: (token or blank) x arc; blank comes first
        choices = torch.cat((of_blank[:, None], top), 1)[..., None] + of_arc[:, None]
        choices = scores[..., None] + choices.view(batch, beam, -1)
        scores, picked = choices.flatten(1).topk(beam, -1)  # (B, K)
        # the best becomes 0: float32 must tell small differences after hours, too
        shift = torch.where(scores[:, :1] > -infinity, scores[:, :1], 0.0)
        scores, offset = scores - shift, offset + shift
        before, choice = picked // choices.shape[2], picked % choices.shape[2]
        place, arc = choice // n_arcs, choice % n_arcs
        is_token = place > 0
        flat = (rows * beam + before).view(-1)  # row of the hypothesis before
        place = (place - 1).clamp(min=0)
        token = tokens.view(batch, beam, -1)[rows, before, place]
        skip = torch.where(is_token, arcs[arc], blank_arcs[arc])
        at = frame.gather(1, before)
        trail.append(torch.stack((before, torch.where(is_token, token, -1), at, skip)))
        if confidence is not None:
            sure = confidence.of(log_probs, blank + 1)
            if confidence.include_duration and durations:
                both = torch.stack((sure, confidence.of(of_arc, blank + 1)))
                pairs = {"mean": torch.mean, "min": torch.amin, "max": torch.amax}
                sure = pairs.get(confidence.aggregation, torch.prod)(both, 0)
            surenesses.append(sure[flat].view(batch, beam))

        on_frame = on_frame.gather(1, before) + is_token
        on_frame = on_frame.masked_fill(skip > 0, 0)
        if max_symbols is not None:
            stuck = on_frame >= max_symbols
            skip, on_frame = skip + stuck, on_frame.masked_fill(stuck, 0)
        frame = at + skip
        count = count.gather(1, before) + is_token
        hashes = hashes.gather(1, before)
        hashes = torch.where(is_token, hashes * HASH_BASE + token + 1, hashes)
        if fusion:
            old = states[rows, before]
            new = after.view(batch, beam, n_tokens, -1)[rows, before, place]
            states = torch.where(is_token[..., None], new, old)

        # one hypothesis for the same tokens on the same frame; the first slot is the better one
        same = (hashes[:, :, None] == hashes[:, None]) & (frame[:, :, None] == frame[:, None])
        earlier = slots[:, None] > slots  # (slot, an earlier one)
        double = (same & earlier).any(-1)
        summed = scores[:, None].masked_fill(~same, -infinity).logsumexp(-1)
        scores = summed.masked_fill(double, -infinity) if beam > 1 else scores

        # those past the end
        ended = (frame >= lengths[:, None]) & (scores > -infinity)
        final = scores + offset
        if fusion:
            final = final + fusion.final(states.reshape(n, -1)).view(batch, beam)
        normal = (final / (count + 1) if score_norm else final).masked_fill(~ended, -infinity)
        value, slot = normal.max(-1)
        better = value > best
        best = torch.where(better, value, best)
        best_score = torch.where(better, final.gather(1, slot[:, None])[:, 0], best_score)
        here = torch.stack((torch.full_like(slot, len(trail)), slot), -1)
        best_at = torch.where(better[:, None], here, best_at)
        scores = scores.masked_fill(ended, -infinity)

        h, c, predicted = h[:, flat], c[:, flat], predicted[flat]
        fed = is_token & (scores > -infinity)
        if bool(fed.any()):
            token = torch.where(is_token, token, 0).view(-1)
            output, after_state = decoder.step(token, list(zip(h, c)))
            keep = is_token.view(-1, 1)
            predicted = torch.where(keep, joint.pred(output), predicted)
            h_after, c_after = (torch.stack(part) for part in zip(*after_state))
            h, c = torch.where(keep, h_after, h), torch.where(keep, c_after, c)
    return _trace_back(trail, surenesses, best_at, best_score, bool(durations))


def _trace_back(trail, surenesses, best_at, best_score, with_durations) -> list[Hypothesis]:
    """Follows the arcs, (slot before, token or -1, frame, duration) (4, B, K) of each step, from
    where the best hypothesis of each clip ended."""
    steps, slots = best_at.T.cpu().numpy()
    longest, clips = steps.max(initial=0), np.arange(len(best_at))
    path = np.full((4, longest, len(clips)), -1.0)  # token, frame, duration, confidence
    if longest:
        befores, *fields = torch.stack(trail[:longest], 1).cpu().numpy()  # (steps, B, K)
        fields = np.stack(fields)
        if surenesses:
            sure = torch.stack(surenesses[:longest]).cpu().numpy()
    for step in range(longest - 1, -1, -1):
        inside = step < steps
        path[:3, step] = np.where(inside, fields[:, step, clips, slots], -1)
        if surenesses:
            path[3, step] = sure[step, clips, slots]
        slots = np.where(inside, befores[step, clips, slots], slots)
    hypotheses = []
    for clip, score in enumerate(best_score.tolist()):
        arcs = path[:, path[0, :, clip] >= 0, clip]
        tokens, frames, spans = arcs[:3].astype(np.int64).tolist()
        hypotheses.append(
            Hypothesis(
                tokens,
                frames,
                spans if with_durations else None,
                score,
                arcs[3].tolist() if surenesses else None,
            )
        )
    return hypotheses
