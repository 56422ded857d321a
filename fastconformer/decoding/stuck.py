"""Finds where a transducer has gone silent over speech.

After some tokens a prediction network may hold a state from which nothing but blank follows, for
seconds of speech. Such a stretch is told from a pause by the energy of the audio.
"""

import torch

from .hypothesis import Hypothesis

SILENT_S = 4.0  # without a token: longer than speakers pause while speaking
SPEECH_S = 1.5  # with the energy of speech in such a stretch, at least
_SPEECH_SHARE = 0.3
_LOUDEST, _FLOOR = 0.95, 0.1  # quantiles of a clip's frames: its speech, its background
_BELOW_SPEECH_DB, _ABOVE_FLOOR_DB, _SILENCE_DB = 25.0, 9.0, -60.0


def speech_frames(samples: torch.Tensor, frame_samples: int, n_frames: int) -> torch.Tensor:
    """samples (L,) in [-1, 1] -> whether each encoder frame is as loud as speech, (n_frames,) bool.

    Loud as speech is: within 25 dB of the clip's loud frames, 9 dB above its background, and not
    below -60 dB of full scale.
    """
    padded = samples.new_zeros(n_frames * frame_samples)
    padded[: len(samples)] = samples[: len(padded)]
    power = padded.view(n_frames, frame_samples).float().square().mean(1)
    loudness = 10 * power.clamp(min=1e-10).log10()
    loudest, floor = torch.quantile(loudness, torch.tensor([_LOUDEST, _FLOOR])).tolist()
    return loudness > max(loudest - _BELOW_SPEECH_DB, floor + _ABOVE_FLOOR_DB, _SILENCE_DB)


def silent_stretches(hypothesis: Hypothesis, n_frames: int, frame_s: float) -> list[tuple]:
    """(first, end) frames of stretches without tokens that are too long for a pause."""
    spans = hypothesis.durations or [1] * len(hypothesis.frames)
    ends = [0, *(frame + max(1, span) for frame, span in zip(hypothesis.frames, spans))]
    least = SILENT_S / frame_s
    pairs = zip(ends, [*hypothesis.frames, n_frames])
    return [(first, end) for first, end in pairs if end - first >= least]


def speaks(speech: torch.Tensor, frame_s: float) -> bool:
    """Whether frames of a stretch, True where loud as speech, hold enough of it."""
    n = int(speech.sum())
    return n * frame_s >= SPEECH_S and n >= _SPEECH_SHARE * len(speech)


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
