"""What a user may ask of decoding, and the scorers and masks that come of it."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ..text import read_text
from ..text.tokenizer import Tokenizer
from .allow import token_bias
from .confidence import Confidence
from .fusion import Fusion, PhraseScorer, language_model_scorer
from .hypothesis import Hypothesis
from .ngram import NGramModel, read_arpa


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode. The defaults are greedy, and give NeMo's output.

    beam: hypotheses kept; 1 without a language model and phrases is greedy.
    lm: an ARPA file (.gz too), or the NGramModel that `read_arpa` gave, of words or of tokens.
    lm_weight: of its log-probabilities beside the audio's; lm_bonus: nats added for each word (or
        token, as the model has it), against texts that become too short. None: for a model of
        words what an average word of it costs, and a word that it does not know costs as much; for
        one of tokens nothing.
    boost: phrases to expect, with nats for each piece they are written with, or phrases alone,
        which get `boost_weight`.
    allow: languages, scripts or pieces that may occur; empty: all.
    confidence: True (NeMo's defaults), a measure's name or a Confidence: give tokens and words
        confidences.
    score_norm: transducer beams compare texts by score per token, as NeMo does.
    retry: decode again where a transducer has gone silent over speech.
    length_penalty, max_generation_delta, max_repeats: of attention decoders. Hypotheses compete by
        score / ((5 + n) / 6) ** length_penalty; most tokens, prompt included, beyond the clip's
        frames (None: the config's, negative: as many as there are positions); most times that a
        phrase may come again right after itself (None: any number), against loops. The last also of
        language models (None: what is a loop beyond doubt).
    """

    beam: int = 1
    lm: NGramModel | str | Path | None = None
    lm_weight: float = 0.3
    lm_bonus: float | None = None
    boost: Mapping[str, float] | Sequence[str] | None = None
    boost_weight: float = 1.5
    allow: Sequence[str] = ()
    confidence: Confidence | str | bool | None = None
    score_norm: bool = True
    retry: bool = True
    length_penalty: float = 0.0
    max_generation_delta: int | None = None
    max_repeats: int | None = None

    def __post_init__(self):
        if not (isinstance(self.length_penalty, int | float) and 0 <= self.length_penalty < 100):
            raise ValueError(f"length_penalty is {self.length_penalty!r}, expected 0 or more")
        for name in ("max_generation_delta", "max_repeats"):
            value = getattr(self, name)
            if not (value is None or type(value) is int):
                raise ValueError(f"{name} is {value!r}, expected a whole number")
        if self.max_repeats is not None and self.max_repeats < 0:
            raise ValueError(f"max_repeats is {self.max_repeats}, expected 0 or more")
        if not isinstance(self.beam, int) or self.beam < 1:
            raise ValueError(f"beam is {self.beam!r}, expected a whole number of at least 1")
        for name in ("lm_weight", "lm_bonus", "boost_weight"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value!r}, expected a number")
        if isinstance(self.lm, str | os.PathLike):
            object.__setattr__(self, "lm", read_arpa(self.lm))
        if isinstance(self.boost, str):
            raise ValueError(
                f"boost is {self.boost!r}, expected a list of phrases or their weights"
            )
        if self.boost is not None and not isinstance(self.boost, Mapping):
            object.__setattr__(self, "boost", dict.fromkeys(self.boost, self.boost_weight))
        for phrase, weight in (self.boost or {}).items():
            if not math.isfinite(weight):
                raise ValueError(
                    f"boost: the weight of {phrase!r} is {weight!r}, expected a number"
                )
        if isinstance(self.allow, str):
            object.__setattr__(self, "allow", (self.allow,))
        if isinstance(self.confidence, bool):
            object.__setattr__(self, "confidence", Confidence() if self.confidence else None)
        elif isinstance(self.confidence, str):
            object.__setattr__(self, "confidence", Confidence(measure=self.confidence))
        elif not isinstance(self.confidence, Confidence | None):
            raise ValueError(
                f"confidence is {self.confidence!r}, expected a measure's name or a Confidence"
            )

    def check(self, refused: Sequence[str], head: str) -> None:
        """ValueError where one of the fields `refused`, which mean nothing to this head, is set."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in refused and value != field.default:
                raise ValueError(f"{field.name} is {value!r}, which head {head} does not take")

    @property
    def is_greedy(self) -> bool:
        return self.beam == 1 and self.lm is None and not self.boost

    def fusion(
        self,
        tokenizer: Tokenizer,
        device: torch.device,
        greedy: Callable[[], list[Hypothesis]] | None = None,
    ) -> Fusion | None:
        """What is scored beside the audio, None for nothing; `greedy` decodes the clips without
        it, and is called where a language model of words wants to know what they say."""
        scorers = []
        if self.lm is not None:

            def heard() -> list[str]:
                return [tokenizer.decode(found.tokens) for found in greedy()]

            given = self.lm, tokenizer, self.lm_weight, self.lm_bonus, device
            scorers.append(language_model_scorer(*given, heard if greedy else None))
        if self.boost:
            scorers.append(PhraseScorer(self.boost, tokenizer, device))
        return Fusion(scorers) if scorers else None

    def bias(self, tokenizer: Tokenizer, device: torch.device) -> torch.Tensor | None:
        return token_bias(tokenizer, self.allow).to(device) if self.allow else None


def read_phrases(path: str | Path, weight: float) -> dict[str, float]:
    """A list of phrases, one a line, each with its own weight after a tab or with `weight`; empty
    lines and lines that start with # are passed over. FileNotFoundError, or ValueError naming the
    line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"list of phrases {path} is not a file")
    phrases = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        phrase, tab, own = line.partition("\t")
        if not phrase.strip() or phrase.startswith("#"):
            continue
        try:
            phrases[phrase.strip()] = float(own) if tab else weight
        except ValueError:
            raise ValueError(f"{path}:{number}: {own!r} is not a weight") from None
    if not phrases:
        raise ValueError(f"{path} names no phrase")
    return phrases
