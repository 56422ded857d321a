"""Which lines a model can be trained on: durations, rates, and tokens that fit into the frames."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable

from training.data.utterances import Dropped, UnusableLine, Utterance, dropped_line


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a training clip must keep; None: no limit. Rates are per second of sound."""

    min_duration_s: float = 0.0
    max_duration_s: float = math.inf
    min_tokens_per_s: float | None = None
    max_tokens_per_s: float | None = None
    max_tokens: int | None = None
    min_chars_per_s: float | None = None
    max_chars_per_s: float | None = None
    max_tokens_per_frame: float | None = None  # of the encoder's frames, for transducers
    needs_text: bool = True  # without it only durations matter
    frame_per_token: bool = False  # and one more between two equal ones, as CTC needs


def check_for_training(
    utterances: Iterable[Utterance],
    tokenizer,
    limits: Limits,
    encoder_frames: Callable[[float], int] | None = None,
    head=None,
    prompt: dict | None = None,
) -> tuple[list[Utterance], list[Dropped]]:
    """Tokenize and keep what a model can be trained on.

    Args:
        tokenizer: `of_language(lang)`, and of what it gives `encode(text) -> ids`, `unk_id`.
        encoder_frames: seconds -> T' of the encoder; None: tokens are not held against frames.
        head: that is trained; one that takes a prompt makes the tokens of it and the text.
        prompt: {slot: value} for lines that lack a slot.
    Returns:
        Usable utterances with their tokens, and what is left out.
    """
    kept, dropped = [], []
    for utterance in utterances:
        try:
            line = utterance.as_line(prompt or {})
            lang = utterance.lang if head is None else head.language_of(line)
            tokens, n_prompt = _tokens_of(utterance, lang, tokenizer, limits, head), 0
            slots = {} if head is None else _of_prompt(head.encoder_slots, line)
            if encoder_frames is not None:
                _check_frames(tokens, encoder_frames(utterance.duration_s), limits)
            if head is not None and head.prompt is not None:
                ids, n_prompt = _of_prompt(head.training_ids, line)
                tokens = tuple(ids)
        except UnusableLine as error:
            dropped.append(dropped_line(utterance, *error.args))
        else:
            changes = {"tokens": tokens, "prompt_length": n_prompt, "encoder_slots": slots}
            kept.append(dataclasses.replace(utterance, **changes))
    return kept, dropped


def _of_prompt(asked: Callable, line: dict):
    try:
        return asked(line)
    except ValueError as error:
        raise UnusableLine("bad_prompt", str(error)) from None


def _tokens_of(
    utterance: Utterance, lang: str | None, tokenizer, limits: Limits, head
) -> tuple[int, ...]:
    seconds = utterance.duration_s
    if seconds < limits.min_duration_s:
        raise UnusableLine("too_short", f"{seconds} s is below data.min_duration_s")
    if seconds > limits.max_duration_s:
        raise UnusableLine("too_long", f"{seconds} s is above data.max_duration_s")
    if not limits.needs_text:
        return ()
    if not utterance.text.strip():
        if head is not None and head.prompt is not None:
            return ()  # silence: the end follows the prompt
        raise UnusableLine("empty_text", "text is empty")
    _check_rate("chars", len(utterance.text.strip()), seconds, limits)
    try:
        tokenizer = tokenizer.of_language(lang)
    except ValueError as error:
        raise UnusableLine("unknown_lang", str(error)) from None
    tokens = tuple(tokenizer.encode(utterance.text))
    if not tokens:
        raise UnusableLine("empty_text", f"the tokenizer makes no token of {utterance.text!r}")
    unknown = _unknown_characters(tokenizer, utterance.text, tokens)
    if unknown:
        raise UnusableLine("unknown_characters", f"the tokenizer cannot write {unknown!r}")
    _check_rate("tokens", len(tokens), seconds, limits)
    if limits.max_tokens is not None and len(tokens) > limits.max_tokens:
        detail = f"{len(tokens)} tokens are above data.max_tokens"
        raise UnusableLine("too_many_tokens", detail)
    return tokens


def _check_rate(kind: str, count: int, seconds: float, limits: Limits) -> None:
    rate = count / seconds
    for bound, word, wrong in (("min", "below", rate.__lt__), ("max", "above", rate.__gt__)):
        limit = getattr(limits, f"{bound}_{kind}_per_s")
        if limit is not None and wrong(limit):
            few = "few" if bound == "min" else "many"
            raise UnusableLine(
                f"too_{few}_{kind}_per_s",
                f"{count} {kind} in {seconds} s, {rate:.2f} a second, "
                f"is {word} data.{bound}_{kind}_per_s",
            )


def _check_frames(tokens: tuple[int, ...], n_frames: int, limits: Limits) -> None:
    needed = len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
    if limits.frame_per_token and needed > n_frames:
        raise UnusableLine(
            "too_many_tokens", f"CTC needs {needed} encoder frames, the clip gives {n_frames}"
        )
    most = limits.max_tokens_per_frame
    if most is not None and len(tokens) > most * n_frames:
        raise UnusableLine(
            "too_many_tokens",
            f"{len(tokens)} tokens in {n_frames} encoder frames, above data.max_tokens_per_frame",
        )


def _unknown_characters(tokenizer, text: str, tokens: tuple[int, ...]) -> str:
    """What of the text would be lost; empty if nothing."""
    characters = dict.fromkeys(c for c in text if not c.isspace())
    if tokenizer.unk_id is None:  # characters: those without a token are dropped in silence
        return " ".join(c for c in characters if not tokenizer.encode(c))
    if tokenizer.unk_id not in tokens:
        return ""
    unknown = [c for c in characters if tokenizer.unk_id in tokenizer.encode(c)]
    return " ".join(unknown) or text
