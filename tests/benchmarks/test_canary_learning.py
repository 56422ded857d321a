"""The experiment with Canary's prompt: how numbers are written, and judged."""

import pytest

from benchmarks import canary_learning


@pytest.mark.parametrize(
    ("lang", "words", "digits"),
    [
        ("en", "play track twenty one", "play track 21"),
        ("en", "the code is nine zero twelve", "the code is 9 0 12"),
        ("en", "call someone", "call someone"),
        ("hi", "उन्नीस और दो जोड़ो", "19 और 2 जोड़ो"),
        ("hi", "कोड है शून्य बीस", "कोड है 0 20"),
    ],
)
def test_numbers_in_digits(lang, words, digits):
    assert canary_learning.in_digits(words, lang) == digits
    changed = words != digits
    assert canary_learning.obeyed(words, "words", lang) == changed
    assert canary_learning.obeyed(digits, "digits", lang) == changed
    assert not canary_learning.obeyed(words, "digits", lang)
    assert not canary_learning.obeyed(digits, "words", lang)
    assert not canary_learning.obeyed(f"{words} {digits}", "digits", lang)
