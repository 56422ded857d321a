"""What a stream tells while it runs: equal to what is made of all tokens, at a cost that stays."""

import types

import numpy as np
import pytest
from conftest import golden, load_case
from hypothesis import given, settings
from hypothesis import strategies as st

from fastconformer import load_model
from fastconformer.decoding import Hypothesis
from fastconformer.heads import CTC, Transducer
from fastconformer.recordings.partial import RunningText
from fastconformer.recordings.timestamps import in_seconds
from fastconformer.text.tokenizer import CharTokenizer

LETTERS = CharTokenizer([" ", *"abc.,?", *"你好吗。"])


class Counted:
    """A tokenizer that counts the tokens which it is asked to write."""

    def __init__(self, tokenizer):
        self.tokenizer, self.count = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, ids):
        self.count += len(ids)
        return self.tokenizer.decode(ids)

    def ids_to_pieces(self, ids):
        self.count += len(ids)
        return self.tokenizer.ids_to_pieces(ids)


def head_of(kind, tokenizer, durations=()):
    config = types.SimpleNamespace(
        frame_seconds=0.08, loss=types.SimpleNamespace(durations=durations)
    )
    return kind(types.SimpleNamespace(tokenizer=tokenizer, config=config), "any")


@pytest.fixture(scope="module")
def bpe():
    return load_model(golden("stream_ctc") / "model.nemo").tokenizer


def grown(head, tokens, rng, size: int):
    """(found so far, what may follow) as a stream grows by up to `size` tokens at a time."""
    found, frame, at = head.first_hypothesis(), 0, 0
    while at < len(tokens):
        n = int(rng.integers(0, size + 1))
        ahead = int(rng.integers(0, 4))
        for token in tokens[at : at + n]:
            found.tokens.append(token)
            found.frames.append(frame)
            if found.durations is not None:
                found.durations.append(int(rng.integers(0, 4)))
            frame += int(rng.integers(0, 4))
        at += n
        may = tokens[at : at + ahead]
        durations = None if found.durations is None else [1] * len(may)
        yield found, Hypothesis(may, [frame] * len(may), durations)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["ctc", "rnnt", "tdt"]),
    letters=st.booleans(),
    size=st.sampled_from([3, 8, 300]),
)
def test_a_partial_is_what_all_tokens_give(bpe, seed, kind, letters, size):
    tokenizer = LETTERS if letters else bpe
    durations = (0, 1, 2, 3) if kind == "tdt" else ()
    head = head_of(CTC if kind == "ctc" else Transducer, tokenizer, durations)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, tokenizer.vocab_size, int(rng.integers(1, 250))).tolist()
    running, kept, stable_text, told, n_settled = RunningText(head), [], "", [], 0
    for found, ahead in grown(head, tokens, rng, size):
        partial = running.partial(found, ahead, 1.0)
        whole = found.part(0)
        whole.tokens += ahead.tokens
        whole.frames += ahead.frames
        if whole.durations is not None:
            whole.durations += ahead.durations
        wanted = head.text(whole), in_seconds(head.words(whole), 0.08, 0.0, 1.0)
        assert (partial.text, partial.words) == wanted
        assert (partial.tokens, partial.token_frames) == (whole.tokens, whole.frames)
        assert partial.text.startswith(stable_text)  # of the partial before
        assert head.text(found).startswith(partial.stable_text)
        told[n_settled:] = partial.words_from(n_settled)
        assert told == partial.words
        stable_text, n_settled = partial.stable_text, partial.n_settled
        if rng.random() < 0.1:
            kept.append((partial, wanted))
    for partial, wanted in kept:  # it is of its moment, however the stream went on
        assert (partial.text, partial.words) == wanted


@pytest.mark.parametrize("kind", [CTC, Transducer])
def test_its_cost_is_the_same_after_ten_minutes(bpe, kind):
    """Tokens that are written for a second of speech (4 tokens): no more at minute 10 than at
    minute 1, where it would be ten times as many."""
    counted = Counted(bpe)
    head, rng = head_of(kind, counted), np.random.default_rng(0)
    running, costs = RunningText(head), []
    tokens = rng.integers(0, bpe.vocab_size, 2400).tolist()
    found = head.first_hypothesis()
    for second in range(600):
        new = tokens[4 * second : 4 * second + 4]
        found.tokens += new
        found.frames += [12 * second + i for i in range(4)]
        if found.durations is not None:
            found.durations += [1] * 4
        counted.count = 0
        partial = running.partial(found, None, 1.0 + second)
        assert partial.text.startswith(partial.stable_text)
        assert partial.words_from(partial.n_settled)
        costs.append(counted.count)
    first, last = costs[30:90], costs[-60:]
    assert sum(last) < 1.2 * sum(first)
    assert max(last) < 1.5 * max(first) < 6000


def test_a_streams_partials_write_its_end_only():
    model = load_model(golden("stream_ctc") / "model.nemo")
    case = load_case("stream_ctc")
    clip = case.tensors["audio"][0][: int(case.tensors["audio_len"][0])].numpy()
    stream, seen = model.stream(), []
    counted = stream.head.model.tokenizer = Counted(model.tokenizer)
    for _ in range(30):
        counted.count = 0
        partial = stream.feed(clip)
        assert partial.text.startswith(partial.stable_text)
        seen.append((counted.count, len(partial.tokens)))
    (early, few), (late, many) = (np.median(seen[k : k + 6], 0) for k in (4, 24))
    assert many > 3 * few and late < 1.5 * early, seen
