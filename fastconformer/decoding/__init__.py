"""Greedy decoding: functions from encoder frames to lists of hypotheses."""

from .ctc import ctc_greedy
from .hypothesis import Hypothesis
from .transducer import transducer_greedy

__all__ = ["Hypothesis", "ctc_greedy", "transducer_greedy"]
