"""Where transcripts go: formats, suffixes, folders, channels, names; and what is given as audio."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import SAMPLES, golden

import fastconformer
from fastconformer import Span, Transcript
from fastconformer.audio import containers
from fastconformer.formats.inputs import find_clips
from fastconformer.formats.subtitles import subtitles_of
from fastconformer.formats.transcripts import to_ctm, to_text
from fastconformer.transcribe import main

ROOT = Path(__file__).parents[2]
NEMO = golden("hybrid_tdt_ctc_bpe") / "model.nemo"


@pytest.fixture(scope="module")
def speech():
    return soundfile.read(SAMPLES / "jfk.flac", dtype="float32")[0][: 3 * 16000]


@pytest.fixture
def tree(tmp_path, speech):
    """in/a.wav, in/deep/a.wav and in/deep/b.flac."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for k, name in enumerate(("a.wav", "deep/a.wav", "deep/b.flac"), 1):
        soundfile.write(tmp_path / "in" / name, speech[: 8000 * k], 16000)
    return tmp_path / "in"


def run(*arguments):
    return main([*map(str, arguments), "--model", str(NEMO)])


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("suffix", "begins"),
    [("srt", "1\n00:00:"), ("vtt", "WEBVTT\n"), ("json", "[\n{"), ("jsonl", "{"), ("ctm", "a 1 ")],
)
def test_the_suffix_chooses_the_format(tree, tmp_path, suffix, begins):
    out = tmp_path / f"talk.{suffix}"
    assert run(tree / "a.wav", "-o", out) == 0
    assert out.read_text().startswith(begins)


def test_suffixes_of_formats_that_are_not_written(tree, tmp_path, capsys):
    out = tmp_path / "a.ASS"
    assert run(tree / "a.wav", "-o", out) == 2
    assert "a.ASS: .ASS is no format of ours (.txt, .json" in capsys.readouterr().err
    assert not out.exists()
    assert run(tree / "a.wav", "-o", out, "--format", "text") == 0 and out.exists()
    assert run(tree / "a.wav", "-o", tmp_path / "a.draft2") == 0


def test_recordings_may_stand_on_both_sides_of_options(tree, capsys):
    assert run(tree / "a.wav", "--format", "text", tree / "deep" / "b.flac") == 0
    assert capsys.readouterr().out.count("\n") == 2


def test_contradictions_are_bad_usage(tree, tmp_path, capsys):
    for options in (
        ["-o", tmp_path / "a.srt", "--format", "json"],
        ["-o", tmp_path / "a.srt", "--format", "srt,json"],
        ["--format", "srt,json"],
        ["--format", "jsonl", "-o", tmp_path / "in"],
        ["--format", "jsonl", "--beside"],
        ["--beside", "-o", tmp_path / "out"],
    ):
        assert run(tree / "a.wav", *options) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert files(tmp_path) == ["in/a.wav", "in/deep/a.wav", "in/deep/b.flac"]


def test_several_formats_keep_the_tree(tree, tmp_path):
    out = tmp_path / "out"
    assert run(tree, "--format", "text,json,jsonl,srt,vtt,ctm", "-o", out) == 0
    names, suffixes = ["a", "deep/a", "deep/b"], ("json", "srt", "txt", "jsonl", "vtt", "ctm")
    assert files(out) == sorted(f"{name}.{suffix}" for name in names for suffix in suffixes)
    (item,) = json.loads((out / "deep" / "b.json").read_text())
    (line,) = (out / "deep" / "b.jsonl").read_text().splitlines()
    assert json.loads(line) == item
    assert item["audio"] == str(tree / "deep" / "b.flac") and item["duration"] == 1.5
    assert (out / "deep" / "b.txt").read_text().strip().endswith(item["text"])


def test_files_beside_the_recordings(tree, capsys):
    assert run(tree, "--format", "srt,text", "--beside") == 0
    assert "deep/b.srt" in files(tree) and "a.txt" in files(tree)
    (tree / "deep" / "b.srt").unlink()
    before = (tree / "a.txt").read_text()
    assert run(tree, "--format", "text", "--beside") == 2  # it may be a reference
    assert "is there already" in capsys.readouterr().err
    assert (tree / "a.txt").read_text() == before


def spans(*words):
    return [Span(*word) for word in words]


def test_highlighted_words():
    words = spans(("one", 0.0, 0.4), ("<two>", 0.5, 0.9), ("one", 1.0, 1.4))
    segments = spans(("one <two> one", 0.0, 1.4))
    t = Transcript("one <two> one", [], [], None, words, segments, 0.0, "ctc", 3.0)
    srt = subtitles_of([("", t)], "srt", highlight=True)
    texts = [block.split("\n")[2] for block in srt.strip().split("\n\n")]
    assert texts == ["<u>one</u> <two> one", "one <u><two></u> one", "one <two> <u>one</u>"]
    vtt = subtitles_of([("", t)], "vtt", highlight=True)
    assert "one <u>&lt;two&gt;</u> one" in vtt
    starts = [block.split("\n")[1][:12] for block in srt.strip().split("\n\n")]
    assert starts == ["00:00:00,000", "00:00:00,500", "00:00:01,000"]


@pytest.fixture
def call(tmp_path, speech):
    """Two parties: one speaks in the first second and a half, the other then."""
    path, silence = tmp_path / "call.wav", np.zeros(24000, np.float32)
    left, right = (
        np.concatenate(p) for p in ((speech[:24000], silence), (silence, speech[24000:]))
    )
    soundfile.write(path, np.stack([left, right], 1), 16000, subtype="FLOAT")
    return path, left, right


def test_each_channel_has_a_transcript_in_every_format(call, tmp_path, capsys):
    path, left, right = call
    model = fastconformer.load_model(NEMO)
    texts = [t.text for t in model.transcribe([left, right])]
    assert run(path, "--channels", "each") == 0
    assert capsys.readouterr().out == "".join(
        f"{path} [{k}]\t{text}\n" for k, text in enumerate(texts)
    )
    assert run(path, "--channels", "0,1", "--format", "json") == 0
    items = json.loads(capsys.readouterr().out)
    assert [(i["channel"], i["text"]) for i in items] == list(enumerate(texts))
    assert run(path, "--channels", "1") == 0
    assert capsys.readouterr().out == f"{path} [1]\t{texts[1]}\n"
    assert run(path, "--channels", "each", "--format", "ctm") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {row[1] for row in rows} == {"1", "2"} and {row[0] for row in rows} == {"call"}
    assert run(path, "--channels", "each", "--format", "vtt") == 0
    vtt = capsys.readouterr().out
    assert "<v channel 0>" in vtt and "<v channel 1>" in vtt
    starts = [line[:12] for line in vtt.splitlines() if " --> " in line]
    assert starts == sorted(starts)
    assert run(path, "--channels", "2") == 1
    assert "has channels 0 to 1, not 2" in capsys.readouterr().err
    for bad in ("left", "-1", "0,", ""):
        with pytest.raises(SystemExit) as end:
            run(path, f"--channels={bad}")
        assert end.value.code == 2


def test_a_channel_of_a_manifest_line(call, tmp_path, capsys):
    path, left, right = call
    expected = fastconformer.load_model(NEMO).transcribe([right, (left + right) / 2])
    lines = [{"audio_filepath": str(path), "channel": 1}]
    lines += [{"audio_filepath": str(path), "channel": [0, 1]}]
    lines += [{"audio_filepath": str(path), "channel": "left"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run(tmp_path / "m.jsonl", "--format", "json") == 1
    out, err = capsys.readouterr()
    assert [item["text"] for item in json.loads(out)] == [t.text for t in expected]
    assert "m.jsonl:3: channel is 'left', expected numbers" in err
    assert run(tmp_path / "m.jsonl") == 1
    names = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [f"{path} [1]", f"{path} [0,1]"]


def test_channels_that_cancel_are_said(tmp_path, speech, capsys):
    soundfile.write(tmp_path / "a.wav", np.stack([speech, -speech], 1), 16000, subtype="FLOAT")
    assert run(tmp_path / "a.wav") == 0
    assert capsys.readouterr().err == (
        f"transcribe: {tmp_path}/a.wav: its channels cancel in their average; give --channels 0\n"
    )


def test_folders_find_containers_and_no_shadows(tmp_path, speech, capsys, monkeypatch):
    for name in ("a.M4A", "b.webm", "c.mkv", "d.wma", "._a.m4a", "notes.txt", "program.ts"):
        (tmp_path / name).write_bytes(b"import x from y")
    soundfile.write(tmp_path / "e.wav", speech, 16000)
    found = [clip.path.name for clip in find_clips([str(tmp_path)]).clips]
    assert found == ["a.M4A", "b.webm", "c.mkv", "d.wma", "e.wav"]
    monkeypatch.setattr(containers, "is_installed", lambda: False)
    (tmp_path / "a.M4A").write_bytes(bytes(4) + b"ftypM4A " + bytes(99))
    assert run(tmp_path) == 1
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "e.wav" in out
    for name in ("a.M4A", "b.webm", "c.mkv", "d.wma"):
        assert sum(name in line for line in err.splitlines()) == 1
    assert 'a.M4A is of a kind that libsndfile does not read; pip install "fastconformer' in err


def test_a_recording_or_names_from_stdin(tree, speech):
    wav = (tree / "deep" / "b.flac").read_bytes()
    command = [sys.executable, "-m", "fastconformer.transcribe", "--model", str(NEMO)]
    names = f"{tree}/a.wav\n\n{tree}/deep/b.flac\n".encode()
    outs = []
    for arguments, content in ((["-"], wav), (["-"], names), (["--from-file", "-"], names)):
        done = subprocess.run([*command, *arguments], input=content, capture_output=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        outs.append(done.stdout.decode())
    assert outs[1] == outs[2] and outs[1].count("\n") == 2
    assert outs[0].strip() == outs[1].splitlines()[1].split("\t")[1]


def test_names_are_never_printed_raw(tmp_path, speech):
    path = tmp_path / "a\x1b[2J\n.wav"
    soundfile.write(str(path), speech, 16000)
    (tmp_path / "b\x1b]0;x\x07.wav").write_bytes(b"RIFF")
    command = [sys.executable, "-m", "fastconformer.transcribe", str(tmp_path)]
    done = subprocess.run([*command, "--model", str(NEMO)], capture_output=True, cwd=ROOT)
    assert b"\x1b" not in done.stdout + done.stderr and b"\x07" not in done.stderr
    assert rb"a\x1b[2J\n.wav" in done.stdout and done.stdout.count(b"\n") == 1
    transcript = Transcript("a", [1], [0], None, spans(("a", 0, 1)), None, 0.0, "ctc", 1.0)
    assert to_ctm(transcript, "x\x1by").startswith("x\\x1by 1 ")
    assert to_text(transcript, "x\ty").startswith("x\\ty\ta\n")


def test_audio_from_anywhere(tree, speech):
    model = fastconformer.load_model(NEMO)
    path = tree / "deep" / "b.flac"
    samples = soundfile.read(path, dtype="float32")[0]
    (expected,) = model.transcribe(path)
    with open(path, "rb") as file:
        given = [path.read_bytes(), io.BytesIO(path.read_bytes()), file, (samples, 16000)]
        found = model.transcribe(given)
    assert [t.tokens for t in found] == [expected.tokens] * 4
    slow = np.interp(np.arange(0, len(samples), 0.5), np.arange(len(samples)), samples)
    (found,) = model.transcribe([(slow.astype(np.float32), 32000)])
    assert abs(found.duration - expected.duration) < 0.01
    (alone,) = model.transcribe(path.read_bytes())
    assert alone.tokens == expected.tokens


def test_one_recording_needs_no_list():
    model = fastconformer.load_model(NEMO)
    content = (SAMPLES / "jfk.flac").read_bytes()
    samples, rate = soundfile.read(SAMPLES / "jfk.flac", dtype="float32")
    texts = []
    for one in (samples, (samples, rate), (samples, float(rate)), content, bytearray(content)):
        [found] = model.transcribe(one)
        texts.append(found.text)
    assert len(set(texts)) == 1
    assert len(model.transcribe((samples[:rate], samples[rate:]))) == 2


def test_bad_items_are_kept_where_asked(tree):
    model = fastconformer.load_model(NEMO)
    good = tree / "a.wav"
    bad = [tree / "gone.wav", np.zeros(0, np.float32), b"RIFF", (np.zeros(9, np.float32), 3)]
    found = model.transcribe([good, *bad, good], errors="keep", timestamps=True)
    assert found[0] == found[-1] and found[0].error is None
    assert [t.text for t in found[1:-1]] == [""] * 4 and all(t.error for t in found[1:-1])
    assert "gone.wav" in found[1].error
    with pytest.raises(FileNotFoundError):
        model.transcribe([good, *bad])
    with pytest.raises(ValueError, match="errors is 'skip'"):
        model.transcribe([good], errors="skip")


def test_a_full_disk_names_the_file(tree, tmp_path):
    """On a disk of 64 kB, in a mount namespace of its own."""
    mount = f"mount -t tmpfs -o size=64k tmpfs {tmp_path}"
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no mount namespaces here")
    fill = f"head -c 65536 /dev/zero > {tmp_path}/big; sync"
    command = f"{sys.executable} -m fastconformer.transcribe --model {NEMO} {SAMPLES}/jfk.flac"
    for name in ("a.jsonl", "a.txt"):
        script = f"{mount} && {fill}; {command} -o {tmp_path}/{name}"
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True
        )
        lines = [line for line in done.stderr.splitlines() if line.startswith("transcribe")]
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert len(lines) == 1 and "No space left on device" in lines[0] and name in lines[0]


def test_a_transcript_is_shown_shortly():
    words, segments = spans(("a", 0, 1)), spans(("<b>", 0, 1.5))
    transcript = Transcript("<b>" * 99, [1] * 99, [0] * 99, None, words, segments, 0.0, "tdt", 2.0)
    assert len(repr(transcript)) < 100 and repr(transcript).endswith("tdt, 2.00 s)")
    assert "&lt;b&gt;" in transcript._repr_html_() and "<b>" not in transcript._repr_html_()
