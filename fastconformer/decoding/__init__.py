"""Decoding: functions from encoder frames to lists of hypotheses."""

from .confidence import Confidence
from .ctc import ctc_greedy
from .ctc_alignment import ctc_align
from .hypothesis import Hypothesis
from .ngram import NGramModel, read_arpa
from .transducer import GraphCache, transducer_greedy

__all__ = [
    "Confidence",
    "GraphCache",
    "Hypothesis",
    "NGramModel",
    "ctc_align",
    "ctc_greedy",
    "read_arpa",
    "transducer_greedy",
]
