"""Recordings in pieces cut in pauses, for heads that cannot read windows as one sequence; and
Fun-ASR-Nano through the functions that every model goes through."""

import itertools

import numpy as np
import pytest
import soundfile
import torch
from conftest import golden, load_case
from hypothesis import given, settings
from hypothesis import strategies as st

from fastconformer import load_model
from fastconformer.recordings.cuts import cut_in_pauses, join_texts
from fastconformer.recordings.memory import memory_estimate

CASE = "fun_asr_nano_tiny"


@pytest.fixture(scope="module")
def model():
    return load_model(golden(CASE))


@pytest.fixture(scope="module")
def clips():
    return [golden(CASE) / "audio" / f"clip_{i}.wav" for i in range(4)]


@pytest.fixture(scope="module")
def expected():
    return load_case(CASE).expected


@settings(max_examples=50, deadline=None)
@given(
    n_samples=st.integers(1, 20000),
    longest_s=st.floats(0.5, 5.0),
    seed=st.integers(0, 1000),
    quantised=st.booleans(),
)
def test_pieces_follow_one_another_and_are_short_enough(n_samples, longest_s, seed, quantised):
    rate, generator = 1000, np.random.default_rng(seed)
    samples = generator.normal(size=n_samples).astype(np.float32) * (generator.random() > 0.2)
    if quantised:
        samples = (samples * 3000).astype(np.int16)
    pieces = cut_in_pauses(samples, rate, longest_s)
    assert pieces[0][0] == 0 and pieces[-1][1] == n_samples
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
    assert all(0 < end - first <= longest_s * rate for first, end in pieces)


def test_a_border_lies_where_it_is_quiet():
    rate = 1000
    samples = np.random.default_rng(0).normal(size=10 * rate).astype(np.float32)
    samples[7200:7600] = 0.001
    (first, second) = cut_in_pauses(samples, rate, 9.0)
    assert first[0] == 0 and 7200 < first[1] < 7600 and second == (first[1], 10 * rate)


def test_texts_are_joined_as_scripts_are_written():
    assert join_texts(["hello.", " you", "", "there"]) == "hello. you there"
    assert join_texts(["今天", "天气", "ok then"]) == "今天天气ok then"
    assert join_texts(["", ""]) == ""


def test_a_recording_in_pieces_is_its_pieces_joined(model, clips, expected):
    """Four clips with pauses between, longer than a piece may be."""
    sound = [soundfile.read(clip, dtype="float32")[0] for clip in clips[:3]]
    gap = np.zeros(8000, dtype=np.float32)
    whole = np.concatenate([part for clip in sound for part in (clip, gap)])
    (found,) = model.transcribe([whole], window_s=4.6, timestamps=True)
    pieces = cut_in_pauses(whole, 16000, 4.6)
    assert len(pieces) == 3
    alone = model.transcribe([whole[a:b] for a, b in pieces], timestamps=True)
    assert found.text == " ".join(part.text.strip() for part in alone)
    assert found.tokens == [token for part in alone for token in part.tokens]
    assert found.duration == len(whole) / 16000
    starts = [a / 16000 for a, _ in pieces]
    words = [
        (w.text, w.start + at) for part, at in zip(alone, starts, strict=True) for w in part.words
    ]
    for word, (text, start) in zip(found.words, words, strict=True):
        assert word.text == text and word.start == pytest.approx(start)
    assert [word.start for word in found.words] == sorted(word.start for word in found.words)
    (unbroken,) = model.transcribe([whole], long="full")
    assert unbroken.tokens != found.tokens  # in one pass it is another input


def test_texts_and_times_of_files(model, clips, expected):
    found = model.transcribe(clips, timestamps=True)
    for transcript, wanted in zip(found, expected["transcribe"][0]["results"], strict=True):
        assert transcript.text == wanted["text"] and transcript.head == "llm"
        assert " ".join(word.text for word in transcript.words) == transcript.text
        assert all(word.end > word.start for word in transcript.words)
        assert transcript.segments[-1].end <= transcript.duration + 0.06
    for transcript, wanted in zip(
        model.transcribe(clips, head="ctc"), expected["ctc"], strict=True
    ):
        assert transcript.text == wanted["text"]


def test_a_known_text_is_aligned(model, clips, expected):
    text = expected["ctc"][2]["text"]
    words = model.align(clips[2], text)
    assert [word.text for word in words] == text.split()
    tokens = expected["ctc"][2]["alignment_of_text"]
    assert words[0].start == pytest.approx(tokens[0]["start_frame"] * 0.06)
    assert words[-1].end == pytest.approx(tokens[-1]["end_frame"] * 0.06)


def test_prompts_by_their_names(model, clips, expected):
    for wanted in expected["transcribe"]:
        found = model.transcribe(clips, **wanted["options"], max_tokens=wanted["max_length"])
        assert [t.text for t in found] == [result["text"] for result in wanted["results"]]
    (short,) = model.transcribe(clips[0], max_tokens=2)
    assert len(short.tokens) == 2
    assert model.transcribe(clips[2], language="zh", itn="no")[0].text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "xx"}, "language is 'xx'"),
        ({"speed": 2}, "speed is nothing that this model's prompt takes"),
        ({"beam": 4}, "beam is 4, which head llm does not take"),
        ({"head": "tdt"}, "head is 'tdt', this model has llm, ctc"),
        ({"head": "ctc", "language": "en"}, "language is 'en'"),
        ({"hotwords": "<|im_end|>"}, "mark <|"),
        ({"itn": "perhaps"}, "itn is 'perhaps'"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_what_cannot_be_asked_for_is_told(model, clips, options, message):
    with pytest.raises(ValueError, match=message):
        model.transcribe(clips[0], **options)


def test_sound_of_no_length_and_of_a_moment(model):
    with pytest.raises(ValueError, match="not empty"):
        model.transcribe([np.zeros(0, dtype=np.float32)])
    (found,) = model.transcribe([np.zeros(10, dtype=np.float32)])
    assert found.duration == 10 / 16000


def test_neither_head_is_streamed(model):
    for head in model.heads:
        with pytest.raises(ValueError, match="reads a clip as a whole"):
            model.stream(head)


def test_memory_is_told_before(model):
    config = model.config
    clip, hour = (memory_estimate(config, seconds, torch.float32) for seconds in (10, 3600))
    assert 0 < clip < hour
    with pytest.raises(ValueError, match="seconds is -1"):
        memory_estimate(config, -1, torch.float32)
