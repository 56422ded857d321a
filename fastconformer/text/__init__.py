"""Text: files of it, tokens, pieces, error rates."""

from pathlib import Path


def read_text(path: Path) -> str:
    """A text file in UTF-8, without the mark of its byte order. Raises OSError; ValueError naming
    the file: it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
