"""The transcribe command on golden audio, and properties of its writers."""

import io
import json
import os
import re
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import fastconformer
from fastconformer import Span, Transcript
from fastconformer.formats.inputs import find_clips
from fastconformer.formats.manifest import read_manifest
from fastconformer.formats.subtitles import cues, to_srt, to_vtt
from fastconformer.formats.transcripts import to_ctm, to_json, to_text
from fastconformer.jobs.rounds import transcribe_clips
from fastconformer.recordings.samples import read_samples
from fastconformer.transcribe import main

CASE = "hybrid_tdt_ctc_bpe"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def nemo():
    return golden(CASE) / "model.nemo"


@pytest.fixture(scope="module")
def expected():
    return json.loads((golden(CASE) / "expected.json").read_text())


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """The golden utterances as files: exact, for every sample is a multiple of 1/32768."""
    folder = tmp_path_factory.mktemp("recordings")
    tensors = load_file(golden(CASE) / "golden.safetensors")
    paths = []
    for k, (samples, length) in enumerate(zip(tensors["audio"], tensors["audio_len"], strict=True)):
        paths.append(folder / f"{k}.wav")
        soundfile.write(paths[-1], samples[:length], 16000, subtype="PCM_16")
    return paths


def transcript_of(words, segments=None, duration=None):
    """A transcript around words given as (text, start, end)."""
    spans = [Span(*word) for word in words]
    duration = duration or (spans[-1].end if spans else 1.0)
    text = " ".join(span.text for span in spans)
    if segments is None:
        segments = [Span(text, spans[0].start, spans[-1].end)] if spans else []
    return Transcript(text, [], [], None, spans, segments, -1.0, "ctc", duration)


@st.composite
def timed_transcripts(draw):
    texts = draw(st.lists(st.text("abc.<&>-", min_size=1, max_size=50), max_size=60))
    time, words = 0.0, []
    for text in texts:
        time += draw(st.sampled_from([0.0, 0.0, 0.04, 0.3, 1.6, 4000.0]))
        end = time + draw(st.sampled_from([0.0, 0.08, 0.32, 3.0, 9.0]))
        words.append((text, time, end))
        time = end
    breaks = draw(st.sets(st.integers(1, max(len(words), 1)))) | {len(words)}
    segments, first = [], 0
    for last in sorted(breaks):
        if first < last <= len(words):
            part = words[first:last]
            segments.append(Span(" ".join(w[0] for w in part), part[0][1], part[-1][2]))
            first = last
    return transcript_of(words, segments, duration=time + 0.01)


@settings(max_examples=200, deadline=None)
@given(timed_transcripts())
def test_cues_are_readable_and_complete(transcript):
    found = cues(transcript)
    assert " ".join(cue.text for cue in found).split() == transcript.text.split()
    for cue in found:
        lines = cue.text.split("\n")
        assert len(lines) <= 2
        assert all(len(line) <= 42 or " " not in line for line in lines)
        assert 0.001 < cue.end - cue.start <= 7.001
    for before, cue in pairwise(found):
        assert before.end <= cue.start
        # read in peace, or until the next one; nothing is held for longer than a cue may last
        readable = before.start + (len(before.text) - 1) / 17
        assert before.end >= min(readable, cue.start, before.start + 7) - 1e-6
    firsts = {segment.text.split()[0] for segment in transcript.segments}
    assert not found or {cue.text.split()[0] for cue in found} >= firsts


@settings(max_examples=100, deadline=None)
@given(timed_transcripts())
def test_subtitle_times_grow(transcript):
    for text, mark in ((to_srt(transcript), ","), (to_vtt(transcript), ".")):
        pattern = (
            rf"^(\d\d+):(\d\d):(\d\d)\{mark}(\d\d\d) --> (\d\d+):(\d\d):(\d\d)\{mark}(\d\d\d)$"
        )
        times = [list(map(int, m)) for m in re.findall(pattern, text, re.MULTILINE)]
        assert len(times) == len(cues(transcript))
        flat = [
            ((h * 60 + m) * 60 + s) * 1000 + ms for t in times for h, m, s, ms in (t[:4], t[4:])
        ]
        assert flat == sorted(flat)
        assert all(start < end for start, end in zip(flat[::2], flat[1::2], strict=True))


def test_whole_samples_are_what_floats_are(nemo, recordings):
    model = fastconformer.load_model(nemo)
    whole, other = (soundfile.read(path, dtype="int16")[0] for path in recordings[:2])
    floats = [samples.astype(np.float32) / 32768 for samples in (whole, other)]
    expected = model.transcribe(floats)
    for inputs in ([whole, other], [whole, floats[1]]):
        found = model.transcribe(inputs)
        assert [t.tokens for t in found] == [t.tokens for t in expected]
        assert [t.score for t in found] == pytest.approx([t.score for t in expected])


def test_arrays_as_they_come(nemo, recordings):
    """Read-only, backwards, of the other byte order, of half precision: like a plain copy."""
    model = fastconformer.load_model(nemo)
    whole = soundfile.read(recordings[1], dtype="int16")[0]
    floats = whole.astype(np.float32) / 32768
    frozen = np.frombuffer(whole.tobytes(), np.int16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = [frozen, whole.astype(">i2"), floats[::-1].copy()[::-1], whole[::-1].copy()[::-1]]
        same += [torch.from_numpy(floats), torch.from_numpy(whole), floats.astype(np.float64)]
        found = model.transcribe([floats, *same])
        assert [t.tokens for t in found] == [found[0].tokens] * len(found)
        half = torch.from_numpy(floats).bfloat16()
        found = model.transcribe([half, half.float()])
        assert found[0].tokens == found[1].tokens


@pytest.mark.parametrize("case", [CASE, "birwkv7_encoder"])
def test_clips_shorter_than_a_frame(case, recordings):
    """Without padding they have no frame and no text, alone and beside others."""
    model = fastconformer.load_model(golden(case) / "model.nemo")
    clip = soundfile.read(recordings[1], dtype="float32")[0]
    for head in model.heads:
        for long in ("full", "chunks"):
            options = {"head": head, "long": long, "min_duration_s": 0.0, "timestamps": True}
            found = model.transcribe([clip[:1], clip, clip[:159]], **options)
            assert [t.text for t in found[::2]] == ["", ""] and found[0].words == []
            assert found[1].tokens == model.transcribe(clip, **options)[0].tokens
            assert model.transcribe(clip[:1], **options)[0].text == ""


@pytest.mark.parametrize(
    ("audio", "options", "words"),
    [
        (np.zeros(0, np.float32), {}, "expected (samples,), not empty"),
        (np.zeros((2, 16000), np.float32), {}, "expected (samples,)"),
        (None, {}, "an item is a NoneType, expected a path, bytes, a binary file, samples"),
        ([np.zeros(9), 16000], {}, "an item is a list, expected a path"),
        (np.array(None), {}, "an audio array has shape ()"),
        ((np.zeros(9), "8000"), {}, "the rate beside samples is '8000', expected a number of Hz"),
        (np.zeros(9), {"boost": [5]}, "a phrase to boost is 5, expected words"),
        ({"array": [0.0], "sampling_rate": 8}, {}, "give (item['array'], item['sampling_rate'])"),
        (np.zeros(16000, np.int32), {}, "int32, expected float or int16"),
        (np.full(16000, np.nan, np.float32), {}, "NaN or infinite"),
        (np.full(16000, 1e300), {}, "NaN or infinite"),
        (np.zeros(16000, np.float32), {"batch_size": 0}, "batch_size is 0"),
        (np.zeros(16000, np.float32), {"min_duration_s": np.nan}, "min_duration_s is nan"),
    ],
)
def test_what_transcribe_refuses(nemo, audio, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        fastconformer.load_model(nemo).transcribe([audio], **options)


def test_a_dict_is_one_item(nemo):
    with pytest.raises(ValueError, match="a dict of datasets"):
        fastconformer.load_model(nemo).transcribe({"array": [0.0], "sampling_rate": 8})


def test_one_channel_of_two_dimensions():
    """As torchaudio.load and soundfile.read(always_2d=True) give it."""
    clip = np.arange(1, 9, dtype=np.float32) / 9
    for samples in (clip[None], clip[:, None], torch.tensor(clip)[None]):
        np.testing.assert_array_equal(read_samples((samples, 16000), 16000), clip)


def test_files_that_give_no_bytes(recordings):
    """One that was read before is told apart from an empty one."""
    with open(recordings[0], "rb") as file:
        assert read_samples(file, 16000).size
        with pytest.raises(ValueError, match=r"was read to its end before; call its seek\(0\)"):
            read_samples(file, 16000)
    with pytest.raises(ValueError, match="the audio is empty"):
        read_samples(io.BytesIO(), 16000)
    with soundfile.SoundFile(recordings[0]) as file, pytest.raises(ValueError, match="a ndarray"):
        read_samples(file, 16000)


def test_subtitle_limits_are_kept():
    words = [
        (text, k * 0.5, k * 0.5 + 0.4) for k, text in enumerate(["aaaa", "bbbb", "cccc", "dddd"])
    ]
    transcript = transcript_of(words, duration=60.0)
    texts = [cue.text for cue in cues(transcript, line_characters=9, lines=1)]
    assert texts == ["aaaa bbbb", "cccc dddd"]
    assert [cue.text for cue in cues(transcript, 4, 2)] == ["aaaa\nbbbb", "cccc\ndddd"]
    slow, fast = (cues(transcript, 99, 1, speed)[0].end for speed in (5.0, 100.0))
    assert slow == pytest.approx(20 / 5) and fast == pytest.approx(1.9)
    with pytest.raises(ValueError, match="expected at least 1"):
        cues(transcript, lines=0)


def test_subtitle_flags(nemo, recordings, capsys):
    command = [str(recordings[0]), "--model", str(nemo), "--format", "vtt"]
    assert main([*command, "--line-characters", "1", "--lines", "1"]) == 0
    blocks = capsys.readouterr().out.split("\n\n")[1:]
    assert blocks and all(len(block.split("\n")[1].split()) == 1 for block in blocks)
    assert main([*command, "--lines", "0"]) == 2
    assert "--lines" in capsys.readouterr().err
    for flags in (["--lines", "1"], ["--highlight-words"]):
        assert main([*command[:-2], *flags]) == 2
        assert "--format srt or vtt" in capsys.readouterr().err


def test_srt_text():
    words = [("hello", 0.5, 0.9), ("world.", 1.0, 1.4), ("again", 3661.25, 3662.0)]
    segments = [Span("hello world.", 0.5, 1.4), Span("again", 3661.25, 3662.0)]
    assert to_srt(transcript_of(words, segments)) == (
        "1\n00:00:00,500 --> 00:00:01,400\nhello world.\n\n"
        "2\n01:01:01,250 --> 01:01:02,000\nagain\n"
    )


def test_vtt_text_escapes_markup():
    assert to_vtt(transcript_of([("a<b>&", 0.0, 0.6)])) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:00.600\na&lt;b&gt;&amp;\n"
    )


def test_empty_text():
    nothing = transcript_of([])
    assert to_srt(nothing) == "" and to_vtt(nothing) == "WEBVTT\n" and to_ctm(nothing, "a") == ""
    assert to_text(nothing) == "\n"


def test_ctm_text():
    transcript = transcript_of([("one", 0.08, 0.4), ("two", 0.4, 0.4)])
    assert to_ctm(transcript, "my talk", offset_s=10.0) == (
        "my_talk 1 10.080 0.320 one\nmy_talk 1 10.400 0.000 two\n"
    )


def test_text_with_times():
    transcript = transcript_of([("one", 0.08, 0.4), ("two", 0.4, 0.56)])
    assert to_text(transcript) == "one two\n0.08\t0.40\tone\n0.40\t0.56\ttwo\n"
    assert to_text(transcript, "a.wav") == "a.wav\tone two\n\t0.08\t0.40\tone\n\t0.40\t0.56\ttwo\n"


def test_writers_need_times():
    transcript = Transcript("a", [1], [0], None, None, None, float("-inf"), "ctc", 1.0)
    for write in (to_srt, to_vtt, lambda t: to_ctm(t, "a")):
        with pytest.raises(ValueError, match="timestamps=True"):
            write(transcript)
    assert to_json(transcript)["score"] is None  # JSON has no infinity


@pytest.mark.parametrize("head, key", [(None, "rnnt"), ("ctc", "ctc")])
def test_texts_equal_nemo(nemo, expected, recordings, capsys, head, key):
    arguments = [*map(str, recordings), "--model", str(nemo), *(["--head", head] if head else [])]
    assert main(arguments) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == list(map(str, recordings))
    assert [text for _, text in lines] == expected["transcribe_plain_batched"][key]


def test_json_and_ctm_times_equal_nemo(nemo, expected, recordings, tmp_path, capsys):
    output = tmp_path / "out.json"
    assert main([str(recordings[0].parent), "--model", str(nemo), "--timestamps",
                 "--format", "json", "-o", str(output)]) == 0  # fmt: skip
    assert capsys.readouterr().out == ""
    assert main([*map(str, recordings), "--model", str(nemo), "--format", "ctm"]) == 0
    ctm = [line.split(" ") for line in capsys.readouterr().out.splitlines()]
    objects = json.loads(output.read_text())
    assert [Path(o["audio"]).name for o in objects] == ["0.wav", "1.wav", "2.wav"]
    for name, item, nemo_item in zip("012", objects, expected["transcribe_timestamps_bs1"]["rnnt"],
                                     strict=True):  # fmt: skip
        for key, of_nemo in (("words", "word"), ("segments", "segment")):
            assert [s["text"] for s in item[key]] == [s[of_nemo] for s in nemo_item[of_nemo]]
            for edge in ("start", "end"):
                got = [s[edge] for s in item[key]]
                assert got == pytest.approx([s[edge] for s in nemo_item[of_nemo]], abs=1e-6)
        mine = [row for row in ctm if row[0] == name]
        assert [row[4] for row in mine] == [w["text"] for w in item["words"]]
        starts, lengths = ([float(row[k]) for row in mine] for k in (2, 3))
        assert starts == pytest.approx([w["start"] for w in item["words"]], abs=6e-4)
        ends = [s + n for s, n in zip(starts, lengths, strict=True)]
        assert ends == pytest.approx([w["end"] for w in item["words"]], abs=1.1e-3)


def test_one_file_gives_its_text_alone(nemo, expected, recordings, capsys):
    assert main([str(recordings[1]), "--model", str(nemo)]) == 0
    assert capsys.readouterr().out == expected["transcribe_plain_batched"]["rnnt"][1] + "\n"


def test_bad_files_are_told_and_the_rest_goes_on(nemo, expected, recordings, tmp_path, capsys):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "noise.flac").write_bytes(b"this is not audio" * 100)
    (tmp_path / "folder").mkdir()
    (tmp_path / "lines.jsonl").write_text(
        '{"audio_filepath": ' + json.dumps(str(recordings[2])) + "}\n"
        '{"audio_filepath": "gone.wav"}\n'
        '{"audio_filepath": "x.wav", "duration": -1}\nnot json\n[1]\n{"audio_filepath": 3}\n'
    )
    bad = ["empty.wav", "noise.flac", "missing.wav", "folder"]
    names = [str(tmp_path / name) for name in [*bad, "lines.jsonl"]]
    assert main([*names, str(recordings[1]), "--model", str(nemo)]) == 1
    out, err = capsys.readouterr()
    texts = expected["transcribe_plain_batched"]["rnnt"]
    assert [line.split("\t")[1] for line in out.splitlines()] == [texts[2], texts[1]]
    errors = err.splitlines()
    assert len(errors) == 4 + 5 + 1 and errors[-1].endswith("9 of 11 inputs failed")
    for name in [
        *bad,
        "gone.wav",
        "lines.jsonl:2",
        "lines.jsonl:3",
        "lines.jsonl:4",
        "lines.jsonl:5",
        "lines.jsonl:6",
    ]:
        assert sum(name in line for line in errors) == 1, name


def test_sections_of_a_manifest(nemo, recordings, tmp_path, capsys):
    """A section is transcribed as a file of its own would be; its CTM counts from the recording."""
    whole, rate = soundfile.read(recordings[0], dtype="int16")
    soundfile.write(tmp_path / "part.wav", whole[8000:20000], rate)
    entry = {"audio_filepath": str(recordings[0]), "offset": 0.5, "duration": 0.75}
    (tmp_path / "sections.jsonl").write_text(json.dumps(entry) + "\n")
    clips, problems = read_manifest(tmp_path / "sections.jsonl")
    model = fastconformer.load_model(nemo)
    (_, section, _), = transcribe_clips(model, clips, timestamps=True)  # fmt: skip
    assert (
        problems == [] and section == model.transcribe([tmp_path / "part.wav"], timestamps=True)[0]
    )
    assert main([str(tmp_path / "sections.jsonl"), "--model", str(nemo), "--format", "ctm"]) == 0
    first = capsys.readouterr().out.split()
    assert float(first[2]) == pytest.approx(0.5 + section.words[0].start, abs=6e-4)


def test_rounds_and_batches_change_nothing(nemo, recordings, monkeypatch):
    """Order and results hold when memory allows little at a time, and beside an unreadable clip."""
    model = fastconformer.load_model(nemo)
    clips = find_clips([str(recordings[k]) for k in (2, 0, 1, 0)] + ["gone.wav"]).clips
    usual = [
        (clip, t and (t.text, t.token_frames), why)
        for clip, t, why in transcribe_clips(model, clips)
    ]
    monkeypatch.setattr("fastconformer.jobs.rounds.ROUND_SECONDS", 2.0)
    small = [
        (clip, t and (t.text, t.token_frames), why)
        for clip, t, why in transcribe_clips(model, clips)
    ]
    assert small == usual and [clip for clip, _, _ in usual] == clips
    assert usual[-1][1] is None and "gone.wav" in usual[-1][2]


def test_subtitles_of_several_files_go_to_a_folder(nemo, recordings, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    twin = tmp_path / "a" / "0.wav"
    twin.write_bytes(recordings[0].read_bytes())
    inputs = [str(recordings[0]), str(twin), "--model", str(nemo), "--format", "vtt"]
    assert main(inputs) == 2
    assert "-o FOLDER" in capsys.readouterr().err
    assert main([*inputs, "-o", str(tmp_path / "out")]) == 0
    files = sorted((tmp_path / "out").iterdir())
    assert [f.name for f in files] == ["0-2.vtt", "0.vtt"]
    assert files[0].read_text() == files[1].read_text()
    assert files[0].read_text().startswith("WEBVTT\n\n00:00:00.000 --> ")


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        ([], 2, "AUDIO"),
        (["a.wav"], 2, "--model"),
        (["a.wav", "--model", "M", "--format", "doc"], 2, "invalid choice"),
        (["a.wav", "--model", "M", "--batch-size", "0"], 2, "--batch-size is 0"),
        (["a.wav", "--model", "M", "--device", "abacus"], 2, "abacus"),
        (["a.wav", "--model", "M", "-o", "no/such/folder/a.txt"], 2, "no folder"),
        (["a.wav", "--model", "no-such-model.nemo"], 1, "no-such-model.nemo"),
        (["a.wav", "--model", "NEMO", "--head", "aed"], 2, "tdt, ctc"),
        (["a.wav", "--model", "NEMO", "--workers", "-1"], 2, "--workers is -1"),
    ],
)
def test_exit_statuses(arguments, status, words, nemo, capsys):
    arguments = [str(nemo) if a == "NEMO" else a for a in arguments]
    try:
        got = main(arguments)
    except SystemExit as error:  # argparse
        got = error.code
    err = capsys.readouterr().err
    assert got == status and words in err and "Traceback" not in err


def test_an_input_is_never_the_output(nemo, recordings, tmp_path, capsys):
    clip, manifest = tmp_path / "clip.wav", tmp_path / "lines.jsonl"
    clip.write_bytes(recordings[0].read_bytes())
    manifest.write_text('{"audio_filepath": "clip.wav"}\n')
    (tmp_path / "other.wav").symlink_to(clip)
    for source, output in ((tmp_path, "other.wav"), (manifest, "clip.wav"), (manifest, manifest)):
        arguments = [str(source), "--model", str(nemo), "-o", str(tmp_path / output)]
        assert main(arguments) == 2
        assert "is an input, which would be lost" in capsys.readouterr().err
    assert clip.read_bytes() == recordings[0].read_bytes()


def test_a_broken_model_is_one_line(tmp_path, recordings):
    """As a process, the way a user meets it."""
    (tmp_path / "model.nemo").write_bytes(b"no archive")
    command = [sys.executable, "-m", "fastconformer.transcribe", str(recordings[0])]
    done = subprocess.run(
        [*command, "--model", str(tmp_path / "model.nemo")],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "model.nemo" in done.stderr


def test_stereo_file_at_another_rate(nemo, recordings, capsys):
    """48 kHz, two channels, Vorbis: the duration is the file's."""
    samples, _ = soundfile.read(recordings[0])
    stereo = np.stack([samples, samples], 1)
    path = recordings[0].parent.parent / "stereo.ogg"
    buffer = io.BytesIO()
    soundfile.write(buffer, stereo, 48000, format="OGG", subtype="VORBIS")
    path.write_bytes(buffer.getvalue())
    assert main([str(path), "--model", str(nemo), "--format", "json"]) == 0
    (item,) = json.loads(capsys.readouterr().out)
    assert item["duration"] == pytest.approx(len(samples) / 48000, abs=1e-3)


@pytest.mark.parametrize("style", ["text", "json", "srt"])
def test_a_failed_run_leaves_the_older_output(nemo, tmp_path, capsys, style):
    output = tmp_path / "out"
    output.write_text("older")
    arguments = [str(tmp_path / "gone.wav"), "--model", str(nemo), "--format", style]
    assert main([*arguments, "-o", str(output)]) == 1
    assert output.read_text() == "older" and list(tmp_path.iterdir()) == [output]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("module", ["fastconformer.transcribe", "training.finetune"])
@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_how_threads_wait_is_set_before_torch_is_loaded(module, environment, expected):
    code = f"""if True:
        import os, sys
        class Finder:
            @staticmethod
            def find_spec(name, *_):
                if name == "torch":
                    print(os.environ.get("GOMP_SPINCOUNT"))
                    sys.exit()
        sys.meta_path.insert(0, Finder)
        import {module}
        """
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(expected)], done.stderr


def test_skipme_lines_are_left_out_and_counted(nemo, recordings, tmp_path, capsys):
    lines = [{"audio_filepath": str(recordings[0])}, {"audio_filepath": "gone", "_skipme": 1}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main([str(tmp_path / "m.jsonl"), "--model", str(nemo)]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == "transcribe: 1 lines say _skipme, left out\n"


@pytest.mark.parametrize("style", ["text", "json", "jsonl"])
def test_a_name_that_the_locale_lacks(nemo, recordings, tmp_path, style):
    """Into a pipe it is UTF-8, whatever the locale says; bytes that are no text are escaped."""
    names = ["b_पाठ.wav", os.fsdecode(b"c_\xff.wav"), "d.wav"]
    for name in names:
        (tmp_path / name).write_bytes(recordings[1].read_bytes())
    command = [sys.executable, "-m", "fastconformer.transcribe", str(tmp_path)]
    done = subprocess.run(
        [*command, "--model", str(nemo), "--format", style],
        cwd=REPOSITORY, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode("utf-8")
    assert "b_पाठ.wav" in out and "c_\\udcff.wav" in out
    if style == "json":
        assert [os.path.basename(item["audio"]) for item in json.loads(out)] == names
