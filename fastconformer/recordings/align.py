"""When each word of a known text was said."""

import numpy as np
import torch

from ..decoding import Confidence, DecodingOptions, ctc_align
from .modes import evaluating
from .samples import collate, read_samples
from .timestamps import Span, in_seconds, spans_of_tokens

_MARKS = (",", ".", "!", "?")


@torch.no_grad()
def align(
    model, audio, text: str, confidence: Confidence | str | bool | None = None, **slots
) -> list[Span]:
    """When each word of a known text was said, by the CTC head.

    Args:
        audio: a path or mono samples, as for `transcribe`; text: words between spaces.
        confidence: also give each word's confidence; True takes NeMo's defaults.
        slots: of the head's prompt, such as target_lang.
    Returns:
        One Span for each word of `text.split()`, times in seconds. A word of which the
        tokenizer knows nothing has no extent.
    Raises:
        ValueError: no CTC head, no words or slot, or more tokens than the clip has frames for.
    """
    head = model.frame_head or model.head("ctc")  # which says that there is none
    words = text.split()
    clip = read_samples(audio, model.sample_rate)
    options = DecodingOptions(confidence=confidence)
    found, ends, shift = _aligned(model, head, clip, words, options.confidence, slots)
    spans, first, time, spaces = [], 0, 0, _space_ids(head.tokenizer)
    for word, end in zip(words, ends):
        while first < end and found.tokens[first] in spaces:
            first += 1
        start = found.frames[first] if first < end else time
        time = found.frames[end - 1] + found.durations[end - 1] if first < end else time
        sure = found.confidences[first:end] if found.confidences else None
        span = Span(word, start, time)
        if sure:
            span.confidence = options.confidence.aggregate(sure)
        spans.append(span)
        first = end
    return in_seconds(spans, model.config.frame_seconds, shift, len(clip) / model.sample_rate)


@torch.no_grad()
def align_tokens(model, clip: np.ndarray, text: str) -> tuple[list[int], list[Span], list[int]]:
    """The tokens of a known text, when each was said, in seconds, and the number of tokens after
    each word. ValueError: as `align`.

    As NeMo counts for the words of Canary: a word begins with its first token, be it only the
    space, and marks have no extent: they lie at the end of the token before.
    """
    head = model.frame_head or model.head("ctc")
    found, ends, shift = _aligned(model, head, clip, text.split(), None, {})
    lasts = [frame + n for frame, n in zip(found.frames, found.durations)]
    spans = spans_of_tokens(found, head.tokenizer, found.frames, lasts)
    firsts = {0, *ends}
    for i, span in enumerate(spans):
        if span.text in _MARKS:
            span.start = span.end = span.start if i in firsts else spans[i - 1].end
    times = model.config.frame_seconds, shift, len(clip) / model.sample_rate
    return found.tokens, in_seconds(spans, *times), ends


def _aligned(
    model, head, clip: np.ndarray, words: list[str], confidence: Confidence | None, slots: dict
):
    """(hypothesis with the frames of each token, tokens after each word, seconds of silence in
    front)."""
    if not words:
        raise ValueError("the text to align is empty")
    samples, lengths, (shift,) = collate([clip], model.min_duration_s, model.sample_rate)
    device = model.device
    for_encoder, _ = head.parted(head.asked(slots, True))
    with evaluating(model):
        features = model.featurize(samples.to(device), lengths.to(device))
        encoded, lengths = model.encode(*features, **for_encoder)
        log_probs = head.log_probs(encoded, lengths)
    tokens, ends = _tokens_of_words(head.tokenizer, words)
    (found,) = ctc_align(log_probs, lengths, [tokens], confidence)
    if len(found.frames) < len(tokens):
        raise ValueError(
            f"the text has {len(tokens)} tokens, too many for the {int(lengths)} frames of a "
            f"clip of {len(clip) / model.sample_rate:.2f} s"
        )
    return found, ends, shift


def _tokens_of_words(tokenizer, words: list[str]) -> tuple[list[int], list[int]]:
    """Tokens of words said one after the other, and the number of tokens after each word."""
    tokens, ends = [], []
    for word in words:
        tokens += tokenizer.encode_word(word, is_first=not tokens)
        ends.append(len(tokens))
    return tokens, ends


def _space_ids(tokenizer) -> list[int]:
    return [i for i, piece in enumerate(tokenizer.pieces) if piece in (" ", "▁")]
