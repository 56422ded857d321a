"""What the frames of a long recording make of the tokens of a text, to align the two."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from .cuts import cut_in_pauses
from .modes import evaluating
from .samples import as_float, collate

PIECE_S = 16.0  # of a long recording, cut in pauses: as long as most clips in training
LEAST = -8.0  # no log-probability is less: a token that a weak model never hears costs that


@torch.no_grad()
def frame_losses(
    model,
    clip: np.ndarray,
    tokens: Sequence[int],
    head: str | None = None,
    batch_size: int = 16,
    lang: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What each frame of a recording of any length makes of some tokens.

    Args:
        head: None: the CTC head, where the model has one. A head that says only which tokens it
            found in which frames counts as sure of them: all others lose LEAST there.
        batch_size: pieces of the recording a pass; on a CPU one.
        lang: what is spoken, told to a model that can be told it.
    Returns:
        (T', len(tokens) + 1) float32, log-probabilities of these tokens and blank, last, minus the
        frame's largest, LEAST or more; and (T',) int64, the best class of each frame.
    Raises:
        ValueError: no such head, or one that knows no frames.
    """
    chosen = model.head(head) if head else model.frame_head
    if chosen is None or not chosen.has_frame_posteriors:
        slots = model.head(head).slots_of({"lang": lang})
        return _losses_of_transcript(model, clip, tokens, head, batch_size, slots)
    for_encoder, _ = chosen.parted(chosen.asked(chosen.slots_of({"lang": lang}), False))
    rate, device = model.sample_rate, model.device
    columns = torch.tensor([*tokens, model.blank_id], device=device)
    step = round(model.config.frame_seconds * rate)
    borders = [first // step for first, _ in cut_in_pauses(clip, rate, PIECE_S)]
    pieces = list(itertools.pairwise([*borders, -(-len(clip) // step)]))
    size = 1 if device.type == "cpu" else batch_size
    losses, best = [], []
    with evaluating(model):
        for start in range(0, len(pieces), size):
            group = pieces[start : start + size]
            clips = [clip[first * step : end * step] for first, end in group]
            samples, lengths, _ = collate(clips, 0.0, rate)
            samples, lengths = as_float(samples.to(device)), lengths.to(device)
            features = model.preprocessor(samples, lengths, pad=False)
            encoded, lengths = model.encode(*features, **for_encoder)
            log_probs = chosen.log_probs(encoded, lengths)
            for row, (first, end) in zip(log_probs, group, strict=True):
                row = row[: end - first]
                top, which = row.max(-1)
                losses.append((row[:, columns] - top[:, None]).clamp(min=LEAST).cpu().numpy())
                best.append(which.cpu().numpy())
    return np.concatenate(losses), np.concatenate(best)


def _losses_of_transcript(model, clip, tokens, head: str | None, batch_size: int, slots: dict):
    options = {"long": "quiet", "window_s": PIECE_S} | slots
    found = model.transcribe([clip], head, batch_size, **options)[0]
    if found.text and not found.token_frames:
        raise ValueError("the model has no CTC head, and tells no frames of the tokens it hears")
    n_frames = int(len(clip) / model.sample_rate / model.config.frame_seconds) + 1
    best = np.full(n_frames + len(found.tokens), model.blank_id)
    place = -1
    for token, frame in zip(found.tokens, found.token_frames, strict=True):
        place = max(place + 1, frame)  # several tokens of a frame go to the next ones
        best[place] = token
    best = best[: max(n_frames, place + 1)]
    columns = np.array([*tokens, model.blank_id])
    return np.where(best[:, None] == columns, 0.0, LEAST).astype(np.float32), best
