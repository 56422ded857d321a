"""Words, segments and subtitles of Japanese, Chinese and Thai: scripts without spaces."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.train_tokenizer import train_tokenizer
from fastconformer import Span, Transcript
from fastconformer.formats.subtitles import cues
from fastconformer.formats.transcripts import to_ctm
from fastconformer.recordings.timestamps import joined, segment_spans, word_spans
from fastconformer.text.scripts import units, width
from fastconformer.text.tokenizer import SentencePieceTokenizer

JAPANESE = [
    "今日は朝から雨が降っています。",
    "電車が少し遅れているようです。",
    "駅の前で友達を待っていました。",
    "それから二人で図書館へ行きました。",
    "夕方には空が晴れるでしょう。",
]
THAI = ["สวัสดีครับ วันนี้อากาศดีมาก", "ผมไปตลาดกับเพื่อนเมื่อวานนี้", "เขากินข้าวแล้ว ไปโรงเรียน"]
MIXED = ["今日はNVIDIAの新しいGPUを2台買いました。", "価格は100ドル、重さは3kgです。"]


def spoken(lines, frames=4):
    """(tokenizer, token spans, their pieces) of these lines said one after another."""
    size = len(set("".join(lines))) + 12
    tokenizer = SentencePieceTokenizer(train_tokenizer(lines * 3, size, normalization="nfkc"))
    ids = [i for line in lines for i in tokenizer.encode(line)]
    names = tokenizer.ids_to_pieces(ids)
    spans = [
        Span(tokenizer.join([name]), k * frames, (k + 1) * frames) for k, name in enumerate(names)
    ]
    return tokenizer, spans, names


@pytest.mark.parametrize("lines", [JAPANESE, THAI, MIXED])
def test_a_word_is_what_a_token_writes(lines):
    tokenizer, tokens, pieces = spoken(lines)
    words = word_spans(tokens, pieces, tokenizer)
    assert joined(words).replace(" ", "") == "".join("".join(lines).split())
    assert max(len(word.text) for word in words) <= 12 and len(words) > len(pieces) / 3
    assert all(a.end <= b.start for a, b in pairwise(words))
    assert all(word.text[0] not in "。、ัิีึื็่้" for word in words)  # marks stay with letters
    if lines is MIXED:
        assert {"NVIDIA", "GPU", "100"} <= {word.text.rstrip("、") for word in words}


def test_sentences_are_segments():
    tokenizer, tokens, pieces = spoken(JAPANESE)
    words = word_spans(tokens, pieces, tokenizer)
    segments = segment_spans(words, (".", "?", "!"))
    assert ["".join(segment.text.split()) for segment in segments] == JAPANESE


def transcript(words, segments=None):
    text = joined(words)
    segments = segments or [Span(text, words[0].start, words[-1].end)]
    return Transcript(text, [], [], None, words, segments, 0.0, "ctc", words[-1].end)


def covered(found, words):
    """Every second of speech has a subtitle."""
    for word in words:
        middle = (word.start + word.end) / 2
        assert any(cue.start <= middle <= cue.end for cue in found), word


@pytest.mark.parametrize("lines", [JAPANESE, THAI, MIXED])
def test_subtitles_have_the_tokens_times(lines):
    tokenizer, tokens, pieces = spoken(lines)
    words = word_spans(tokens, pieces, tokenizer)
    words = [Span(w.text, w.start * 0.08, w.end * 0.08, None, w.glued) for w in words]
    found = cues(transcript(words))
    covered(found, words)
    assert "".join("".join(cue.text.split()) for cue in found) == "".join("".join(lines).split())
    for cue in found:
        assert len(cue.text.split("\n")) <= 2 and cue.end - cue.start <= 7.001
        assert max(width(line) for line in cue.text.split("\n")) <= 42
        assert all(line[0] not in "。、" for line in cue.text.split("\n"))
    if lines is THAI:  # the spaces between phrases are kept
        assert any(" " in cue.text for cue in found)


def test_one_word_without_inner_times():
    """As a head gives it that knows of no tokens in it: cut evenly, behind the sentences."""
    text = "".join(JAPANESE)
    end = 0.32 * len(text)
    words = [Span(text, 0.0, end)]
    found = cues(transcript(words))
    assert [cue.text for cue in found] == JAPANESE
    assert [cue.start for cue in found] == pytest.approx([0, 4.8, 9.6, 14.4, 19.84])
    assert found[-1].end == pytest.approx(end)


def test_lines_of_full_width_characters():
    text = "あ" * 60
    found = cues(transcript([Span(text, 0.0, 3.0)]))
    assert found[0].text.split("\n") == ["あ" * 21, "あ" * 21]


def test_lines_of_full_width_words():
    """Korean has spaces, and its characters are as wide as Chinese ones."""
    texts = ["안녕하세요", "오늘은", "날씨가", "아주", "좋습니다"] * 6
    words = [Span(text, 0.3 * k, 0.3 * k + 0.3) for k, text in enumerate(texts)]
    found = cues(transcript(words))
    rows = [row for cue in found for row in cue.text.split("\n")]
    assert " ".join(rows).split() == texts
    assert max(map(width, rows)) <= 42 and all(cue.text.count("\n") < 2 for cue in found)


def test_ctm_has_a_line_a_word():
    tokenizer, tokens, pieces = spoken(JAPANESE)
    words = word_spans(tokens, pieces, tokenizer)
    assert to_ctm(transcript(words), "a").count("\n") == len(words) > 30


@settings(max_examples=200, deadline=None)
@given(st.text("今日「」。、abกำเ่้ー 1", max_size=40))
def test_units_are_the_text(text):
    parts = list(units(text))
    assert "".join(parts) == text
    assert all(part[0] not in "」。、่้ー" for part in parts[1:])
