"""What every decoder gives for a clip."""

from dataclasses import dataclass, field


@dataclass
class Hypothesis:
    """What a decoder found for one clip.

    tokens: ids without blank. frames: encoder frame at which each token was emitted (CTC: the first
    frame of its run). durations: frames each token spans (TDT: the predicted duration, CTC: the
    length of its run), None for RNNT. score: sum of log-probabilities. confidences: of each token,
    None unless asked for.
    """

    tokens: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    durations: list[int] | None = None
    score: float = 0.0
    confidences: list[float] | None = None

    def part(self, first: int, end: int | None = None) -> "Hypothesis":
        """Its tokens from the `first`th up to the `end`th, without their score."""
        own = slice(first, end)
        lists = self.durations, self.confidences
        durations, sure = (None if values is None else values[own] for values in lists)
        return Hypothesis(self.tokens[own], self.frames[own], durations, 0.0, sure)
