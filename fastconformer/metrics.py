"""Error rates and normalisers, by the path that users' scripts import; they live in `text/`."""

from .text.metrics import char_errors, normalize, normalize_basic, normalize_none, word_errors

__all__ = ["char_errors", "normalize", "normalize_basic", "normalize_none", "word_errors"]
