"""Where a recording sounds at all, and whether what sounds can be speech.

Digital silence at a recording's ends is not heard where features are normalised over the clip, so
that zeros around speech would change what is made of it. Noise, hum and tones keep a level; speech
does not, and loses 10 dB and more between syllables.
"""

from dataclasses import replace

import numpy as np

from .cuts import STEP_S, power_of_steps
from .transcript import Transcript

STEPS = 2  # of 16 bits: what decoders and dither leave of silence
SHORTEST_S = 0.5  # digital silence that is cut off; shorter is left as NeMo hears it
SOUNDING_S = 1.0  # of less the level tells nothing
STEADY_DB = 4.0  # deviation of the level in 20 ms: noise 0.3 to 2, tones 0 to 4, speech 13 to 17
LIVELY_DB, UNSURE = 8.0, -1.0  # music; the mean log-probability of a token that was guessed


def sounding(model, samples: np.ndarray) -> tuple[int, int]:
    """(first, end) of the samples that the model is to hear: between the digital silence at both
    ends, first at the start of an encoder frame, or all where that silence changes nothing else;
    (0, 0) where nothing sounds."""
    rate_hz = model.sample_rate
    frame_samples = round(model.config.frame_seconds * rate_hz)
    first = _first_loud(samples)
    if first is None:
        return 0, 0
    if not model.config.looks_at_all:
        return 0, len(samples)
    end = len(samples) - _first_loud(samples[::-1])
    shortest = int(SHORTEST_S * rate_hz)
    first = first // frame_samples * frame_samples if first >= shortest else 0
    return first, end if len(samples) - end >= shortest else len(samples)


def sounds(samples: np.ndarray) -> bool:
    """Whether not all of the samples are digital silence."""
    return _first_loud(samples) is not None


def _first_loud(samples: np.ndarray) -> int | None:
    """The first sample that is no silence; looked for a second at a time, as most begin at once."""
    most = STEPS if samples.dtype.kind == "i" else STEPS / 32768  # of either byte order
    for start in range(0, len(samples), 1 << 14):
        piece = samples[start : start + (1 << 14)]
        loud = (piece > most) | (piece < -most)
        first = int(loud.argmax())
        if loud[first]:
            return start + first
    return None


def judged(transcript: Transcript, sounds: bool, samples: np.ndarray, rate_hz: int) -> Transcript:
    """The transcript of a recording, of which `samples` were heard: without a text where nothing
    sounds, else with the reason why its text is doubtful."""
    if not sounds:
        return silent(transcript)
    return replace(transcript, doubtful=doubt(transcript, samples, rate_hz))


def silent(transcript: Transcript) -> Transcript:
    """The transcript without what was found."""
    with_durations = transcript.token_durations is not None
    return replace(
        transcript,
        text="",
        tokens=[],
        token_frames=[],
        token_durations=[] if with_durations else None,
        words=None if transcript.words is None else [],
        segments=None if transcript.segments is None else [],
        confidences=None if transcript.confidences is None else [],
        retries=[],
        score=0.0,
    )


def doubt(transcript: Transcript, samples: np.ndarray, rate_hz: int) -> str | None:
    """Why the text of these samples is doubtful; None: it is not."""
    if not transcript.tokens or len(samples) < SOUNDING_S * rate_hz:
        return None
    power = power_of_steps(samples, int(STEP_S * rate_hz))
    silence = 1e-9 * (32768**2 if samples.dtype.kind == "i" else 1)  # -90 dB of full scale
    heard = power[power > silence]
    deviation = float((10 * np.log10(heard)).std()) if len(heard) else 0.0
    if deviation < STEADY_DB:
        return "the sound is steady, as noise or tones are"
    if deviation < LIVELY_DB and transcript.score < UNSURE * len(transcript.tokens):
        return "the sound is nearly steady and the model is unsure"
    return None
