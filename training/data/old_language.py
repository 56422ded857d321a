"""Lines of the language that a model knew before its vocabulary grew: written as they were then."""

import dataclasses
import logging
from collections.abc import Sequence

from fastconformer.surgery.vocabulary import match_pieces
from fastconformer.text.tokenizer import Tokenizer
from training.data.utterances import Utterance

log = logging.getLogger("finetune")
COUNTED = 20_000  # lines, of which the log tells how the whole vocabulary would write them


class _OldFirst:
    """The old tokenizer, and the whole one for a text that it cannot write."""

    def __init__(self, old: Tokenizer, whole: Tokenizer):
        self.old, self.whole, self.unk_id = old, whole, whole.unk_id

    def encode(self, text: str) -> list[int]:
        ids = self.old.encode(text)
        return self.whole.encode(text) if self.old.unk_id in ids else ids


@dataclasses.dataclass(frozen=True)
class OldLanguage:
    """Its tokenizer, whose ids are the model's first, and its `lang` in manifests, if known;
    `pieces` as a source of a recipe has it."""

    old: Tokenizer
    whole: Tokenizer
    lang: str | None = None
    pieces: str | None = None

    def writes(self, lang: str | None) -> bool:
        """Whether a line of this language is written as before."""
        known = lang is not None and lang == self.lang
        return known if self.pieces is None else self.pieces == "old"

    def of_language(self, lang: str | None):
        """What encodes a line, as `Tokenizer.of_language`."""
        if self.writes(lang):
            return _OldFirst(self.old, self.whole)
        return self.whole.of_language(lang)

    def tell(self, utterances: Sequence[Utterance]) -> None:
        """How many of the lines that are written as before the whole vocabulary would change."""
        some = utterances[:COUNTED]
        whole = [tuple(self.whole.encode(utterance.text)) for utterance in some]
        changed = sum(u.tokens != ids for u, ids in zip(some, whole, strict=True))
        if some:
            log.info(
                "old language: %d lines are written with the pieces of before; the whole "
                "vocabulary would write %.1f %% of %d otherwise",
                *(len(utterances), 100 * changed / len(some), len(some)),
            )


def old_language(old: Tokenizer, whole: Tokenizer, lang: str | None) -> OldLanguage | None:
    """None where the whole vocabulary is not the old one with pieces behind it, or where both write
    a character with a token."""
    first = match_pieces(old, whole)[: old.vocab_size]
    grew = whole.vocab_size > old.vocab_size and first == list(range(old.vocab_size))
    is_pieces = old.kind == whole.kind == "bpe" and old.bos_id is None
    return OldLanguage(old, whole, lang) if grew and is_pieces else None
