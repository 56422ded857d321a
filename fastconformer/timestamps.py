"""Spans of time, by the path that users' scripts import; they live in `recordings/`."""

from .recordings.timestamps import Span

__all__ = ["Span"]
