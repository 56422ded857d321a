"""Decoding: functions from encoder frames to lists of hypotheses."""

from .confidence import Confidence
from .ctc import ctc_greedy
from .hypothesis import Hypothesis
from .transducer import GraphCache, transducer_greedy

__all__ = ["Confidence", "GraphCache", "Hypothesis", "ctc_greedy", "transducer_greedy"]
