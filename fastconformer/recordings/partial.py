"""What a stream has heard so far: a text that grows, made anew at its end only.

Tokens become text and words by rules that look at their neighbours (a mark is glued to the word
before it, a word goes on over several tokens). What stands some tokens before the end does not
change any more: `RunningText` keeps it, and a `Partial` builds the rest, so that its cost does not
grow with what was said before.
"""

from dataclasses import dataclass, field

from ..decoding import Hypothesis
from ..text.scripts import has_spaceless
from .timestamps import Span, in_seconds

KEPT = 24  # tokens at the end that are never settled


@dataclass(frozen=True)
class Partial:
    """What a stream has heard so far.

    stable: how many of the tokens, from the first, will not change; duration: seconds heard;
    ended_s: when the last utterance ended, in seconds, where the model says so by a token (`<EOU>`)
    and it is stable, else None; text, tokens, the encoder frame of each (token_frames), and words
    with times in seconds are made when asked for.
    """

    stable: int
    duration: float
    ended_s: float | None
    _head: object = field(repr=False)
    _found: Hypothesis = field(repr=False)  # goes on growing: its first `stable` tokens are meant
    _ahead: Hypothesis = field(repr=False)  # after them, and may change
    _end: Hypothesis = field(repr=False)  # tokens from `_before.first` on, with those ahead
    _before: "Settled" = field(repr=False)

    @property
    def tokens(self) -> list[int]:
        return self._found.tokens[: self.stable] + self._ahead.tokens

    @property
    def token_frames(self) -> list[int]:
        return self._found.frames[: self.stable] + self._ahead.frames

    @property
    def text(self) -> str:
        return self._text_to(len(self._end.tokens))

    @property
    def stable_text(self) -> str:
        """The words at the text's beginning that will not change. The last stable one is left out:
        it may still go on, so that its end is told with what comes after it, be it the utterance's.
        """
        n_stable = len(self._end.tokens) - len(self._ahead.tokens)
        text = self._text_to(n_stable)
        if n_stable and self._end.tokens[n_stable - 1] in self._head.tokenizer.utterance_ends:
            return text
        last = max(text.rfind(" "), 0)
        if has_spaceless(text[last:]):  # as Chinese, where a word is what a token writes
            words = self._head.words(self._end.part(0, n_stable))
            if words and text.endswith(words[-1].text):
                last = max(last, len(text) - len(words[-1].text))
        return text[:last].rstrip(" ")

    @property
    def words(self) -> list[Span]:
        return self.words_from(0)

    @property
    def n_settled(self) -> int:
        """How many of the words no later partial changes."""
        return self._before.n_words

    def words_from(self, first: int) -> list[Span]:
        """The words from the `first`th on. From `n_settled` on, as a later reader of a stream asks
        for them, they cost the same however many there are before."""
        before = self._before
        words = self._head.words(self._end)[before.n_context_words :]
        words = before.words[first : before.n_words] + words[max(0, first - before.n_words) :]
        return in_seconds(words, self._head.model.config.frame_seconds, 0.0, self.duration)

    def _text_to(self, n: int) -> str:
        text = self._head.text(self._end.part(0, n))
        return self._before.text + text[self._before.n_context :]


@dataclass(frozen=True)
class Settled:
    """What is made of the tokens before the `n_tokens`th: a text, and the first `n_words` of words,
    in frames. Tokens from the `first`th on give those after them what they need to see: n_context
    characters and n_context_words words are made of these."""

    text: str = ""
    words: list[Span] = field(default_factory=list)
    n_words: int = 0
    n_tokens: int = 0
    first: int = 0
    n_context: int = 0
    n_context_words: int = 0


class RunningText:
    """Makes the partials of one stream, whose head is `head`."""

    def __init__(self, head):
        self.head, self.settled = head, Settled()
        self._next_try = 2 * KEPT  # tokens after the settled ones
        self._n_looked_at, self._ended_s = 0, None  # for an utterance's end

    def partial(self, found: Hypothesis, ahead: Hypothesis | None, duration_s: float) -> Partial:
        """found: tokens that stay; ahead: more, that may change."""
        self._settle(found)
        self._look_for_ends(found)
        ahead = ahead or Hypothesis(durations=None if found.durations is None else [])
        settled = self.settled
        end = found.part(settled.first)
        end.tokens += ahead.tokens
        end.frames += ahead.frames
        if end.durations is not None:
            end.durations += ahead.durations
        n_stable, ended_s = len(found.tokens), self._ended_s
        return Partial(n_stable, duration_s, ended_s, self.head, found, ahead, end, settled)

    def _look_for_ends(self, found: Hypothesis) -> None:
        ends, first = self.head.tokenizer.utterance_ends, self._n_looked_at
        self._n_looked_at = len(found.tokens)
        for token, frame in zip(found.tokens[first:], found.frames[first:]):
            if token in ends:
                self._ended_s = frame * self.head.model.config.frame_seconds

    def _settle(self, found: Hypothesis) -> None:
        while len(found.tokens) - self.settled.n_tokens >= self._next_try:
            end = self.settled.n_tokens + self._next_try
            settled = self._cut(found, end)
            if settled is None:  # one word, or a tokenizer that cannot be cut: seldom tried again
                self._next_try *= 2
            else:
                self.settled, self._next_try = settled, 2 * KEPT

    def _cut(self, found: Hypothesis, end: int) -> Settled | None:
        """Settles tokens that stand `KEPT` and more before the `end`th, up to one after which text
        and words are the same when they are made without the present context; None: there is none.
        """
        head, now = self.head, self.settled
        whole, rest = found.part(now.first, end), found.part(now.n_tokens, end)
        text, words = head.text(whole), head.words(whole)
        rest_text, rest_words = head.text(rest), head.words(rest)
        for cut in range(end - KEPT, now.n_tokens, -1):
            before, context = found.part(now.first, cut), found.part(now.n_tokens, cut)
            text_before, context_text = head.text(before), head.text(context)
            after = text[len(text_before) :]
            if not text.startswith(text_before) or rest_text != context_text + after:
                continue
            words_before, n_context = head.words(before), len(head.words(context))
            n = len(words_before)
            if words[:n] == words_before and rest_words[n_context:] == words[n:]:
                now.words.extend(words_before[now.n_context_words :])
                return Settled(
                    text=now.text + text_before[now.n_context :],
                    words=now.words,
                    n_words=len(now.words),
                    n_tokens=cut,
                    first=now.n_tokens,
                    n_context=len(context_text),
                    n_context_words=n_context,
                )
        return None
