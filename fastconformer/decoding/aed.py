"""Greedy and beam search for an attention decoder, over a batch, with a cache of keys and values.

Greedy is a beam of one. A clip's result does not depend on the clips beside it: it has its own
prompt, length limit and end, and leaves the batch when it is done.

Source: NeMo 3.0.0's BeamSearchSequenceGenerator, with three of its faults mended: an EOS in first
place ends a hypothesis, hypotheses of a clip never read another clip's prompt, and a score is
multiplied back by the penalty it was divided by.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..networks.transformer_decoder import TransformerDecoder
from .confidence import Confidence
from .fusion import Fusion
from .hypothesis import Hypothesis

_CANDIDATES = 32  # tokens that a fusion may lift: the most probable ones
_LONGEST_PHRASE = 24  # tokens of a phrase whose repetition is seen


@dataclass
class _Beam:
    """What is known of the hypotheses of the clips still at work; K a clip, best first.

    clips: index of each clip (B,); tokens: (B, K, n); scores, summed log-probabilities with those
    of `beside`; beside: the fusion's part; ended: EOS or padding was chosen; counts: tokens without
    the end, prompt included, (B, K); states: the fusion's; recent: the last tokens, newest first,
    and runs: how many tokens in a row were the same as p tokens before, for each p.
    """

    clips: torch.Tensor
    tokens: torch.Tensor
    scores: torch.Tensor
    beside: torch.Tensor
    ended: torch.Tensor
    counts: torch.Tensor
    states: torch.Tensor | None = None
    confidences: torch.Tensor | None = None
    recent: torch.Tensor | None = None
    runs: torch.Tensor | None = None

    def of(self, index: Callable[[torch.Tensor], torch.Tensor]) -> "_Beam":
        """The same with `index` applied to all tensors."""
        return _Beam(*(None if part is None else index(part) for part in vars(self).values()))


@torch.no_grad()
def aed_search(
    states: torch.Tensor,
    bias: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    decoder: TransformerDecoder,
    log_probs_of: Callable[[torch.Tensor], torch.Tensor],
    eos: int,
    pad: int,
    beam: int = 1,
    length_penalty: float = 0.0,
    max_repeats: int | None = None,
    fusion: Fusion | None = None,
    token_bias: torch.Tensor | None = None,
    confidence: Confidence | None = None,
) -> list[Hypothesis]:
    """The best text of each clip.

    Args:
        states: (B, S, H), what the decoder attends to; bias: (B, 1, 1, S), see `hide_padding`.
        prompts: of each clip, at least one token.
        limits: most tokens of each clip, prompt and end included; one is always given.
        decoder, log_probs_of: tokens -> states (.., H) -> log-probabilities (.., V8).
        beam: hypotheses kept.
        length_penalty: a; hypotheses compete by score / ((5 + n) / 6) ** a, n = 1 + their tokens
            with the prompt, without the end (Wu et al., arXiv:1609.08144).
        max_repeats: most times that a phrase of up to 24 tokens may come again right after itself.
        token_bias: (V8,) added to log-probabilities when tokens are chosen, -inf for what must not
            occur; scores are not changed by it.
    Returns:
        Hypotheses without frames and without the end token; the score has the end's, and what the
        fusion added.
    """
    device = states.device
    n_clips, longest = len(prompts), max(len(prompt) for prompt in prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    most = torch.tensor(limits, device=device)
    tokens = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
    caches = decoder.start(states)
    positions = torch.arange(longest, device=device).expand(n_clips, -1)
    hidden = decoder.step(tokens, positions, longest, bias, caches)
    hidden = hidden[torch.arange(n_clips, device=device), lengths - 1]
    log_probs = log_probs_of(hidden)[:, None]  # (B, 1, V8)

    hypotheses = _start(lengths, fusion, confidence, max_repeats, log_probs.dtype)
    found: list[Hypothesis] = [Hypothesis() for _ in prompts]
    step = 0
    while True:
        hypotheses, parents = _grow(
            hypotheses,
            log_probs,
            *(eos, pad, beam, length_penalty, max_repeats, fusion, token_bias, confidence),
        )
        step += 1
        done = _done(hypotheses, lengths, most, step, length_penalty, fusion)
        for row in done.nonzero()[:, 0].tolist():
            found[int(hypotheses.clips[row])] = _best(hypotheses, row, length_penalty, eos, pad)
        stay = (~done).nonzero()[:, 0]
        if not len(stay):
            return found
        width = parents.shape[1]
        if len(stay) < len(done):
            hypotheses = hypotheses.of(lambda part, stay=stay: part.index_select(0, stay))
            for cache in caches:
                cache.keep(stay, parents.index_select(0, stay).flatten())
            lengths, most, bias = lengths[stay], most[stay], bias.index_select(0, stay)
        elif width > 1:
            for cache in caches:
                cache.reorder(parents.flatten())
        positions = (lengths + step - 1).repeat_interleave(width)[:, None]
        longest = int(lengths.max()) + step
        last = hypotheses.tokens[:, :, -1].reshape(-1, 1)
        hidden = decoder.step(last, positions, longest, bias, caches)
        log_probs = log_probs_of(hidden[:, 0]).view(len(stay), width, -1)


def _start(lengths, fusion, confidence, max_repeats, dtype) -> _Beam:
    """One hypothesis a clip: its prompt."""
    n_clips, device = len(lengths), lengths.device
    zeros = torch.zeros(n_clips, 1, dtype=dtype, device=device)
    none = torch.zeros(n_clips, 1, 0, dtype=torch.long, device=device)
    start = _Beam(
        torch.arange(n_clips, device=device), none, zeros, zeros, zeros.bool(), lengths[:, None]
    )
    if fusion:
        start.states = fusion.start().expand(n_clips, 1, -1)
    if confidence:
        start.confidences = zeros.new_zeros(n_clips, 1, 0)
    if max_repeats is not None:
        start.recent = none.new_full((n_clips, 1, _LONGEST_PHRASE), -1)
        start.runs = torch.zeros_like(start.recent)
    return start


def _grow(
    old: _Beam, log_probs, eos, pad, beam, alpha, max_repeats, fusion, token_bias, confidence
) -> tuple[_Beam, torch.Tensor]:
    """One token more for each hypothesis: the best `beam` of each clip, and the row (over all
    clips and hypotheses) that each of them grew from, (B, K)."""
    n_clips, width = old.scores.shape
    allowed = log_probs if token_bias is None else log_probs + token_bias
    if max_repeats is not None:
        allowed = _without_repeats(allowed, old.recent, old.runs, max_repeats)
    n_candidates = min(max(beam, _CANDIDATES if fusion else beam), log_probs.shape[-1])
    gains, candidates = allowed.topk(n_candidates, -1)  # (B, K, C)
    beside = torch.zeros_like(gains)
    if fusion:
        flat = candidates.view(-1, n_candidates)
        before = old.states.reshape(len(flat), -1)
        beside, after = fusion.score(before, flat)
        ends = (flat == eos) | (flat == pad)
        beside = torch.where(ends, fusion.final(before)[:, None], beside).view_as(gains)
    # an ended hypothesis goes on as it is, once
    kept = torch.full_like(gains, -torch.inf)
    kept[..., 0] = 0.0
    gains = torch.where(old.ended[..., None], kept, gains)
    beside = torch.where(old.ended[..., None], 0.0, beside)
    candidates = torch.where(old.ended[..., None], pad, candidates)

    scores = old.scores[..., None] + gains + beside
    ranks = scores / _penalty(old.counts, alpha)[..., None]
    _, picked = ranks.flatten(1).topk(min(beam, ranks.flatten(1).shape[1]), -1)  # (B, beam)
    parents = picked // n_candidates
    new = old.of(lambda part: part if part.dim() == 1 else _take(part, parents))
    chosen = candidates.flatten(1).gather(1, picked)
    new.tokens = torch.cat((new.tokens, chosen[..., None]), -1)
    new.scores = scores.flatten(1).gather(1, picked)
    new.beside = new.beside + beside.flatten(1).gather(1, picked)
    if fusion:
        after = after.view(n_clips, width * n_candidates, -1)
        new.states = torch.where(new.ended[..., None], new.states, _take(after, picked))
    if confidence:
        sure = _take(confidence.of(log_probs, log_probs.shape[-1]), parents)
        new.confidences = torch.cat((new.confidences, sure[..., None]), -1)
    if max_repeats is not None:
        new.runs = torch.where(new.recent == chosen[..., None], new.runs + 1, 0)
        new.recent = torch.cat((chosen[..., None], new.recent[..., :-1]), -1)
    new.ended = new.ended | (chosen == eos) | (chosen == pad)
    new.counts = new.counts + ~new.ended
    first = torch.arange(n_clips, device=parents.device)[:, None] * width
    return new, first + parents


def _take(part: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """part (B, K, ...), index (B, K') -> (B, K', ...)."""
    wide = index.view(*index.shape, *[1] * (part.dim() - 2))
    return part.gather(1, wide.expand(*index.shape, *part.shape[2:]))


def _penalty(counts: torch.Tensor, alpha: float) -> torch.Tensor:
    return ((5.0 + 1.0 + counts) / 6.0) ** alpha


def _without_repeats(log_probs, recent, runs, max_repeats: int) -> torch.Tensor:
    """-inf for a token that would end one repetition too many. With the p tokens before it as a
    phrase, `runs[p]` tokens have repeated it so far."""
    phrase = torch.arange(1, recent.shape[-1] + 1, device=recent.device)
    too_many = (runs + 1 >= phrase * (max_repeats + 1)) & (recent >= 0)
    blocked = torch.zeros_like(log_probs)
    blocked.scatter_add_(-1, recent.clamp(min=0), too_many.to(log_probs.dtype))
    return log_probs.masked_fill(blocked > 0, -torch.inf)


def _done(beam: _Beam, lengths, limits, step, alpha, fusion) -> torch.Tensor:
    """(B,): all hypotheses have ended, the limit is reached, or nothing can overtake the best."""
    done = beam.ended.all(1) | (lengths + step >= limits)
    if fusion:  # its scores may rise
        return done
    final = beam.scores / _penalty(beam.counts, alpha)
    best = final.masked_fill(~beam.ended, -torch.inf).amax(1)
    # scores only fall: a hypothesis is worth at most this with the largest penalty
    hope = beam.scores / _penalty(limits[:, None], alpha)
    return done | (best >= hope.masked_fill(beam.ended, -torch.inf).amax(1))


def _best(beam: _Beam, row: int, alpha: float, eos: int, pad: int) -> Hypothesis:
    final = beam.scores[row] / _penalty(beam.counts[row], alpha)
    best = int(final.argmax())
    tokens = beam.tokens[row, best].tolist()
    n = next((i for i, token in enumerate(tokens) if token in (eos, pad)), len(tokens))
    hypothesis = Hypothesis(tokens=tokens[:n], score=float(beam.scores[row, best]))
    if beam.confidences is not None:
        hypothesis.confidences = beam.confidences[row, best, :n].tolist()
    return hypothesis
