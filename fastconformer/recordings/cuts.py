"""Long recordings for heads that decode a piece at a time: cut in pauses, and joined again.

Heads that read frames in order see windows as one sequence (`longform`); a language model cannot,
and was trained on clips of half a minute. Borders lie where it is quietest, and nothing is heard
twice.
"""

from dataclasses import replace

import numpy as np

from .timestamps import Span
from .transcript import Transcript

STEP_S = 0.02  # of loudness
PAUSE_S = 0.2  # whose mean loudness is compared
SEARCH = 0.5  # share of a piece, at its end, in which its border may lie


def cut_in_pauses(samples: np.ndarray, rate_hz: int, longest_s: float) -> list[tuple[int, int]]:
    """(first, end) samples of pieces of at most `longest_s` that follow one another."""
    longest, step = int(longest_s * rate_hz), max(1, int(STEP_S * rate_hz))
    if len(samples) <= longest:
        return [(0, len(samples))]
    energy = power_of_steps(samples, step)
    width = max(1, round(PAUSE_S / STEP_S))
    sums = np.concatenate(([0.0], np.cumsum(energy)))
    pieces, first = [], 0
    while len(samples) - first > longest:
        low, high = (first + int(longest * (1 - SEARCH))) // step, (first + longest) // step
        low, high = min(low, high - width - 1), high - width
        quiet = sums[low + width : high + width] - sums[low:high]
        # the last of equally quiet ones: pieces as long as they may be
        at = low + len(quiet) - 1 - int(np.argmin(quiet[::-1]))
        end = (at + width // 2) * step
        pieces.append((first, end))
        first = end
    return [*pieces, (first, len(samples))]


def power_of_steps(samples: np.ndarray, step: int) -> np.ndarray:
    """Mean square of every `step` samples, float64, in the samples' own units; the rest is left."""
    n_steps = len(samples) // step
    power = np.empty(n_steps, dtype=np.float64)
    for first in range(0, n_steps, 1 << 16):  # no copy of the whole in float64
        part = samples[first * step : min(first + (1 << 16), n_steps) * step]
        power[first : first + (1 << 16)] = np.square(part.reshape(-1, step), dtype=np.float64).mean(
            1
        )
    return power


def join_pieces(
    pieces: list[Transcript], starts_s: list[float], frame_s: float, duration_s: float
) -> Transcript:
    """One transcript of pieces that begin at `starts_s`."""
    if len(pieces) == 1 and not starts_s[0]:
        return replace(pieces[0], duration=duration_s)
    shifts = [round(start / frame_s) for start in starts_s]
    timed = all(piece.words is not None for piece in pieces)
    sure = all(piece.confidences is not None for piece in pieces)
    with_durations = all(piece.token_durations is not None for piece in pieces)

    def moved(name: str) -> list[Span]:
        return [
            replace(span, start=span.start + start, end=span.end + start)
            for piece, start in zip(pieces, starts_s, strict=True)
            for span in getattr(piece, name)
        ]

    def joined(name: str) -> list:
        return [value for piece in pieces for value in getattr(piece, name)]

    frames = [
        frame + shift
        for piece, shift in zip(pieces, shifts, strict=True)
        for frame in piece.token_frames
    ]
    return replace(
        pieces[0],
        text=pieces[0].text if len(pieces) == 1 else join_texts([piece.text for piece in pieces]),
        tokens=joined("tokens"),
        token_frames=frames,
        token_durations=joined("token_durations") if with_durations else None,
        words=moved("words") if timed else None,
        segments=moved("segments") if timed else None,
        score=sum(piece.score for piece in pieces),
        duration=duration_s,
        confidences=joined("confidences") if sure else None,
        retries=moved("retries"),
    )


def join_texts(texts: list[str]) -> str:
    """With a space between them, but where the scripts have none."""
    whole = ""
    for text in (text.strip() for text in texts):
        glued = _without_spaces(whole[-1:]) or _without_spaces(text[:1])
        whole += ("" if glued or not whole or not text else " ") + text
    return whole


def _without_spaces(char: str) -> bool:
    return (
        "\u3000" <= char <= "\u30ff" or "\u3400" <= char <= "\u9fff" or "\uff00" <= char <= "\uffef"
    )
