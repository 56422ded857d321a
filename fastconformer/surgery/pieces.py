"""Scores for the new pieces of a merged tokenizer: the old language keeps its segmentation, the new
one uses as many of its pieces as that allows.

A new piece p competes with how A alone writes the same characters. At every place where p's
characters stand in a text, there is a level above which p wins:

- Unigram: `best - (forward[start] + backward[end])`, the score of A's best segmentation less that
  of the best one that breaks at both ends of p. p is used where its own score is higher.
- BPE: 0 where A itself breaks at both ends of p (a score below all of A's is enough, as A's merges
  come first), 1 elsewhere (p must merge before A's pieces do).

So for each p there are levels at which the new text would use it (the gain, in tokens) and levels
at which the old text would change (the risk, in lines). `choose_levels` takes, piece by piece, the
level with the largest gain - price * risk, or none: such a piece becomes "unused", which in BPE
still lets longer pieces be merged from it, and is never written. `search` finds the lowest price at
which old text that the choice has not seen keeps its segmentation.

Risk of what the old text does not hold: an interpolated character model of it (Witten and Bell
1991), and a floor for strings all of whose character pairs occur, as cognates and names do.
"""

import itertools
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace

import sentencepiece

from ..text.sentencepiece_model import (
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
)

MAX_CHANGED = 0.02  # share of lines of the old language that may be written otherwise
AIM = 0.0125  # the share to aim at, so that a few hundred other lines stay below MAX_CHANGED
FOLDS = 8
PRICES = [2.0 ** (step / 4) for step in range(-4, 49)]  # tokens of gain that one line is worth
MODEL_ORDER = 5  # characters
# Lines in which a string that was not seen is expected, and what is left of it for each pair of
# characters that was not seen: of the values tried on English against French prompts, those that
# used most new pieces at the same share of changed lines.
UNSEEN_LINES, UNSEEN_PAIR = 0.5, 0.3
SLACK = 1.0  # nats above the level at which a Unigram piece wins


def processor(model: SentencePieceModel) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model.to_bytes())


def score_pieces(
    old: SentencePieceModel,
    new: list[Piece],
    kind: str,
    old_text: list[str] | None,
    new_text: list[str] | None,
) -> tuple[SentencePieceModel, dict]:
    """A's pieces and then `new`, with scores.

    Args:
        old: A.
        new: B's pieces that A lacks, in B's order, of type NORMAL; control and user-defined ones
            are kept as they are.
        kind: B's model type, which says what its scores mean.
        old_text, new_text: utterances of both languages, or None.
    Returns:
        The merged model, and what was decided: {"rule": ..., and with `old_text` "price", "lines",
        "held_out_changed" (lines whose segmentation changed while they were held out)}.
    """
    scored = [piece for piece in new if piece.type == NORMAL]
    natural = natural_scores(old, scored, kind)
    known = {char for piece in old.pieces if piece.type == NORMAL for char in piece.text}
    safe = {piece.text for piece in scored if not set(piece.text) <= known}
    if old_text is None or not scored:
        levels = {p.text: natural[p.text] if p.text in safe else None for p in scored}
        decided = {"rule": "pieces with a character that A lacks are used, all others are not"}
    else:
        choice = _Choice(old, scored, natural, safe, old_text, new_text)
        levels, decided = choice.search()
    return _with_levels(old, new, levels), decided


def natural_scores(old: SentencePieceModel, new: list[Piece], kind: str) -> dict[str, float]:
    """B's scores on A's scale, so that B's own pieces compete with one another as in B.

    Unigram: log-probabilities, within A's range, so that the penalty of an unknown character (the
    lowest score less 10) stays A's; ranks become log-probabilities by Zipf's law. BPE: 0, "below
    all of A's"; B's order is kept by `_with_levels`.
    """
    if old.kind != "unigram":
        return {piece.text: 0.5 for piece in new}
    low, high = _score_range(old)
    if kind == "unigram":
        return {piece.text: min(max(piece.score, low), high) for piece in new}
    harmonic = math.log(sum(1 / (rank + 1) for rank in range(len(new) + 1)))
    ranked = sorted(new, key=lambda piece: -piece.score)
    zipf = (-math.log(rank + 1) - harmonic for rank in range(len(ranked)))
    return {p.text: min(max(score, low), high) for p, score in zip(ranked, zipf, strict=True)}


def _score_range(model: SentencePieceModel) -> tuple[float, float]:
    scores = [piece.score for piece in model.pieces if piece.type == NORMAL] or [0.0]
    return min(scores), max(scores)


def _with_levels(
    old: SentencePieceModel, new: list[Piece], levels: dict[str, float | None]
) -> SentencePieceModel:
    low, high = _score_range(old)
    scores = [piece.score for piece in new if piece.type == NORMAL] or [0.0]
    lowest, highest = min(scores), max(scores)
    pieces = list(old.pieces)
    for piece in new:
        if piece.type != NORMAL:
            pieces.append(piece)
            continue
        level = levels[piece.text]
        kind = UNUSED if level is None else NORMAL
        if old.kind == "unigram":
            score = low if level is None else min(max(level, low), high)
        elif level is None or level < 1:
            score = low - 1 + piece.score - highest
        else:
            score = high + 1 + piece.score - lowest
        pieces.append(replace(piece, score=score, type=kind))
    return old.with_pieces(pieces)


# --- where a new piece competes -----------------------------------------------------------------


def find_levels(model: SentencePieceModel):
    """A function (text, strings, longest) -> [(string, level), ...] of every place in a normalised
    text where one of the strings stands."""
    return _unigram_levels(model) if model.kind == "unigram" else _bpe_levels(model)


def _unigram_levels(model: SentencePieceModel):
    low, high = _score_range(model)
    scores = {piece.text: piece.score for piece in model.pieces if piece.type == NORMAL}
    for piece in model.pieces:
        if piece.type == USER_DEFINED:  # as SentencePiece scores them
            scores[piece.text] = len(piece.text) * high - 0.1
    longest_old = max(map(len, scores), default=1)

    def levels(text, strings, longest):
        n = len(text)
        forward, backward = [-math.inf] * (n + 1), [-math.inf] * (n + 1)
        forward[0] = backward[n] = 0.0
        arcs = []
        for start in range(n):
            for end in range(start + 1, min(n, start + longest_old) + 1):
                score = scores.get(text[start:end])
                if score is not None:
                    arcs.append((start, end, score))
            if text[start] not in scores:
                arcs.append((start, start + 1, low - 10))
        for start, end, score in arcs:
            forward[end] = max(forward[end], forward[start] + score)
        for start, end, score in reversed(arcs):
            backward[start] = max(backward[start], score + backward[end])
        return [
            (text[start:end], forward[n] - forward[start] - backward[end])
            for start, end in _places(text, strings, longest)
        ]

    return levels


def _bpe_levels(model: SentencePieceModel):
    scores = {piece.text: piece.score for piece in model.pieces if piece.type == NORMAL}

    def levels(text, strings, longest):
        symbols = list(text)
        while True:
            pairs = [a + b for a, b in itertools.pairwise(symbols)]
            found = [(-scores[pair], i) for i, pair in enumerate(pairs) if pair in scores]
            if not found:
                break
            _, i = min(found)
            symbols[i : i + 2] = [pairs[i]]
        breaks, position = {0}, 0
        for symbol in symbols:
            position += len(symbol)
            breaks.add(position)
        return [
            (text[start:end], 0.0 if start in breaks and end in breaks else 1.0)
            for start, end in _places(text, strings, longest)
        ]

    return levels


def _places(text, strings, longest):
    for start in range(len(text)):
        for end in range(start + 1, min(len(text), start + longest) + 1):
            if text[start:end] in strings:
                yield start, end


class CharacterModel:
    """Interpolated character n-grams over strings with weights."""

    def __init__(self, texts: dict[str, int]):
        self.counts = [Counter() for _ in range(MODEL_ORDER + 1)]
        for text, weight in texts.items():
            for order in range(1, MODEL_ORDER + 1):
                for start in range(len(text) - order + 1):
                    self.counts[order][text[start : start + order]] += weight
        self.total = self.counts[1].total()
        self.after = [Counter() for _ in range(MODEL_ORDER)]  # by length of the context
        self.kinds = [Counter() for _ in range(MODEL_ORDER)]
        for order in range(2, MODEL_ORDER + 1):
            for gram, count in self.counts[order].items():
                self.after[order - 1][gram[:-1]] += count
                self.kinds[order - 1][gram[:-1]] += 1

    def expected(self, text: str) -> float:
        """How often the string should occur in as much text, at least what UNSEEN_LINES says."""
        if not self.total:
            return 0.0
        expected, n_chars = float(self.total), len(self.counts[1])
        for i, char in enumerate(text):
            p = (self.counts[1][char] + n_chars / (n_chars + 1)) / (self.total + n_chars)
            for length in range(1, min(i, MODEL_ORDER - 1) + 1):
                context = text[i - length : i]
                count = self.after[length][context]
                if not count:
                    break
                kinds = self.kinds[length][context]
                p = (self.counts[length + 1][context + char] + kinds * p) / (count + kinds)
            expected *= p
        order = min(2, len(text))
        grams = (text[i : i + order] for i in range(len(text) - order + 1))
        unseen = sum(gram not in self.counts[order] for gram in grams)
        return max(expected, UNSEEN_LINES * UNSEEN_PAIR**unseen)


# --- the choice ---------------------------------------------------------------------------------


class _Choice:
    """What one merge's search needs at every price."""

    def __init__(self, old, new, natural, safe, old_text, new_text):
        self.old, self.new, self.natural, self.safe = old, new, natural, safe
        self.processor = processor(old)
        self.old_text = old_text
        self.bpe = old.kind != "unigram"
        self.high = 1.0 if self.bpe else _score_range(old)[1]
        strings = {piece.text for piece in new}
        longest = max(map(len, strings))
        # Text falls apart at blanks, unless a piece goes across one.
        texts = [p.text for p in (*old.pieces, *new) if p.type in (NORMAL, USER_DEFINED)]
        across = any("▁" in text[1:] for text in texts)
        self.old_lines = [self._chunks(line, across) for line in old_text]
        if new_text is None:  # B's pieces, as often as B's scores say
            self.new_chunks = _pieces_as_text(new, natural if old.kind == "unigram" else None)
        else:
            self.new_chunks = Counter(c for line in new_text for c in self._chunks(line, across))
        levels_of = find_levels(old)
        chunks = {*self.new_chunks, *(chunk for line in self.old_lines for chunk in line)}
        self.levels = {chunk: levels_of(chunk, strings, longest) for chunk in chunks}
        self.gains = self._gather(self.new_chunks)

    def _chunks(self, line: str, across: bool) -> list[str]:
        text = self.processor.normalize(line)
        return [text] if across else re.findall("▁[^▁]*|[^▁]+", text)

    def _gather(self, chunks: dict[str, int]) -> dict[str, list[tuple[float, int]]]:
        """{piece: [(level, weight), ...] in ascending order}."""
        found = defaultdict(Counter)
        for chunk, weight in chunks.items():
            for text, level in self.levels[chunk]:
                found[text][level] += weight
        return {text: sorted(counter.items()) for text, counter in found.items()}

    def _evidence(self, lines: list[int]):
        """(levels of the pieces in these lines, how often each piece is expected there)."""
        chunks = Counter(chunk for i in lines for chunk in set(self.old_lines[i]))
        model = CharacterModel(chunks)
        return self._gather(chunks), {p.text: model.expected(p.text) for p in self.new}

    def choose_levels(self, evidence, price: float) -> dict[str, float | None]:
        found, expected = evidence
        return {
            piece.text: self._choose(piece.text, found.get(piece.text, []), expected, price)
            for piece in self.new
        }

    def _choose(self, text, risks, expected, price) -> float | None:
        """The level with the best gain - price * risk, None where every one loses."""
        gains = self.gains.get(text, [])
        n_seen = sum(weight for _, weight in risks)
        n_expected = max(n_seen, 0.0 if text in self.safe else expected[text])

        def risk(level):
            above = sum(weight for other, weight in risks if other < level)
            # k of n places are lost at this level: of the unseen ones, probably (k + 1/2)/(n + 1)
            return n_expected * (above + 0.5) / (n_seen + 1)

        best_value, best = 0.0, None
        if not gains and not n_seen and text in self.safe:
            return self.natural[text]
        bpe, high = self.bpe, self.high
        gain = 0
        for level, weight in gains:
            gain += weight
            if level > high:
                break
            if bpe:
                chosen = level + 0.5
            else:
                next_risk = next((other for other, _ in risks if other > level), math.inf)
                chosen = min(level + min(SLACK, (next_risk - level) / 2), high)
            value = gain - price * risk(chosen)
            if value > best_value:
                best_value, best = value, chosen
        natural = self.natural[text]
        if best is not None and not bpe and natural > best and risk(natural) <= risk(best):
            return natural
        return best

    def search(self) -> tuple[dict[str, float | None], dict]:
        """The levels at the lowest price that keeps unseen old text, and what was found."""
        order = list(range(len(self.old_text)))
        random.Random(0).shuffle(order)
        before = self.processor.encode(self.old_text)
        folds = [sorted(order[k::FOLDS]) for k in range(FOLDS)] if len(order) > FOLDS else []
        held = [set(fold) for fold in folds]
        evidence = [self._evidence([i for i in order if i not in fold]) for fold in held]

        def changed(price):
            count = 0
            for fold, seen in zip(folds, evidence, strict=True):
                merged = processor(
                    _with_levels(self.old, self.new, self.choose_levels(seen, price))
                )
                after = merged.encode([self.old_text[i] for i in fold])
                count += sum(before[i] != ids for i, ids in zip(fold, after, strict=True))
            return count

        def keeps(count):  # with two standard deviations to spare
            spare = count + 2 * math.sqrt(count) <= MAX_CHANGED * len(order)
            return spare and count <= AIM * len(order)

        counts, low, high = {}, 0, len(PRICES) if folds else 0
        while low < high:
            middle = (low + high) // 2
            counts[middle] = changed(PRICES[middle])
            low, high = (low, middle) if keeps(counts[middle]) else (middle + 1, high)
        if not folds or low == len(PRICES):
            levels = {p.text: self.natural[p.text] if p.text in self.safe else None
                      for p in self.new}  # fmt: skip
            return levels, {
                "rule": "only pieces with a character that A lacks are used: at every price too "
                "many held-out lines change, or there are too few lines",
                "lines": len(order),
            }
        levels = self.choose_levels(self._evidence(order), PRICES[low])
        return levels, {
            "rule": "gain on the new text less price times risk on the old text",
            "price": PRICES[low],
            "lines": len(order),
            "held_out_changed": counts[low],
        }


def _pieces_as_text(new: list[Piece], log_probabilities: dict[str, float] | None) -> Counter:
    """The pieces themselves, some ten thousand tokens in all."""
    if log_probabilities is None:
        ranked = sorted(new, key=lambda piece: -piece.score)
        weights = {piece.text: 1 / (rank + 1) for rank, piece in enumerate(ranked)}
    else:
        weights = {text: math.exp(value) for text, value in log_probabilities.items()}
    total = sum(weights.values())
    return Counter({text: max(1, round(1e4 * w / total)) for text, w in weights.items()})
