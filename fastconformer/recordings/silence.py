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
SILENCE_DB = -90.0  # of full scale
STEADY_DB = 4.0  # deviation of the level in 20 ms: noise 0.3 to 2, tones 0 to 4, speech 13 to 17
LIVELY_DB, UNSURE = 8.0, -1.0  # music; the mean log-probability of a token that was guessed
STRETCH_S = 3.0  # within a recording: there the level of speech deviates by 5 dB at least
EDGE_S = 0.5  # of a stretch, where a token may be of the speech beside it


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


def judged(
    transcript: Transcript,
    sounds: bool,
    samples: np.ndarray,
    rate_hz: int,
    first_s: float,
    frame_s: float,
) -> Transcript:
    """The transcript of a recording, of which `samples`, from `first_s` on, were heard: without a
    text where nothing sounds, else with the reason why its text, or some of it, is doubtful.
    frame_s: of its token_frames."""
    if not sounds:
        return silent(transcript)
    why = doubt(transcript, samples, rate_hz)
    if why is None:
        times_s = [frame * frame_s for frame in transcript.token_frames]
        times_s = times_s or [word.start for word in transcript.words or ()]
        why = doubt_within([time_s - first_s for time_s in times_s], samples, rate_hz, first_s)
    return replace(transcript, doubtful=why)


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
    levels = _levels(samples, rate_hz)
    heard = levels[levels > SILENCE_DB]
    deviation = float(heard.std()) if len(heard) else 0.0
    if deviation < STEADY_DB:
        return "the sound is steady, as noise or tones are"
    if deviation < LIVELY_DB and transcript.score < UNSURE * len(transcript.tokens):
        return "the sound is nearly steady and the model is unsure"
    return None


def doubt_within(
    times_s: list[float], samples: np.ndarray, rate_hz: int, first_s: float = 0.0
) -> str | None:
    """Why some of a text, whose tokens have these times in the samples, is doubtful: they lie where
    the sound is steady for seconds. `first_s` is added to times that are told."""
    found = [
        f"{first_s + start:.1f} to {first_s + end:.1f} s"
        for start, end in (steady_stretches(samples, rate_hz) if times_s else ())
        if any(start + EDGE_S < time_s < end - EDGE_S for time_s in times_s)
    ]
    if not found:
        return None
    more = f" and {len(found) - 3} times more" if len(found) > 3 else ""
    return f"from {', '.join(found[:3])}{more} the sound is steady, as noise or tones are"


def steady_stretches(samples: np.ndarray, rate_hz: int) -> list[tuple[float, float]]:
    """(start, end) in seconds of all that keeps its level for STRETCH_S, digital silence apart."""
    levels, width = _levels(samples, rate_hz), round(STRETCH_S / STEP_S)
    sums, squares = (np.concatenate(([0.0], np.cumsum(x))) for x in (levels, levels**2))
    means = (sums[width:] - sums[:-width]) / width
    deviations = (squares[width:] - squares[:-width]) / width - means**2
    found: list[tuple[float, float]] = []
    for at in np.flatnonzero((deviations < STEADY_DB**2) & (means > SILENCE_DB + 1)) * STEP_S:
        start = found.pop()[0] if found and at <= found[-1][1] else at
        found.append((float(start), float(at + STRETCH_S)))
    return found


def _levels(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """dB of full scale of each STEP_S, SILENCE_DB at least."""
    full = 32768.0**2 if samples.dtype.kind == "i" else 1.0
    power = power_of_steps(samples, int(STEP_S * rate_hz)) / full
    return 10 * np.log10(np.maximum(power, 10 ** (SILENCE_DB / 10)))
