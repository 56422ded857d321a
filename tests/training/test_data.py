import dataclasses
import json
import math

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from fastconformer.text.tokenizer import CharTokenizer
from training.data.batching import epoch_batches
from training.data.json_lines import append_line, read_lines
from training.data.limits import Limits, check_for_training
from training.data.sources import read_sets
from training.data.store import AudioStore, batches_ahead
from training.data.utterances import Fields, read_utterances
from training.recipe.data_sections import DataRecipe, SetRecipe

RATE = 16000
TOKENIZER = CharTokenizer(list("abcdefghijklmnopqrstuvwxyz '"))


@pytest.fixture
def folder(tmp_path):
    """Clips c0.wav .. c9.wav of 0.3 to 1.2 s, every sample different from clip to clip."""
    rng = np.random.default_rng(0)
    for i in range(10):
        samples = rng.integers(-3000, 3000, int(RATE * (0.3 + 0.1 * i))).astype(np.int16)
        soundfile.write(tmp_path / f"c{i}.wav", samples, RATE)
    return tmp_path


def entry(i=0, **changes):
    return {"audio_filepath": f"c{i}.wav", "duration": 0.3 + 0.1 * i, "text": "ab"} | changes


def write_manifest(folder, lines):
    path = folder / "manifest.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def usable(folder, lines, encoder_frames=None, **limits):
    found, bad = read_utterances(write_manifest(folder, lines))
    limits = Limits(**{"min_duration_s": 0.1, "max_duration_s": 20.0} | limits)
    kept, unusable = check_for_training(found, TOKENIZER, limits, encoder_frames)
    return kept, bad + unusable


def test_a_channel_by_line_or_by_source(folder):
    left, right = (np.full(RATE // 2, value, np.int16) for value in (1000, -500))
    soundfile.write(folder / "call.wav", np.stack((left, right), 1), RATE)
    call = {"audio_filepath": "call.wav", "duration": 0.5, "text": "ab"}
    path = write_manifest(folder, [call | {"channel": 0}, call | {"channel": [1]}, call])
    for default, expected in ((None, (1000, -500, 250)), (1, (1000, -500, -500))):
        found, _ = read_utterances(path, fields=Fields(default_channel=default))
        heard = [AudioStore(found, RATE, 1.0).read(i)[0] * 32768 for i in range(3)]
        assert heard == pytest.approx(expected)
    missing, _ = read_utterances(write_manifest(folder, [call | {"channel": 7}]))
    dropped = []
    assert AudioStore(missing, RATE, 1.0, on_dropped=dropped.append).read(0) is None
    assert "channels 0 to 1, not 7" in dropped[0].detail


def test_a_set_has_limits_and_fields_of_its_own(folder):
    lines = [entry(i, answer=f"answer {i}") for i in range(10)]
    limits = {"min_duration_s": 0.45, "max_duration_s": 0.75, "text_field": "answer"}
    one = SetRecipe(str(write_manifest(folder, lines)), **limits)
    store = read_sets({"held": one}, DataRecipe(), RATE)["held"]
    assert [u.text for u in store.utterances] == ["answer 2", "answer 3", "answer 4"]
    with pytest.raises(ValueError, match="no usable line .* 10 too_long; the first, line 1: 0.3 s"):
        read_sets({"held": SetRecipe(one.manifest, max_duration_s=0.2)}, DataRecipe(), RATE)


def test_a_cap_of_tokens(folder):
    kept, dropped = usable(folder, [entry(1, text="abc"), entry(2, text="abcd")], max_tokens=3)
    assert [u.text for u in kept] == ["abc"] and dropped[0].reason == "too_many_tokens"


def test_text_and_language_by_other_keys_and_in_files(folder):
    (folder / "said.txt").write_text("from a\n file")
    lines = [
        {"audio_filename": "c1.wav", "duration": 0.4, "answer": "ab", "target_lang": "en"},
        entry(2, text_filepath="said.txt", answer="b", target_lang="fr") | {"text": None},
        entry(3, answer="no language"),
    ]
    path = write_manifest(folder, lines)
    found, bad = read_utterances(path, "en", fields=Fields("answer", "target_lang", "en"))
    assert [(u.text, u.lang) for u in found] == [("ab", "en"), ("no language", "en")]
    assert [d.reason for d in bad] == ["other_language"]
    assert read_utterances(path)[0][0].text == "from a file"


@pytest.mark.parametrize("lang", [5, ["en"], {}, False, "\ud800"])
def test_a_language_that_is_no_word_is_named(folder, lang):
    path = write_manifest(folder, [entry(lang=lang), entry(1, lang="en"), entry(2, lang=None)])
    for wanted in (None, "en"):
        found, bad = read_utterances(path, wanted)
        assert [u.lang for u in found] == ["en", None]
        assert [(d.line, d.reason) for d in bad] == [(1, "bad_lang")]
    path = write_manifest(folder, [entry(target_lang=lang), entry(1, target_lang="en")])
    found, bad = read_utterances(path, "en", fields=Fields(lang="target_lang"))
    assert [u.lang for u in found] == ["en"] and bad[0].detail.startswith("target_lang is ")


def test_a_good_manifest(folder):
    absolute = str(folder / "c1.wav")
    lines = [entry(), "", entry(1, audio_filepath=absolute, offset=0.1, duration=0.2, lang="en")]
    kept, dropped = usable(folder, lines)
    assert not dropped
    assert [u.audio_path for u in kept] == [str(folder / "c0.wav"), absolute]
    assert [u.line for u in kept] == [1, 3]
    assert [u.offset_s for u in kept] == [None, 0.1]
    assert kept[0].tokens == (0, 1)


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ("{not json", "not_json", "not a JSON object"),
        ("[1, 2]", "not_json", "not a JSON object: [1, 2]"),
        ('"text"', "not_json", "not a JSON object"),
        ({"duration": 1.0, "text": "a"}, "no_audio_filepath", "None"),
        (entry(text=None), "no_text", "None"),
        ({"audio_filepath": "c0.wav", "duration": 1.0}, "no_text", "None"),
        (entry(text=" "), "empty_text", "empty"),
        (entry(audio_filepath="gone.wav"), "missing_audio", "gone.wav"),
        (entry(audio_filepath="."), "missing_audio", "no such file"),
        (entry(audio_filepath="x" * 5000), "missing_audio", "no such file"),
        (entry(audio_filepath="a\0b"), "missing_audio", "no such file"),
        (entry(duration=-1.0), "bad_duration", "-1.0"),
        (entry(duration=0), "bad_duration", "0"),
        (entry(duration=1e12), "bad_duration", "1000000000000"),
        (entry(duration=math.nan), "bad_duration", "nan"),
        (entry(duration=math.inf), "bad_duration", "inf"),
        (entry(duration="1"), "bad_duration", "'1'"),
        (entry(duration=True), "bad_duration", "True"),
        ({"audio_filepath": "c0.wav", "text": "a"}, "bad_duration", "None"),
        (entry(offset=-0.5), "bad_offset", "-0.5"),
        (entry(offset="x"), "bad_offset", "'x'"),
        (entry(duration=0.05), "too_short", "0.05"),
        (entry(duration=21.0), "too_long", "21.0"),
        (entry(text="naïve é"), "unknown_characters", "ï é"),
    ],
)
def test_a_bad_line_is_left_out_with_its_reason(folder, line, reason, detail):
    kept, dropped = usable(folder, [entry(1), line, entry(2)])
    assert [u.line for u in kept] == [1, 3]
    assert [(d.line, d.reason) for d in dropped] == [(2, reason)]
    assert detail in dropped[0].detail


def test_a_name_that_is_no_text_is_kept_in_records(folder):
    _, [bad] = read_utterances(
        write_manifest(folder, [entry(), entry(audio_filepath="\udcff.wav")])
    )
    append_line(folder / "dropped.jsonl", dataclasses.asdict(bad))
    assert read_lines(folder / "dropped.jsonl") == [dataclasses.asdict(bad)]
    assert "\udcff.wav" in bad.audio_filepath


def test_a_line_that_is_not_utf8(folder):
    path = folder / "manifest.jsonl"
    path.write_bytes(json.dumps(entry()).encode() + b"\n\xff\xfe{\n")
    found, bad = read_utterances(path)
    assert len(found) == 1 and [(d.line, d.reason) for d in bad] == [(2, "not_json")]


def test_ctc_needs_a_frame_for_each_token_and_between_equal_ones(folder):
    def frames(seconds):
        return 4

    lines = [entry(text="abcd"), entry(text="abcde"), entry(text="aab"), entry(text="aaab")]
    kept, dropped = usable(folder, lines, encoder_frames=frames, frame_per_token=True)
    assert [u.text for u in kept] == ["abcd", "aab"]
    assert [(d.line, d.reason) for d in dropped] == [(2, "too_many_tokens"), (4, "too_many_tokens")]
    assert len(usable(folder, lines)[0]) == 4


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        read_utterances(tmp_path / "gone.jsonl")


@settings(max_examples=60, deadline=None)
@given(
    durations=st.lists(st.floats(0.1, 30.0), max_size=60),
    batch_size=st.none() | st.integers(1, 9),
    batch_duration_s=st.none() | st.floats(1.0, 60.0),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_batches_hold_every_clip_once_within_the_limits(
    durations, batch_size, batch_duration_s, seed, epoch
):
    arguments = (durations, batch_size, batch_duration_s, seed, epoch)
    batches = epoch_batches(*arguments)
    assert sorted(i for batch in batches for i in batch) == list(range(len(durations)))
    assert batches == epoch_batches(*arguments)
    for batch in batches:
        longest = max(durations[i] for i in batch)
        assert batch_size is None or len(batch) <= batch_size
        if batch_duration_s is not None and len(batch) > 1:
            assert longest * len(batch) <= batch_duration_s + 1e-9


def test_epochs_differ_and_batches_are_of_similar_length():
    durations = np.random.default_rng(1).uniform(0.5, 15, 400).tolist()
    first, second = (epoch_batches(durations, 8, None, seed=1, epoch=e) for e in (0, 1))
    assert first != second
    assert {frozenset(b) for b in first} != {frozenset(b) for b in second}
    for batches in (first, second):
        padded = sum(len(b) * max(durations[i] for i in b) for b in batches)
        assert padded < 1.2 * sum(durations)
    # the most expensive batch comes first, so that a lack of memory shows at once
    costs = [len(b) * max(durations[i] for i in b) for b in first]
    assert costs[0] == max(costs)


def content(batch):
    return [u.name for u in batch.utterances], batch.audio.numpy().tobytes()


def test_workers_change_nothing(folder):
    kept, _ = usable(folder, [entry(i) for i in range(10)])
    order = epoch_batches([u.duration_s for u in kept], 3, None, seed=0, epoch=0)
    runs = []
    for workers in (0, 1, 4):
        store = AudioStore(kept, RATE, cache_gb=0.0 if workers == 1 else 1.0)
        runs.append([content(b) for b in batches_ahead(store, order, workers)])
    assert runs[0] == runs[1] == runs[2]
    # from the middle of an epoch on
    rest = [content(b) for b in batches_ahead(store, order[2:], 2)]
    assert rest == runs[0][2:]


def test_padding(folder):
    kept, _ = usable(folder, [entry(0, text="abc"), entry(5)])
    batch = AudioStore(kept, RATE, cache_gb=1.0, pad_to_s=0.5).batch([0, 1])
    assert batch.audio.shape == (2, int(RATE * 0.8))
    assert batch.audio_lengths.tolist() == [8000, 12800]  # the short one is padded to 0.5 s
    samples, _ = soundfile.read(folder / "c0.wav", dtype="float32")
    left = (8000 - len(samples)) // 2
    assert np.array_equal(batch.audio[0, left : left + len(samples)], samples)
    assert not batch.audio[0, :left].any() and not batch.audio[0, left + len(samples) :].any()
    assert batch.targets.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch.target_lengths.tolist() == [3, 2]


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_an_unreadable_clip_is_named_once_and_left_out(folder, cache_gb):
    kept, _ = usable(folder, [entry(i) for i in range(4)])
    (folder / "c1.wav").write_bytes(b"RIFF, but no more")
    soundfile.write(folder / "c2.wav", np.zeros(20 * RATE, np.int16), RATE)
    dropped = []
    store = AudioStore(kept, RATE, cache_gb, on_dropped=dropped.append)
    for _ in range(2):
        batch = store.batch([0, 1, 2, 3])
        assert [u.line for u in batch.utterances] == [1, 4]
        assert store.batch([1, 2]) is None
    assert [d.line for d in dropped] == [2, 3]
    assert {d.reason for d in dropped} == {"unreadable_audio"}
    assert "c1.wav" in dropped[0].detail
    assert "holds 20.00 s, the manifest says 0.5 s" in dropped[1].detail
    assert store.n_unusable == 2


def test_a_section_and_another_rate(folder):
    samples = np.sin(np.arange(8000) * 0.05)
    soundfile.write(folder / "c0.wav", samples, 8000)  # 1 s at 8 kHz
    kept, _ = usable(folder, [entry(offset=0.25, duration=0.5), entry(duration=1.0)])
    store = AudioStore(kept, RATE, cache_gb=1.0)
    assert [len(store.read(i)) for i in (0, 1)] == [8000, 16000]


def test_only_lines_of_one_language(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16000, dtype=np.float32), 16000)
    lines = [{"audio_filepath": "a.wav", "duration": 1.0, "text": t} for t in ("one", "un", "any")]
    lines[0]["lang"], lines[1]["lang"] = "en", "fr"
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept, dropped = read_utterances(manifest, "en")
    assert [u.text for u in kept] == ["one", "any"]
    assert [(d.line, d.reason) for d in dropped] == [(2, "other_language")]
    assert len(read_utterances(manifest)[0]) == 3
