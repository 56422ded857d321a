"""Greedy decoding of RNNT and TDT: all clips of a batch advance together, label by label.

Gives NeMo's `greedy_batch` tokens, frames and durations; `label_loop` has the step, `segments` what
long clips add, `graphs` what a GPU adds, `compiled_loop` the same steps for a CPU where numba is.
"""

import functools
from types import ModuleType

import torch

from ..networks.graphs import GraphCache
from ..networks.heads import Joint, PredictionNetwork
from .confidence import Confidence
from .graphs import run_loop
from .hypothesis import Hypothesis
from .label_loop import LabelLoop, by_clip, window_frames
from .segments import in_segments

LONG_FRAMES = 2048  # clips longer than this are decoded in segments, side by side


@torch.no_grad()
def transducer_greedy(
    encoded: torch.Tensor,
    lengths: torch.Tensor,
    decoder: PredictionNetwork,
    joint: Joint,
    blank: int,
    durations: tuple[int, ...] = (),
    max_symbols: int | None = 10,
    bias: torch.Tensor | None = None,
    confidence: Confidence | None = None,
    graphs: GraphCache | None = None,
) -> list[Hypothesis]:
    """encoded (B, T', D), lengths (B,). Empty `durations`: RNNT.

    A blank of duration 0 advances one frame, so decoding always ends; after `max_symbols` tokens on
    one frame the frame is left (None: no limit). The score sums the log-probabilities of the
    emitted tokens.

    Args:
        bias: (V+1,) added to the token logits, -inf for tokens that must not occur.
        confidence: also give the confidence of each token.
        graphs: keeps CUDA graphs between calls; without it steps run one by one, as is better on a
            CPU.
    """
    options = decoder, joint, blank, durations, max_symbols, bias, confidence

    def run(projected, lengths):
        if graphs is not None:
            return run_loop(graphs, projected, lengths, options)
        loop = LabelLoop(*options, len(lengths), window_frames(len(lengths), encoded.device))
        return loop.run(projected, lengths)

    compiled = _compiled_loop() if encoded.device.type == "cpu" and graphs is None else None
    # what fits is not asked for its lengths, for which the host would wait
    if encoded.shape[1] > LONG_FRAMES and max(lengths.tolist(), default=0) > LONG_FRAMES:
        arcs = in_segments(encoded, lengths, options, run)
    elif compiled is not None and compiled.fits(decoder, joint):
        arcs = compiled.run(joint.enc(encoded), lengths, *options)
    else:
        arcs = by_clip(*run(joint.enc(encoded), lengths)[:2], len(lengths))
    hypotheses = []
    for ints, floats in arcs:
        tokens, frames, spans = ints.tolist()
        sure = floats[1].tolist() if confidence is not None else None
        score = float(floats[0].sum())
        hypotheses.append(Hypothesis(tokens, frames, spans if durations else None, score, sure))
    return hypotheses


@torch.no_grad()
def transducer_next(
    hypotheses: list[Hypothesis],
    encoded: torch.Tensor,
    first_frames: list[int],
    state: list[torch.Tensor] | None,
    decoder: PredictionNetwork,
    joint: Joint,
    blank: int,
    durations: tuple[int, ...] = (),
    max_symbols: int | None = 10,
) -> list[torch.Tensor]:
    """Goes on with greedy decoding where `state` (None: the start) left off.

    encoded (B, C, D), all valid, whose first frames are the `first_frames`th of their clips; what
    is found is added to the `hypotheses`. Returns the state after them; its tensors have clips in
    the last dimension but one.
    """
    batch, n_frames = encoded.shape[:2]
    window = window_frames(batch, encoded.device)
    loop = LabelLoop(decoder, joint, blank, durations, max_symbols, None, None, batch, window)
    lengths = torch.full((batch,), n_frames, device=encoded.device)
    ints, floats, state = loop.run(joint.enc(encoded), lengths, state)
    for hypothesis, first, (found, scores) in zip(
        hypotheses, first_frames, by_clip(ints, floats, batch), strict=True
    ):
        hypothesis.tokens += found[0].tolist()
        hypothesis.frames += (found[1] + first).tolist()
        if durations:
            hypothesis.durations += found[2].tolist()
        hypothesis.score += float(scores[0].sum())
    state[0] -= n_frames
    return state


@functools.cache
def _compiled_loop() -> ModuleType | None:
    """None without numba, which the extra `fast` brings."""
    try:
        from . import compiled_loop
    except ImportError:
        return None
    return compiled_loop
