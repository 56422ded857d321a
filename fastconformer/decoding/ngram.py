"""n-gram language models: ARPA files to tensors that score many histories at once.

A state is an n-gram that can be a history; state 0 is the empty one. What follows a state is found
by binary search over the keys `state * n_words + word`; where a word does not follow it, the
state's back-off weight is paid and a shorter history asked, for all rows together.

Source: the ARPA format of SRILM (ngram-format) and KenLM; any order.
"""

import gzip
import math
from pathlib import Path

import numpy as np
import torch

_UNKNOWN_LOG10 = -10.0  # of a word that neither the model nor its <unk> knows


class NGramModel:
    """Log-probabilities in nats. `words`: text -> id. Tensors move with `to`."""

    def __init__(self, words: dict[str, int], order: int, arrays: dict[str, torch.Tensor]):
        self.words, self.order = words, order
        self.keys, self.log_probs, self.following = (
            arrays[name] for name in ("keys", "log_probs", "following")
        )
        self.backoff, self.shorter = arrays["backoff"], arrays["shorter"]
        self.unk_id = next(words[w] for w in ("<unk>", "<UNK>") if w in words)
        self.start_state = 0
        if "<s>" in words:
            start = self.score(
                torch.zeros(1, dtype=torch.long, device="cpu"),
                torch.tensor([words["<s>"]], device="cpu"),
            )[1]
            self.start_state = int(start)
        self.end_id = words.get("</s>")

    def to(self, device) -> "NGramModel":
        for name in ("keys", "log_probs", "following", "backoff", "shorter"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def score(self, states: torch.Tensor, words: torch.Tensor):
        """states, words of one shape -> (log-probability of the word after the state, next state),
        of that shape."""
        total = torch.zeros(states.shape, dtype=torch.float32, device=states.device)
        following = torch.zeros_like(states)
        open_ = torch.ones_like(states, dtype=torch.bool)
        for _ in range(self.order):
            keys = states * len(self.words) + words
            at = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
            hit = open_ & (self.keys[at] == keys)
            total = total + torch.where(
                hit, self.log_probs[at], torch.where(open_, self.backoff[states], 0.0)
            )
            following = torch.where(hit, self.following[at], following)
            open_ = open_ & ~hit
            states = torch.where(open_, self.shorter[states], states)
        return total, following

    def entropy(self) -> float:
        """Nats of an average word, without its history."""
        words = torch.arange(len(self.words), device=self.keys.device)
        log_probs, _ = self.score(torch.zeros_like(words), words)
        return -float((log_probs.exp() * log_probs).sum())

    def sentence(self, words: list[str], ends: bool = True) -> float:
        """Log-probability of a sentence of words (or tokens), in nats."""
        ids = [self.words.get(word, self.unk_id) for word in words]
        if ends and self.end_id is not None:
            ids.append(self.end_id)
        state, total = torch.tensor([self.start_state], device=self.keys.device), 0.0
        for i in ids:
            score, state = self.score(state, torch.full_like(state, i))
            total += float(score)
        return total


def read_arpa(path: str | Path) -> NGramModel:
    """An ARPA file, of any order; `.gz` is unpacked on the way.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not ARPA, a broken line (named by number), an n-gram whose first words are none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"language model {path} is not a file")
    with open(path, "rb") as head:
        if head.read(8) == b"mmap lm ":
            raise ValueError(f"{path} is a KenLM binary file; give the .arpa that it was made of")
    words: dict[str, int] = {}
    orders: list[tuple[list, list, list]] = []  # ids, log-probability, back-off of each order
    expected: dict[int, int] = {}
    order, number, ended = None, 0, False
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                line = line.strip(" \r\n\t")
                if not line:
                    continue
                if line[0] == "\\":
                    ended = line == "\\end\\"
                    if ended:
                        break
                    order = _section(line)
                    if order:
                        if order != len(orders) + 1:
                            raise ValueError(f"{line} follows order {len(orders)}")
                        orders.append(([], [], []))
                elif order == 0:
                    if line.startswith("ngram "):
                        n, _, count = line.removeprefix("ngram ").partition("=")
                        expected[int(n)] = int(count)
                elif order:
                    fields = line.split("\t") if "\t" in line else line.split(" ")
                    # words are separated by spaces, in some files by tabs
                    grams = " ".join(fields[1:]).split(" ")
                    if len(grams) not in (order, order + 1):
                        raise ValueError(f"expected {order} words and at most one weight")
                    ids, log_probs, backoffs = orders[order - 1]
                    log_probs.append(float(fields[0]))
                    backoffs.append(float(grams[order]) if len(grams) > order else 0.0)
                    if order == 1:
                        if grams[0] in words:
                            raise ValueError(f"{grams[0]!r} occurs twice")
                        words[grams[0]] = len(words)
                    ids.append([words[gram] for gram in grams[:order]])
                elif order is None and number > 1000:
                    break
    except (KeyError, ValueError, OSError, EOFError) as error:
        reason = f"{error} is not among the 1-grams" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}:{number}: not an ARPA language model: {reason}") from None
    if not orders or not words:
        raise ValueError(f"{path}: not an ARPA language model: no \\1-grams: section")
    counts = {n + 1: len(part[0]) for n, part in enumerate(orders)}
    if not ended or any(counts.get(n, 0) != count for n, count in expected.items()):
        raise ValueError(f"{path}: the file ends early: {counts} n-grams, its head says {expected}")
    if not {"<unk>", "<UNK>"} & words.keys():
        words["<unk>"] = len(words)
        for part, value in zip(orders[0], ([words["<unk>"]], _UNKNOWN_LOG10, 0.0)):
            part.append(value)
    try:
        return NGramModel(words, len(orders), _tensors(orders, len(words)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _section(line: str) -> int | None:
    """0 of \\data\\, N of \\N-grams:."""
    if line == "\\data\\":
        return 0
    if line.endswith("-grams:") and line[1:-7].isdigit():
        return int(line[1:-7])
    raise ValueError(f"{line!r} is no section")


def _tensors(orders, n_words: int) -> dict[str, torch.Tensor]:
    """n-grams -> sorted arcs. The n-grams of order n are states numbered after those before, in
    the order of their keys; those of the highest order are none, and lead to their suffix."""
    grams = [
        np.array(ids, dtype=np.int64).reshape(-1, n + 1) for n, (ids, _, _) in enumerate(orders)
    ]
    first, keys_of = [1], []  # state of the first n-gram of each order; keys of each order
    states = [np.zeros(1, dtype=np.int64)]

    def find(ids: np.ndarray) -> np.ndarray:
        """State of each row of words, -1 where it is no n-gram."""
        state = np.zeros(len(ids), dtype=np.int64)
        for n in range(ids.shape[1]):
            keys = state * n_words + ids[:, n]
            at = np.minimum(np.searchsorted(keys_of[n], keys), len(keys_of[n]) - 1)
            hit = (state >= 0) & (keys_of[n][at] == keys) if len(keys_of[n]) else state < -1
            state = np.where(hit, first[n] + at, -1)
        return state

    log_probs, backoff, shorter = [], [np.zeros(1)], [np.zeros(1, dtype=np.int64)]
    for n, ids in enumerate(grams):
        history = find(ids[:, :-1])
        if (history < 0).any():
            bad = int((history < 0).argmax())
            raise ValueError(f"{n + 1}-gram number {bad + 1} has a history that is no {n}-gram")
        keys = history * n_words + ids[:, -1]
        by_key = np.argsort(keys, kind="stable")
        keys_of.append(keys[by_key])
        if len(keys) > 1 and (np.diff(keys_of[-1]) == 0).any():
            raise ValueError(f"a {n + 1}-gram occurs twice")
        grams[n] = ids[by_key]
        log_probs.append(np.array(orders[n][1])[by_key])
        backoff.append(np.array(orders[n][2])[by_key])
        suffix = np.zeros(len(ids), dtype=np.int64)
        for start in range(n, 0, -1):  # the longest suffix that is a state wins
            found = find(grams[n][:, start:])
            suffix = np.where(found >= 0, found, suffix)
        shorter.append(suffix)
        states.append(first[n] + np.arange(len(ids)))
        first.append(first[n] + len(ids))
    states[-1] = shorter[-1]  # the highest order is no history
    keys = np.concatenate(keys_of)
    order = np.argsort(keys, kind="stable")
    nats = math.log(10)
    highest = first[len(grams) - 1]
    return {
        "keys": torch.from_numpy(keys[order]),
        "log_probs": torch.from_numpy(np.concatenate(log_probs)[order] * nats).float(),
        "following": torch.from_numpy(np.concatenate(states[1:])[order]),
        "backoff": torch.from_numpy(np.concatenate(backoff)[:highest] * nats).float(),
        "shorter": torch.from_numpy(np.concatenate(shorter)[:highest]),
    }
