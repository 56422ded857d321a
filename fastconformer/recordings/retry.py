"""Finds where a head has gone silent over speech, and decodes there again.

After some tokens a prediction network may hold a state from which nothing but blank follows, for
seconds of speech. Such a stretch is told from a pause by the energy of the audio.
"""

import torch

from ..decoding import DecodingOptions, Hypothesis
from .samples import as_float

SILENT_S = 4.0  # without a token: longer than speakers pause while speaking
SPEECH_S = 1.5  # with the energy of speech in such a stretch, at least
_SPEECH_SHARE = 0.3
_LOUDEST, _BELOW_LOUDEST_DB, _SILENCE_DB = 0.95, 25.0, -60.0
_SPEECH_DEVIATION_DB = 4.0  # of loudness: syllables come and go, machines hum on
_PARTS = 4  # of an encoder frame, 20 ms each


def retry_stuck(
    model,
    hypothesis: Hypothesis,
    encoded: torch.Tensor,
    samples: torch.Tensor,
    head: str,
    options: DecodingOptions | None = None,
) -> list[tuple[int, int, str]]:
    """Where a transducer went silent over speech, decodes the stretch again from a fresh state
    and puts what it finds into the hypothesis. In a hybrid the CTC head must hear tokens there
    too, and is believed where the transducer still finds less than half as many.

    Args:
        encoded: (T', D) of the clip, samples: (L,) its audio.
    Returns:
        (first frame, end frame, text found) of each stretch that was mended.
    """
    config, frame_s = model.config, model.config.frame_seconds
    stretches = silent_stretches(hypothesis, len(encoded), frame_s)
    if not (model.head(head).can_stall and stretches):
        return []
    frame_samples = config.preprocessor.hop_samples * config.encoder.frame_factor
    levels = loudness(as_float(samples.cpu()), frame_samples, len(encoded))
    beside, mended = model.frame_head, []
    for first, end in stretches:
        if not speaks(levels, first, end, frame_s):
            continue
        part, length = encoded[None, first:end], torch.tensor([end - first], device="cpu")
        length = length.to(encoded.device)
        (found,) = model.decode(part, length, head, options)
        if beside is not None:
            (heard,) = model.decode(part, length, beside.name, options)
            if not heard.tokens:
                continue  # loud, but no speech to either head
            if 2 * len(found.tokens) < len(heard.tokens):
                found = heard
        if found.tokens:
            splice(hypothesis, found, first)
            mended.append((first, end, model.head(head).text(found)))
    return mended


def loudness(samples: torch.Tensor, frame_samples: int, n_frames: int) -> torch.Tensor:
    """samples (L,) in [-1, 1] -> dB of full scale of each encoder frame's quarters, (T', 4)."""
    padded = samples.new_zeros(n_frames * frame_samples)
    padded[: len(samples)] = samples[: len(padded)]
    frames, part = padded.view(n_frames, frame_samples), frame_samples // _PARTS
    parts = frames[:, : part * _PARTS].reshape(n_frames, _PARTS, part)
    return 10 * parts.float().square().mean(-1).clamp(min=1e-10).log10()


def silent_stretches(hypothesis: Hypothesis, n_frames: int, frame_s: float) -> list[tuple]:
    """(first, end) frames of stretches without tokens that are too long for a pause."""
    spans = hypothesis.durations or [1] * len(hypothesis.frames)
    ends = [0, *(frame + max(1, span) for frame, span in zip(hypothesis.frames, spans))]
    least = SILENT_S / frame_s
    pairs = zip(ends, [*hypothesis.frames, n_frames])
    return [(first, end) for first, end in pairs if end - first >= least]


def speaks(levels: torch.Tensor, first: int, end: int, frame_s: float) -> bool:
    """Whether the stretch sounds like speech, by the `loudness` of the whole clip: enough of it is
    within 25 dB of the clip's loud frames, and it rises and falls."""
    of_frames, stretch = levels.amax(1), levels[first:end]
    loudest = float(of_frames.sort().values[int(_LOUDEST * (len(of_frames) - 1))])
    n = int((stretch.amax(1) > max(loudest - _BELOW_LOUDEST_DB, _SILENCE_DB)).sum())
    enough = n * frame_s >= SPEECH_S and n >= _SPEECH_SHARE * len(stretch)
    return enough and float(stretch.std()) >= _SPEECH_DEVIATION_DB


def splice(hypothesis: Hypothesis, found: Hypothesis, first: int):
    """Puts tokens that were found from frame `first` on to their place, in time."""
    at = sum(frame < first for frame in hypothesis.frames)
    hypothesis.tokens[at:at] = found.tokens
    hypothesis.frames[at:at] = [first + frame for frame in found.frames]
    if hypothesis.durations is not None:
        hypothesis.durations[at:at] = found.durations or [1] * len(found.tokens)
    if hypothesis.confidences is not None:
        hypothesis.confidences[at:at] = found.confidences
    hypothesis.score += found.score
