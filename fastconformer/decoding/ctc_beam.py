"""CTC prefix beam search over a batch, with scores beside the audio's.

Source: prefix search (Graves 2006; Hannun et al., arXiv:1408.2873). A prefix is known by a hash of
its tokens, so that merging the ways to write it is a comparison of numbers.
"""

import numpy as np
import torch

from .confidence import Confidence
from .ctc_alignment import ctc_align
from .fusion import Fusion
from .hypothesis import Hypothesis

_SURE_BLANK = 0.999  # frames in a run of blanks this sure say nothing that the first did not
_CANDIDATES = 32  # tokens that may extend a prefix on a frame: the most probable ones
HASH_BASE = 6364136223846793005


@torch.no_grad()
def ctc_beam(
    log_probs: torch.Tensor,
    lengths: torch.Tensor,
    beam: int,
    fusion: Fusion | None = None,
    bias: torch.Tensor | None = None,
    confidence: Confidence | None = None,
) -> list[Hypothesis]:
    """The best text of each clip, summed over its alignments; frames are those of its best one.

    Args:
        log_probs: (B, T', V+1), blank last; lengths: (B,).
        beam: prefixes kept after each frame.
        fusion: a language model, phrases; None: the audio alone.
        bias: (V+1,) added to the log-probabilities, -inf for tokens that must not occur.
    Returns:
        Hypotheses whose score is log p(tokens | audio) plus the fusion's.
    """
    log_probs = log_probs.float()
    if bias is not None:
        log_probs = log_probs + bias.to(log_probs)
    tokens, scores = _search(log_probs, lengths, beam, fusion)
    aligned = ctc_align(log_probs, lengths, tokens, confidence)
    for hypothesis, score in zip(aligned, scores):
        hypothesis.score = score
    return aligned


def _search(log_probs, lengths, beam, fusion):
    """(tokens of each clip, their scores)."""
    batch, _, n_classes = log_probs.shape
    blank, device = n_classes - 1, log_probs.device
    log_probs, lengths = _without_sure_blanks(log_probs, lengths)
    n_frames = log_probs.shape[1]
    n_candidates = min(_CANDIDATES, blank)
    infinity = torch.inf

    # of each prefix: log p of its alignments that end in blank, and in its last token
    ends_blank = torch.full((batch, beam), -infinity, dtype=torch.float32, device=device)
    ends_blank[:, 0] = 0.0
    ends_token = torch.full_like(ends_blank, -infinity)
    beside = torch.zeros_like(ends_blank)  # the fusion's score
    offset = torch.zeros(batch, 1, dtype=torch.double, device=device)  # taken off from all scores
    last = torch.full((batch, beam), blank, device=device)
    hashes = torch.zeros(batch, beam, dtype=torch.long, device=device)
    hashes += torch.arange(beam, device=device)  # empty slots are no prefix of one another
    parents = torch.full_like(hashes, -1)  # hash of the prefix without its last token
    states = fusion.start().expand(batch, beam, -1) if fusion else None
    trail = []  # (slot before, token added or -1) of each frame, (2, B, K)
    slots = torch.arange(beam, device=device)

    for t in range(n_frames):
        now = log_probs[:, t]  # (B, V+1)
        total = torch.logaddexp(ends_blank, ends_token)
        stay_blank = total + now[:, blank, None]
        last_now = now.gather(1, last)  # for the empty prefix this is blank's, and not used
        stay_token = torch.where(last == blank, -infinity, ends_token + last_now)
        # a prefix in the beam is also reached from its parent, where that is in the beam too
        is_parent = parents[:, :, None] == hashes[:, None, :]  # (B, prefix, parent)
        repeats = last[:, :, None] == last[:, None, :]
        origin = torch.where(repeats, ends_blank[:, None, :], total[:, None, :])
        reached = origin.masked_fill(~is_parent, -infinity).logsumexp(-1)
        stay_token = torch.logaddexp(stay_token, reached + last_now)

        top, candidates = now[:, :blank].topk(n_candidates, -1)  # (B, C)
        grown = torch.where(
            candidates[:, None] == last[:, :, None], ends_blank[..., None], total[..., None]
        )
        grown = grown + top[:, None]  # (B, K, C)
        # growing into a prefix that is there already is counted above
        there = is_parent.transpose(1, 2)[..., None] & (
            last[:, None, :, None] == candidates[:, None, None, :]
        )  # (B, parent, prefix, C)
        grown = grown.masked_fill(there.any(2), -infinity)
        beside_grown = beside[..., None].expand_as(grown)
        if fusion:
            n = batch * beam
            score, after = fusion.score(
                states.reshape(n, -1), candidates[:, None].expand(-1, beam, -1).reshape(n, -1)
            )
            beside_grown = beside_grown + score.view(grown.shape)

        stays = torch.logaddexp(stay_blank, stay_token)
        ranks = torch.cat((stays + beside, (grown + beside_grown).flatten(1)), 1)
        ranks, picked = ranks.topk(beam, -1)  # (B, K)
        stayed = picked < beam
        grew = (picked - beam).clamp(min=0)
        before = torch.where(stayed, picked, grew // n_candidates)
        added = candidates.gather(1, grew % n_candidates)
        active = (t < lengths)[:, None]
        before = torch.where(active, before, slots)
        stayed = stayed | ~active

        def kept(values, grown_values=None, before=before, stayed=stayed, grew=grew):
            old = values.gather(1, before)
            return old if grown_values is None else torch.where(stayed, old, grown_values)

        ends_blank = torch.where(
            active, kept(stay_blank, torch.full_like(stay_blank, -infinity)), ends_blank
        )
        ends_token = torch.where(
            active, kept(stay_token, grown.flatten(1).gather(1, grew)), ends_token
        )
        beside = kept(beside, beside_grown.flatten(1).gather(1, grew))
        if fusion:
            after = after.view(batch, beam * n_candidates, -1)
            size = (-1, -1, after.shape[-1])
            old = states.gather(1, before[..., None].expand(size))
            new = after.gather(1, grew[..., None].expand(size))
            states = torch.where(stayed[..., None], old, new)
        grown_from = hashes.gather(1, before)
        hashes = torch.where(stayed, grown_from, grown_from * HASH_BASE + added + 1)
        # a slot without a prefix must not become the double of one that is there
        parents = kept(parents, grown_from).masked_fill(active & (ranks == -infinity), -1)
        last = kept(last, added)
        trail.append(torch.stack((before, torch.where(stayed, -1, added))))
        # the best becomes 0: float32 must tell small differences after hours, too
        shift = torch.logaddexp(ends_blank[:, :1], ends_token[:, :1])
        ends_blank, ends_token = ends_blank - shift, ends_token - shift
        offset = offset + shift + beside[:, :1]
        beside = beside - beside[:, :1]

    ranks = torch.logaddexp(ends_blank, ends_token) + beside + offset
    if fusion:
        ranks = ranks + fusion.final(states.reshape(batch * beam, -1)).view(batch, beam)
    scores, best = ranks.max(-1)
    return trace_back(trail, best), scores.tolist()


def trace_back(trail: list[torch.Tensor], best: torch.Tensor) -> list[list[int]]:
    """Follows `trail`, (slot before, token added or -1) (2, B, K) of each step, from the slots
    `best` (B,) to the start -> tokens of each clip."""
    if not trail:
        return [[] for _ in best]
    befores, added = torch.stack(trail, 1).cpu().numpy()  # (steps, B, K)
    slots, rows, found = best.cpu().numpy(), np.arange(len(best)), []
    for step in range(len(trail) - 1, -1, -1):
        found.append(added[step, rows, slots])
        slots = befores[step, rows, slots]
    return [[int(i) for i in column if i >= 0] for column in zip(*reversed(found))]


def _without_sure_blanks(log_probs, lengths):
    """Leaves out frames that follow a sure blank and are one themselves."""
    n_frames, device = log_probs.shape[1], log_probs.device
    sure = log_probs[..., -1].exp() > _SURE_BLANK
    dropped = sure.clone()
    dropped[:, :1] = False
    dropped[:, 1:] &= sure[:, :-1]
    kept = ~dropped & (torch.arange(n_frames, device=device) < lengths[:, None])
    counts = kept.sum(1)
    longest = int(counts.max()) if len(counts) and n_frames else 0
    order = (~kept).byte().argsort(dim=1, stable=True)[:, :longest]  # frames that stay, in order
    return log_probs.gather(1, order[..., None].expand(-1, -1, log_probs.shape[-1])), counts
