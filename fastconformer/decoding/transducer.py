"""Greedy decoding of RNNT and TDT, all clips of the batch together.

Source: label looping (arXiv:2406.06220) and TDT (arXiv:2304.06795); gives NeMo's `greedy_batch`
tokens, frames and durations.
"""

import torch

from ..heads import Joint, PredictionNetwork
from .hypothesis import Hypothesis


@torch.no_grad()
def transducer_greedy(
    encoded: torch.Tensor,
    lengths: torch.Tensor,
    decoder: PredictionNetwork,
    joint: Joint,
    blank: int,
    durations: tuple[int, ...] = (),
    max_symbols: int | None = 10,
) -> list[Hypothesis]:
    """encoded (B, T', D), lengths (B,). Empty `durations`: RNNT.

    A blank of duration 0 advances one frame, so decoding always ends; after `max_symbols` tokens on
    one frame the frame is left (None: no limit). The score sums the log-probabilities of the
    emitted tokens.
    """
    batch, device = encoded.shape[0], encoded.device
    projected = joint.enc(encoded)  # (B, T', J)
    steps = torch.tensor(durations, device=device) if durations else None
    rows = torch.arange(batch, device=device)
    output, state = decoder.start(batch)
    predicted = joint.pred(output)

    frame = torch.zeros(batch, dtype=torch.long, device=device)
    on_frame = torch.zeros_like(frame)  # tokens emitted on the current frame
    score = torch.zeros(batch, device=device)
    last_frame = (lengths - 1).clamp(min=0)
    emitted = []  # (token or -1, frame, duration), each (B,)
    active = frame < lengths
    while bool(active.any()):
        logits = joint.step(projected[rows, torch.minimum(frame, last_frame)], predicted).float()
        token_logits = logits[:, : blank + 1]
        best, token = token_logits.max(-1)
        spoken = active & (token != blank)
        if steps is None:
            skip = (token == blank).long()
        else:
            skip = steps[logits[:, blank + 1 :].argmax(-1)]
            skip = torch.where((token == blank) & (skip == 0), 1, skip)
        if bool(spoken.any()):
            emitted.append(torch.stack((torch.where(spoken, token, -1), frame, skip)))
            score = score + torch.where(spoken, best - token_logits.logsumexp(-1), 0.0)
            after, state_after = decoder.step(torch.where(spoken, token, blank - 1), state)
            keep = spoken[:, None]
            predicted = torch.where(keep, joint.pred(after), predicted)
            state = [
                (torch.where(keep, h2, h), torch.where(keep, c2, c))
                for (h2, c2), (h, c) in zip(state_after, state)
            ]
        on_frame = torch.where(skip > 0, 0, on_frame + spoken)
        if max_symbols is not None:
            stuck = on_frame >= max_symbols
            skip, on_frame = skip + stuck.long(), on_frame.masked_fill(stuck, 0)
        frame = torch.where(active, frame + skip, frame)
        active = frame < lengths

    hypotheses = [Hypothesis(durations=[] if durations else None, score=s) for s in score.tolist()]
    if emitted:
        for tokens, frames, spans in torch.stack(emitted).tolist():
            for hypothesis, token, at, span in zip(hypotheses, tokens, frames, spans):
                if token >= 0:
                    hypothesis.tokens.append(token)
                    hypothesis.frames.append(at)
                    if durations:
                        hypothesis.durations.append(span)
    return hypotheses
