"""What is known beside the audio: a language model and phrases to expect, scored as tokens come.

A scorer has one interface, for many hypotheses at once and with nothing but tensors between steps
(n hypotheses, C candidate tokens each, S numbers of state):

    start() -> state (S,), or (B, 1, S) where it differs from clip to clip
    score(states (n, S), tokens (n, C)) -> nats (n, C), next states (n, C, S)
    final(states (n, S)) -> nats (n,), what the end of the clip adds

Scores telescope: a hypothesis's sum depends on its tokens alone, not on how they were found.
"""

import unicodedata
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

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
        self.sizes = [part.shape[-1] for part in parts]
        clips = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*clips, -1) for part in parts], -1)

    def score(self, states, tokens):
        total, following = 0.0, []
        for scorer, part in zip(self.scorers, states.split(self.sizes, -1)):
            score, after = scorer.score(part, tokens)
            total = total + score
            following.append(after)
        return total, torch.cat(following, -1)

    @property
    def trust(self) -> torch.Tensor | float:
        """(B,): how far the language model is believed in each clip; 1.0: everywhere."""
        told = [scorer.trust for scorer in self.scorers if isinstance(scorer, WordScorer)]
        return 1.0 if not told or told[0] is None else told[0]

    def final(self, states):
        parts = zip(self.scorers, states.split(self.sizes, -1))
        return sum(scorer.final(part) for scorer, part in parts)


def language_model_scorer(
    model: NGramModel,
    tokenizer: Tokenizer,
    weight: float,
    bonus: float | None,
    device,
    heard: Callable[[], list[str]] | None = None,
) -> "TokenScorer | WordScorer":
    """The scorer for what the model's words are: the tokenizer's pieces, tokens as NeMo's KenLM
    scripts write them, or whole words. `bonus` is added for each token or word; None: for words
    what an average one costs, since the audio's scores have no such cost that would be saved by
    not ending a word, and an unknown word costs little in a clip of which the model knows little:
    `heard`, what each clip says without the model, tells how much."""
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
        if bonus is not None:
            return WordScorer(model, tokenizer, weight, bonus, device)
        scorer = WordScorer(model, tokenizer, weight, weight * model.entropy(), device)
        if heard is not None:
            scorer.trust = torch.tensor(list(map(scorer.trust_in, heard())), device=device)
        return scorer
    if as_nemo > as_pieces:
        spelled = [chr(i) for i in encoded]
    return TokenScorer(model, spelled, weight, bonus or 0.0, device)


TRUSTED = 0.6  # of a clip's words, from which on the model is taken at its word
_WHOLE = 1 << 20  # states are whole numbers
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
            return torch.zeros(len(states), dtype=torch.float32, device=states.device)
        end = torch.full_like(states[:, 0], self.model.end_id)
        return self.weight * self.model.score(states[:, 0], end)[0]


class WordScorer:
    """A model over words: a word is scored when the next one begins, and at the end.

    The state holds the model's state and a hash of the word so far, which pieces extend without
    text: hash(ab) = hash(a) * base ** len(b) + hash(b). Upper case and punctuation that the model's
    words do not have are passed over. trust: (B,), how much of an unknown word's cost is asked for
    in each clip; None: all of it. A fixed cost a word would glue the words of a clip that the model
    knows nothing of.
    """

    trust: torch.Tensor | None = None

    def __init__(self, model: NGramModel, tokenizer: Tokenizer, weight, bonus, device):
        self.model, self.weight, self.bonus = model.to(device), weight, bonus
        self.hashes, self.ids = _hashed_words(model, device)
        chars = {char for word in model.words if word not in _MARKERS for char in word}
        self.chars, self.lower = chars, not any(char.isupper() for char in chars)
        begins, powers, hashes = [], [], []
        for piece in tokenizer.pieces:
            text = piece.replace("▁", " ")
            begins.append(text.startswith(" "))
            power, value = _hash(self._plain(text))
            powers.append(power)
            hashes.append(value)
        self.begins = torch.tensor(begins, device=device)
        self.powers = torch.tensor(powers, device=device)
        self.pieces = torch.tensor(hashes, device=device)

    def _plain(self, text: str) -> str:
        text = text.lower() if self.lower else text
        return "".join(c for c in text if c in self.chars or not _is_mark(c)).strip()

    def trust_in(self, heard: str) -> float:
        """How far an unknown word counts against a text: not at all where the model knows none of
        what was heard, fully from 0.6 of its words on."""
        words = list(filter(None, map(self._plain, heard.split())))
        known = sum(word in self.model.words for word in words) / max(1, len(words))
        return min(1.0, known / TRUSTED) ** 3

    def start(self):
        first = torch.tensor([self.model.start_state, 0, _WHOLE], device=self.begins.device)
        if self.trust is None:
            return first
        first = first.repeat(len(self.trust), 1, 1)
        first[:, 0, 2] = (self.trust * _WHOLE).long()
        return first

    def _ended(self, states):
        """(score, state of the model) once the word so far is complete; (n,) each."""
        state, word, trust = states.unbind(-1)
        at = torch.searchsorted(self.hashes, word.contiguous()).clamp(max=len(self.hashes) - 1)
        known = self.hashes[at] == word
        score, after = self.model.score(state, torch.where(known, self.ids[at], self.model.unk_id))
        empty = word == 0
        score = self.weight * score + self.bonus
        if self.trust is not None:
            score = torch.where(known, score, score.clamp(max=0.0) * (trust / _WHOLE))
            after = torch.where(known, after, 0)  # nor does the next word pay for it
        return torch.where(empty, 0.0, score), torch.where(empty, state, after)

    def score(self, states, tokens):
        ended, after = self._ended(states)
        begins, piece = self.begins[tokens], self.pieces[tokens]
        score = torch.where(begins, ended[:, None], 0.0)
        state = torch.where(begins, after[:, None], states[:, :1])
        word = torch.where(begins, 0, states[:, 1:2]) * self.powers[tokens] + piece
        trust = states[:, 2:].expand_as(word)
        return score, torch.stack((state, word, trust), -1)

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
        _hashed[model] = tuple(torch.tensor(column, device="cpu") for column in zip(*pairs))
    return tuple(tensor.to(device) for tensor in _hashed[model])


def unwritable(phrases: Iterable[str], tokenizer: Tokenizer) -> list[str]:
    """Those of the phrases that no text of this tokenizer can hold: they boost nothing."""
    known = {char for piece in tokenizer.pieces for char in piece.lower()}
    return [p for p in phrases if not known.issuperset("".join(p.lower().split()))]


class PhraseScorer:
    """Phrases to expect: each brings `weight` nats for every piece it is written with.

    An Aho-Corasick automaton over characters, so that any way to cut a phrase into pieces counts,
    in any case of letters, between word boundaries. The bonus is paid out evenly as the characters
    come and taken back where the phrase is left before its end.
    """

    def __init__(self, phrases: Mapping[str, float], tokenizer: Tokenizer, device):
        patterns = {}
        for phrase, weight in phrases.items():
            written = " ".join(phrase.lower().split()) if isinstance(phrase, str) else ""
            if not written:
                raise ValueError(f"a phrase to boost is {phrase!r}, expected words")
            n_pieces = max(1, tokenizer.n_pieces(phrase))
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
