"""What is known beside the audio: a language model and phrases to expect, scored as tokens come.

A scorer has one interface, for many hypotheses at once and with nothing but tensors between steps
(n hypotheses, C candidate tokens each, S numbers of state):

    start() -> state (S,)
    score(states (n, S), tokens (n, C)) -> nats (n, C), next states (n, C, S)
    final(states (n, S)) -> nats (n,), what the end of the clip adds

Scores telescope: a hypothesis's sum depends on its tokens alone, not on how they were found.
"""

import unicodedata
import weakref
from collections.abc import Mapping, Sequence

import torch

from ..text.tokenizer import Tokenizer
from .ngram import NGramModel

_BASE = 0x9E3779B97F4A7C15  # odd, so that no byte's place is lost modulo 2**64
_MASK = (1 << 64) - 1
NEMO_OFFSET = 100  # NeMo's KenLM scripts write token i as chr(i + 100)


class Fusion:
    """Several scorers as one: their states side by side, their scores added."""

    def __init__(self, scorers: Sequence):
        self.scorers = list(scorers)

    def start(self) -> torch.Tensor:
        parts = [scorer.start() for scorer in self.scorers]
        self.sizes = [len(part) for part in parts]
        return torch.cat(parts)

    def score(self, states, tokens):
        total, following = 0.0, []
        for scorer, part in zip(self.scorers, states.split(self.sizes, -1)):
            score, after = scorer.score(part, tokens)
            total = total + score
            following.append(after)
        return total, torch.cat(following, -1)

    def final(self, states):
        parts = zip(self.scorers, states.split(self.sizes, -1))
        return sum(scorer.final(part) for scorer, part in parts)


def language_model_scorer(
    model: NGramModel, tokenizer: Tokenizer, weight: float, bonus: float | None, device
) -> "TokenScorer | WordScorer":
    """The scorer for what the model's words are: the tokenizer's pieces, tokens as NeMo's KenLM
    scripts write them, or whole words. `bonus` is added for each token or word; None: for words
    what an average one costs, since the audio's scores have no such cost that would be saved by
    not ending a word. A word that the model does not know then costs that much, once: by the
    model's own account three unknown words cost far more than one, and would be glued together."""
    names = [word for word in model.words if word not in _MARKERS]
    # a file of words between spaces spells a space otherwise
    space = "<space>" if "<space>" in model.words else "▁"
    spelled = [space if piece == " " else piece for piece in tokenizer.pieces]
    pieces = set(spelled)
    encoded = range(NEMO_OFFSET, NEMO_OFFSET + tokenizer.vocab_size)
    as_pieces = sum(name in pieces for name in names)
    as_nemo = sum(len(name) == 1 and ord(name) in encoded for name in names)
    most = 0.9 * len(names)
    if max(as_pieces, as_nemo) < most:
        average = weight * model.entropy()
        costs = (average, -average) if bonus is None else (bonus, None)
        return WordScorer(model, tokenizer, weight, *costs, device)
    if as_nemo > as_pieces:
        spelled = [chr(i) for i in encoded]
    return TokenScorer(model, spelled, weight, bonus or 0.0, device)


_MARKERS = {"<s>", "</s>", "<unk>", "<UNK>"}


class TokenScorer:
    """A model over tokens: every token is scored as it comes."""

    def __init__(self, model: NGramModel, spelled: Sequence[str], weight, bonus, device):
        self.model, self.weight, self.bonus = model.to(device), weight, bonus
        ids = [model.words.get(name, model.unk_id) for name in spelled]
        self.ids = torch.tensor(ids, device=device)

    def start(self):
        return torch.tensor([self.model.start_state], device=self.ids.device)

    def score(self, states, tokens):
        score, after = self.model.score(states.expand(tokens.shape), self.ids[tokens])
        return self.weight * score + self.bonus, after[..., None]

    def final(self, states):
        if self.model.end_id is None:
            return torch.zeros(len(states), device=states.device)
        end = torch.full_like(states[:, 0], self.model.end_id)
        return self.weight * self.model.score(states[:, 0], end)[0]


class WordScorer:
    """A model over words: a word is scored when the next one begins, and at the end.

    The state holds the model's state and a hash of the word so far, which pieces extend without
    text: hash(ab) = hash(a) * base ** len(b) + hash(b). Upper case and punctuation that the model's
    words do not have are passed over. `unknown`: the score of a word that the model does not know,
    None: the model's.
    """

    def __init__(self, model: NGramModel, tokenizer: Tokenizer, weight, bonus, unknown, device):
        self.model, self.weight, self.bonus = model.to(device), weight, bonus
        self.unknown = unknown
        self.hashes, self.ids = _hashed_words(model, device)
        chars = {char for word in model.words if word not in _MARKERS for char in word}
        lower = not any(char.isupper() for char in chars)
        begins, powers, hashes = [], [], []
        for piece in tokenizer.pieces:
            text = piece.replace("▁", " ")
            if lower:
                text = text.lower()
            begins.append(text.startswith(" "))
            text = "".join(c for c in text if c in chars or not _is_mark(c)).strip()
            power, value = _hash(text)
            powers.append(power)
            hashes.append(value)
        self.begins = torch.tensor(begins, device=device)
        self.powers = torch.tensor(powers, device=device)
        self.pieces = torch.tensor(hashes, device=device)

    def start(self):
        return torch.tensor([self.model.start_state, 0], device=self.begins.device)

    def _ended(self, states):
        """(score, state of the model) once the word so far is complete; (n,) each."""
        state, word = states[..., 0], states[..., 1]
        at = torch.searchsorted(self.hashes, word.contiguous()).clamp(max=len(self.hashes) - 1)
        known = self.hashes[at] == word
        score, after = self.model.score(state, torch.where(known, self.ids[at], self.model.unk_id))
        score = self.weight * score + self.bonus
        if self.unknown is not None:
            score = torch.where(known, score, self.unknown)
        empty = word == 0
        score = torch.where(empty, 0.0, score)
        return score, torch.where(empty, state, after)

    def score(self, states, tokens):
        ended, after = self._ended(states)
        begins, piece = self.begins[tokens], self.pieces[tokens]
        score = torch.where(begins, ended[:, None], 0.0)
        state = torch.where(begins, after[:, None], states[:, :1])
        word = torch.where(begins, 0, states[:, 1:]) * self.powers[tokens] + piece
        return score, torch.stack((state, word), -1)

    def final(self, states):
        score, after = self._ended(states)
        if self.model.end_id is not None:
            end = torch.full_like(after, self.model.end_id)
            score = score + self.weight * self.model.score(after, end)[0]
        return score


def _is_mark(char: str) -> bool:
    return unicodedata.category(char).startswith("P")


def _hash(text: str) -> tuple[int, int]:
    """(base ** bytes, hash) as signed 64-bit numbers; the empty text is (1, 0)."""
    power, value = 1, 0
    for byte in text.encode():
        power = power * _BASE & _MASK
        value = (value * _BASE + byte + 1) & _MASK
    return _signed(power), _signed(value)


def _signed(n: int) -> int:
    return n - (1 << 64) if n >> 63 else n


_hashed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _hashed_words(model: NGramModel, device):
    """Sorted hashes of the model's words and the words' ids; computed once for each model."""
    if model not in _hashed:
        pairs = sorted((_hash(word)[1], i) for word, i in model.words.items())
        _hashed[model] = tuple(torch.tensor(column) for column in zip(*pairs))
    return tuple(tensor.to(device) for tensor in _hashed[model])


class PhraseScorer:
    """Phrases to expect: each brings `weight` nats for every piece it is written with.

    An Aho-Corasick automaton over characters, so that any way to cut a phrase into pieces counts,
    in any case of letters, between word boundaries. The bonus is paid out evenly as the characters
    come and taken back where the phrase is left before its end.
    """

    def __init__(self, phrases: Mapping[str, float], tokenizer: Tokenizer, device):
        patterns = {}
        for phrase, weight in phrases.items():
            written = " ".join(phrase.lower().split())
            if not written:
                raise ValueError(f"a phrase to boost is {phrase!r}, expected words")
            n_pieces = max(1, len(tokenizer.encode(phrase)))
            patterns[f" {written} "] = float(weight) * n_pieces
        alphabet = sorted({char for pattern in patterns for char in pattern} - {" "})
        # 0: a character that no phrase has; 1: where words meet
        classes = {" ": 1} | {char: i for i, char in enumerate(alphabet, start=2)}
        self._build(patterns, classes, device)
        rows = []
        for piece in tokenizer.pieces:
            text = piece.replace("▁", " ").lower()
            marks = {c: 1 for c in text if c not in classes and _is_mark(c)}
            rows.append([classes.get(c, marks.get(c, 0)) for c in text])
        longest = max(map(len, rows))
        rows = [row + [-1] * (longest - len(row)) for row in rows]
        self.chars = torch.tensor(rows, device=device).T.contiguous()  # (longest, V)

    def _build(self, patterns, classes, device):
        children: list[dict[int, int]] = [{}]
        locked, promised = [0.0], [0.0]  # paid for ever at a phrase's end; paid on the way to it
        for pattern, bonus in patterns.items():
            node = 0
            for depth, char in enumerate(pattern, start=1):
                if classes[char] not in children[node]:
                    children[node][classes[char]] = len(children)
                    children.append({})
                    locked.append(0.0)
                    promised.append(0.0)
                node = children[node][classes[char]]
                if depth < len(pattern):
                    share = bonus * (depth - 1) / (len(pattern) - 1)
                    # of phrases that begin alike the largest promise; a penalty is one too
                    promised[node] = max(promised[node], share, key=abs)
            locked[node] += bonus
        goto = [[0] * (len(classes) + 1) for _ in children]
        fail, queue = [0] * len(children), list(children[0].values())
        for c, child in children[0].items():
            goto[0][c] = child
        for node in queue:  # breadth first: a node's fail comes before it
            locked[node] += locked[fail[node]]
            goto[node] = list(goto[fail[node]])
            for c, child in children[node].items():
                fail[child] = goto[fail[node]][c]
                goto[node][c] = child
                queue.append(child)
        self.goto = torch.tensor(goto, device=device)
        self.locked = torch.tensor(locked, device=device)
        self.promised = torch.tensor(promised, device=device)

    def start(self):
        return self.goto[:1, 1]  # a word may begin

    def _walk(self, nodes, chars):
        moved = self.goto[nodes, chars.clamp(min=0)]
        return torch.where(chars >= 0, moved, nodes), self.locked[moved] * (chars >= 0)

    def score(self, states, tokens):
        nodes = before = states.expand(tokens.shape)
        score = -self.promised[before]
        for of_piece in self.chars:
            nodes, locked = self._walk(nodes, of_piece[tokens])
            score = score + locked
        return score + self.promised[nodes], nodes[..., None]

    def final(self, states):
        nodes = states[:, 0]
        _, locked = self._walk(nodes, torch.ones_like(nodes))
        return locked - self.promised[nodes]
