"""Decoding: functions from encoder frames to lists of hypotheses."""

from .aed import aed_search
from .allow import token_bias
from .confidence import Confidence
from .ctc import ctc_greedy, ctc_next
from .ctc_alignment import ctc_align
from .ctc_beam import ctc_beam
from .fusion import unwritable
from .hypothesis import Hypothesis
from .ngram import NGramModel, read_arpa
from .options import DecodingOptions, read_phrases
from .transducer import transducer_greedy, transducer_next
from .transducer_beam import transducer_beam

__all__ = [
    "Confidence",
    "DecodingOptions",
    "Hypothesis",
    "NGramModel",
    "aed_search",
    "ctc_align",
    "ctc_beam",
    "ctc_greedy",
    "ctc_next",
    "read_arpa",
    "read_phrases",
    "token_bias",
    "transducer_beam",
    "transducer_greedy",
    "transducer_next",
    "unwritable",
]
