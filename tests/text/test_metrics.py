"""Error counts against jiwer, alignments by replaying them, the bootstrap against its theory."""

import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastconformer.text import metrics
from fastconformer.text.metrics import (
    ErrorCounts,
    align,
    bootstrap_difference,
    char_errors,
    normalize,
    normalize_basic,
    word_errors,
)

jiwer = pytest.importorskip("jiwer", reason="jiwer, a training dependency, is not installed")

words = st.lists(st.sampled_from(["a", "b", "c", "dd", "e"]), min_size=1, max_size=90)
texts = words.map(" ".join)
corpora = st.lists(st.tuples(texts, texts | st.just("")), min_size=1, max_size=5)


def counts_of(output, words):
    return ErrorCounts(words, output.insertions, output.deletions, output.substitutions)


@settings(max_examples=300, deadline=None)
@given(corpora)
def test_word_errors_equal_jiwer(corpus):
    references, hypotheses = map(list, zip(*corpus, strict=True))
    expected = jiwer.process_words(references, hypotheses)
    got = word_errors(references, hypotheses)
    assert got == counts_of(expected, sum(len(r.split()) for r in references))
    assert got.rate == pytest.approx(expected.wer)


@settings(max_examples=200, deadline=None)
@given(corpora)
def test_char_errors_equal_jiwer(corpus):
    references, hypotheses = map(list, zip(*corpus, strict=True))
    expected = jiwer.process_characters(references, hypotheses)
    got = char_errors(references, hypotheses)
    assert got == counts_of(expected, sum(map(len, references)))
    assert got.rate == pytest.approx(expected.cer)


def plain_distance(a, b):
    """The textbook recurrence, the definition."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


@settings(max_examples=200, deadline=None)
@given(words | st.just([]), words | st.just([]))
def test_alignment_is_shortest_and_replays(reference, hypothesis):
    edits = align(reference, hypothesis)
    assert [e.reference for e in edits if e.op != "insert"] == reference
    assert [e.hypothesis for e in edits if e.op != "delete"] == hypothesis
    assert all((e.op == "equal") == (e.reference == e.hypothesis) for e in edits)
    assert sum(e.op != "equal" for e in edits) == plain_distance(reference, hypothesis)


def test_corpus_rate_is_total_errors_over_total_words():
    got = word_errors(["a b c d e f g h i j", "k"], ["a b c d e f g h i j", "l"])
    assert got.errors == 1 and got.words == 11 and got.rate == 1 / 11


def test_no_reference_words():
    assert word_errors([""], [""]).rate == 0.0
    assert word_errors([], []) == ErrorCounts()
    inserted = word_errors([" "], ["two words"])
    assert inserted == ErrorCounts(words=0, insertions=2) and inserted.rate == 2.0


def test_wrong_arguments():
    with pytest.raises(ValueError, match="2 references and 1 hypotheses"):
        word_errors(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="single string"):
        char_errors("a", "b")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Don't  STOP, now!", "don't stop now"),
        ("the dogs\u2019 bowl isn\u2019t 'here'", "the dogs bowl isn't here"),
        ("well-known \u2014 caf\u00e9\u2026", "well known caf\u00e9"),
        ("cafe\u0301 \uff21\uff22\uff23 \ufb01ne", "caf\u00e9 abc fine"),
        ("$5 + 10%", "5 10"),
        ("\u0645\u064e\u0631\u062d\u0628\u0627\u060c", "\u0645\u064e\u0631\u062d\u0628\u0627"),
        ("\u00a0 \t\n", ""),
    ],
)
def test_basic_normalizer(text, expected):
    assert normalize(text, "basic") == expected
    assert normalize(text, "none") == text


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_basic_normalizer_is_idempotent(text):
    once = normalize_basic(text)
    assert normalize_basic(once) == once
    assert once == " ".join(once.split())


def test_unknown_normalizer():
    with pytest.raises(ValueError, match="'whisper', expected one of arabic, basic, english, none"):
        normalize("a", "whisper")


def test_bootstrap_matches_normal_theory_for_equal_lengths():
    rng = np.random.default_rng(0)
    n = 400
    words = np.full(n, 10)
    old, new = rng.integers(0, 5, n), rng.integers(0, 4, n)
    low, high = bootstrap_difference(new, old, words)
    change = (new - old) / 10
    spread = 1.96 * change.std() / np.sqrt(n)
    # 10000 samples put a few percent of noise on an end
    assert low == pytest.approx(change.mean() - spread, abs=0.06 * spread)
    assert high == pytest.approx(change.mean() + spread, abs=0.06 * spread)


def test_bootstrap_is_paired_and_seeded():
    errors, words = np.arange(50) % 7, 5 + np.arange(50) % 4
    assert bootstrap_difference(errors, errors, words) == (0.0, 0.0)
    assert bootstrap_difference(errors + 1, errors, words) == pytest.approx(
        (1 / 6.5, 1 / 6.5), rel=0.1
    )
    shuffled = errors[::-1]
    first = bootstrap_difference(shuffled, errors, words, seed=3)
    assert first == bootstrap_difference(shuffled, errors, words, seed=3)
    assert first != bootstrap_difference(shuffled, errors, words, seed=4)
    assert first[0] < 0 < first[1]


def test_bootstrap_checks_lengths():
    with pytest.raises(ValueError, match="same number"):
        bootstrap_difference([1], [1, 2], [3, 4])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_difference([], [], [])


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("क्\u200dया हाल है", "क्या हाल है"),  # a joiner
        ("die auto\u00adbahn", "die autobahn"),  # a soft hyphen
        ("zusammen\u2060gesetzt", "zusammengesetzt"),
        ("\u200fשלום\u200e", "שלום"),  # marks of direction
        ("می\u200cروم", "می روم"),  # parts words, as SentencePiece has it
        ("İzmir'de", "izmir'de"),
        ("don\u00b4t go", "don't go"),
        ("l\u2032été", "l'été"),
        ("o\u201bneil", "o'neil"),
        ("rock`n roll", "rock'n roll"),
    ],
)
def test_what_is_not_heard_is_no_error(written, spoken):
    assert normalize_basic(written) == normalize_basic(spoken)


def test_a_very_long_line():
    reference = "word another " * 80_000  # ten times as long takes ten times as long
    started = time.process_time()
    words, characters = (f([reference], ["some word of it"]) for f in (word_errors, char_errors))
    assert time.process_time() - started < 6
    assert words.words == 160_000 and words.deletions == 160_000 - 4
    assert characters.deletions == len(reference.strip()) - len("some word of it")


def test_arabic_without_its_signs():
    with_signs, plain = "\u0643\u0650\u062a\u064e\u0627\u0628\u064c", "\u0643\u062a\u0627\u0628"
    assert normalize(with_signs, "arabic") == plain
    assert normalize("\u0643\u0640\u0640\u062a\u0627\u0628!", "arabic") == plain
    assert normalize(with_signs, "basic") != plain


def test_the_leaderboards_english(monkeypatch):
    english = pytest.importorskip("whisper_normalizer.english").EnglishTextNormalizer()
    for text in ("Mr. Smith isn't here; he paid $20 for the colour.", "twenty-one hmm"):
        assert normalize(text, "english") == english(text)
    assert normalize("the colour twenty one", "english") == "the color 21"
    metrics._whisper_english.cache_clear()
    monkeypatch.setitem(sys.modules, "whisper_normalizer.english", None)
    with pytest.raises(ValueError, match=r'pip install "fastconformer\[eval\]"'):
        normalize("a", "english")
