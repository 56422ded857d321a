"""How sure a decoder is of a token: from the distribution it was chosen from.

Source: NeMo's asr_confidence_utils (arXiv:2212.08703): entropies of Gibbs, Tsallis and Renyi,
mapped to [0, 1] linearly or exponentially, and the numbers it aggregates to tokens and words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_MEASURES = ("max_prob", "gibbs", "tsallis", "renyi")
_AGGREGATIONS = {"mean": lambda x: sum(x) / len(x), "min": min, "max": max, "prod": math.prod}


@dataclass(frozen=True)
class Confidence:
    """Which confidence to compute; the defaults are NeMo's.

    measure: an entropy ("tsallis", "gibbs", "renyi"), or "max_prob". alpha: power of the
    probabilities, above 0; at 1 the entropies are Shannon's. norm: "exp" or "lin", how an entropy
    becomes a number in [0, 1]. aggregation: "min", "mean", "max" or "prod" of a token's frames
    (CTC) and of a word's tokens. include_duration: TDT only, a token's confidence is aggregated
    with that of its duration.
    """

    measure: str = "tsallis"
    alpha: float = 0.33
    norm: str = "exp"
    aggregation: str = "min"
    include_duration: bool = False

    def __post_init__(self):
        if self.measure not in _MEASURES:
            raise ValueError(f"measure is {self.measure!r}, expected one of {', '.join(_MEASURES)}")
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}, expected a number above 0")
        if self.norm not in ("exp", "lin"):
            raise ValueError(f"norm is {self.norm!r}, expected exp or lin")
        if self.aggregation not in _AGGREGATIONS:
            raise ValueError(
                f"aggregation is {self.aggregation!r}, expected one of {', '.join(_AGGREGATIONS)}"
            )

    def of(self, log_probs: torch.Tensor, n_classes: int) -> torch.Tensor:
        """Log-probabilities (..., V+1) -> confidences (...). `n_classes` is V+1; NeMo uses it for
        TDT's durations too, which are fewer."""
        x, v, a = torch.nan_to_num(log_probs.float()), n_classes, self.alpha
        if self.measure == "max_prob":
            best = x.amax(-1)
            return ((best * a).exp() * v**a - 1) / (v**a - 1)
        exp = self.norm == "exp"
        if a == 1:
            negative = (x.exp() * x).sum(-1)
            return (negative.exp() * v - 1) / (v - 1) if exp else 1 + negative / math.log(v)
        powers = (x * a).exp()
        if self.measure == "gibbs":
            negative = (powers * x).sum(-1)
            if not exp:
                return 1 + negative / math.log(v) / v ** (1 - a)
            return _shifted((negative * a).exp(), v ** (-a * v ** (1 - a)))
        total = powers.sum(-1)
        if self.measure == "tsallis":
            if not exp:
                return 1 + (1 - total) / (v ** (1 - a) - 1)
            least = math.exp((1 - v ** (1 - a)) / (1 - a))
            return _shifted(((1 - total) / (1 - a)).exp(), least)
        if not exp:
            return 1 + total.log2() / (a - 1) / math.log2(v)
        return (total ** (1 / (a - 1)) * v - 1) / (v - 1)

    def of_symbol(self, log_probs: torch.Tensor, duration_logits: torch.Tensor) -> torch.Tensor:
        """A transducer's token: log-probabilities (..., V+1), and logits of its duration (..., N),
        which are empty for RNNT -> confidences (...)."""
        n_classes = log_probs.shape[-1]
        sure = self.of(log_probs, n_classes)
        if not (self.include_duration and duration_logits.shape[-1]):
            return sure
        other = self.of(duration_logits.float().log_softmax(-1), n_classes)
        if self.aggregation == "mean":
            return (sure + other) / 2
        two = {"min": torch.minimum, "max": torch.maximum, "prod": torch.mul}
        return two[self.aggregation](sure, other)

    def aggregate(self, values: Sequence[float]) -> float:
        """One number of those of a token's frames, or of a word's tokens; not empty."""
        return _AGGREGATIONS[self.aggregation](values)


def _shifted(value: torch.Tensor, least: float) -> torch.Tensor:
    return (value - least) / (1 - least)
