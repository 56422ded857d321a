"""Tokenizers, by the path that users' scripts import; they live in `text/`."""

from .text.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

__all__ = ["SentencePieceTokenizer", "Tokenizer", "load_tokenizer"]
