"""A folder of what people bring: many containers, odd names, damaged files; killed again and again.

FFmpeg makes the files and tells how long each of them is.
"""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import SAMPLES

from fastconformer import transcribe

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "models" / "base_tiny.nemo"
VIDEO = "-f lavfi -i color=size=32x32:rate=10 -shortest -map 0:a -map 1:v"
OLD_RATES = "-b:a 192k -ar 44100"
KINDS = [  # suffix and FFmpeg's options; the first twenty are those of the small folder
    ("wav", ""),
    ("m4a", "-c:a aac"),
    ("mp3", ""),
    ("webm", "-c:a libopus"),
    ("wma", "-c:a wmav2 " + OLD_RATES),
    ("mp4", f"{VIDEO} -c:v mpeg4 -c:a aac"),
    ("ogg", "-c:a libvorbis -ar 44100"),
    ("MKV", "-c:a flac"),
    ("aac", "-ar 24000"),
    ("wav", "-c:a adpcm_ms -ar 22050"),
    ("opus", "-c:a libopus"),
    ("flac", "-ar 192000"),
    ("wav", "-c:a pcm_u8 -ar 11025"),
    ("ts", "-c:a mp2 " + OLD_RATES),
    ("mp3", "-q:a 5 -write_xing 0"),
    ("caf", "-c:a pcm_s24be"),
    ("wav", "-c:a pcm_f64le -ar 7350"),
    ("m4b", "-c:a aac -f ipod"),
    ("WAV", "-c:a pcm_mulaw -ar 8000"),
    ("3gp", "-c:a aac -ar 32000"),
    ("wav", "-c:a pcm_s24le -ar 48000"),
    ("wav", "-c:a pcm_f32le -ar 96000"),
    ("wav", "-c:a adpcm_ima_wav -ar 11025"),
    ("wav", "-rf64 always"),
    ("w64", "-ar 12000"),
    ("aiff", "-ar 44100"),
    ("aif", "-c:a pcm_s32be"),
    ("au", "-c:a pcm_alaw -ar 8000"),
    ("caf", "-c:a alac"),
    ("m4a", "-c:a alac -ar 44100"),
    ("mp4", "-c:a aac -movflags frag_keyframe+empty_moov"),
    ("mov", f"{VIDEO} -c:v mpeg4 -c:a pcm_s16le"),
    ("mkv", "-c:a libopus"),
    ("mkv", f"{VIDEO} -c:v mpeg4 -c:a libvorbis -ar 44100"),
    ("mka", "-c:a aac"),
    ("weba", "-c:a libvorbis -ar 48000 -f webm"),
    ("3g2", "-c:a aac -ar 22050"),
    ("MP3", "-b:a 32k -ar 16000"),
    ("mp3", "-q:a 9 -ar 22050 -metadata title=Call -id3v2_version 3"),
    ("mp2", OLD_RATES),
    ("ac3", OLD_RATES),
    ("eac3", OLD_RATES),
    ("dts", "-c:a dca -strict -2 -b:a 512k -ar 48000"),
    ("wma", "-c:a wmav1 " + OLD_RATES),
    ("asf", "-c:a wmav2 " + OLD_RATES),
    ("wmv", f"{VIDEO} -c:v wmv2 -c:a wmav2 {OLD_RATES}"),
    ("avi", f"{VIDEO} -c:v mpeg4 -c:a libmp3lame -ar 44100"),
    ("flv", f"{VIDEO} -c:v flv -c:a libmp3lame -ar 44100"),
    ("mpg", f"{VIDEO} -r 25 -c:v mpeg1video -c:a mp2 {OLD_RATES}"),
    ("m2ts", "-c:a ac3 " + OLD_RATES),
    ("wv", "-ar 44100"),
    ("tta", "-ar 44100"),
    ("voc", "-ar 16000"),
    ("gsm", "-ar 8000 -ac 1"),
    ("spx", "-c:a libspeex -ar 16000 -ac 1"),
    ("ogg", "-c:a flac"),
    ("oga", "-c:a libopus -b:a 12k"),
]
NAMES = [
    "call", "Ünï çödé", "with space", "two\nlines", "it's \"quoted\"", "-dash", "日本語の録音",
    "100%41", "a;b&c", "[0-9]*", "dot..", "🎙", b"\xff\xfe bytes", "x" * 200, "tab\tname",
    "नमस्ते", "back\\slash", "\x1b[31mred", "semi:colon", "#hash",
]  # fmt: skip


def ffmpeg(*arguments, stdin=subprocess.DEVNULL) -> bytes:
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", *arguments]
    done = subprocess.run(command, capture_output=True, stdin=stdin)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def place(folder: Path, number: int, suffix: str) -> Path:
    """The number-th file's path: in folders, under an odd name."""
    name = os.fsencode(NAMES[number % len(NAMES)]) if number % 3 else b"file"
    within = folder / ("calls", "old calls/2019", "x/y/z")[number % 3 if number % 5 else 0]
    within.mkdir(parents=True, exist_ok=True)
    return within / os.fsdecode(b"%03d " % number + name + b"." + suffix.encode())


def make_readable(folder: Path, n_files: int) -> dict[str, float]:
    """{path: seconds, as FFmpeg hears it}."""
    clips = sorted((SAMPLES / "english").iterdir())

    def make(task) -> tuple[str, float]:
        number, (suffix, options) = task
        path = place(folder, number, suffix)
        stereo = ["-ac", "2"] if number % 4 == 1 and "-ac" not in options else []
        ffmpeg("-i", str(clips[number % len(clips)]), *options.split(), *stereo, f"file:{path}")
        mono = ["-map", "0:a:0", "-ac", "1", "-ar", "16000", "-f", "s16le", "-"]
        heard = ffmpeg("-i", f"file:{path}", *mono)
        return str(path), len(heard) / 32000

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(make, enumerate(itertools.islice(itertools.cycle(KINDS), n_files))))


def make_damaged(folder: Path, n_files: int) -> set[str]:
    """Files in which nothing is to be heard, each in a way of its own."""
    scratch = folder.parent / "scratch"
    scratch.mkdir()

    def made(name: str, options: str, *inputs: str) -> bytes:
        ffmpeg(*(inputs or ("-i", str(SAMPLES / "jfk.flac"))), *options.split(), scratch / name)
        return (scratch / name).read_bytes()

    wav, m4a, webm, flac = (
        made(f"a.{suffix}", options)
        for suffix, options in (("wav", ""), ("m4a", ""), ("webm", "-c:a libopus"), ("flac", ""))
    )
    floats = made("floats.wav", "-c:a pcm_f32le")
    rubbish = random.Random(0).randbytes(30000)
    picture = ("-f", "lavfi", "-i", "color=size=32x32:duration=1")
    contents = [
        ("empty.wav", b""),
        ("head.wav", wav[:4]),
        ("no index.m4a", m4a[: len(m4a) // 2]),
        ("rubbish.mp3", rubbish),
        ("page.html.m4a", b"<!doctype html><title>404 Not Found</title>" * 40),
        ("silent film.mp4", made("v.mp4", "-c:v mpeg4", *picture)),
        ("zeros.mkv", bytes(50000)),
        ("no samples.wav", wav[: wav.index(b"data") + 4] + bytes(4)),
        ("head.webm", webm[:300]),
        ("head.flac", flac[:42]),
        ("rubbish.ogg", b"OggS" + rubbish),
        ("picture.mp3", made("p.png", "-frames:v 1", *picture)),
        ("playlist.aac", b"#EXTM3U\n#EXTINF:1,\nhttp://localhost/secret.aac\n"),
        ("rubbish.aiff", b"FORM\0\0\xff\xffAIFF" + rubbish),
        ("rubbish.wma", bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + rubbish),
        ("not numbers.wav", floats[: floats.index(b"data") + 8] + b"\0\0\xc0\x7f" * 9000),
        ("rubbish.caf", b"caff\0\1\0\0" + rubbish),
        ("text.opus", "Notes of the meeting\n".encode("utf-16") * 99),
    ]
    paths = [folder / "damaged" / name for name, _ in contents[:n_files]]
    (folder / "damaged").mkdir()
    for path, (_, content) in zip(paths, contents, strict=False):
        path.write_bytes(content)
    return {str(path) for path in paths}


def lines_of(out: Path) -> list[dict]:
    """Whole lines of a results file, also of a killed job."""
    content = out.read_bytes() if out.exists() else b""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def paths_of(out: Path, outcome: str) -> list[str]:
    return [line["path"] for line in lines_of(out) if outcome in line]


@pytest.mark.parametrize(
    ("n_readable", "n_damaged", "n_kills"),
    [(16, 4, 2), pytest.param(182, 18, 10, marks=pytest.mark.slow)],
)
def test_a_mixed_folder_is_heard_whole(tmp_path, capsys, n_readable, n_damaged, n_kills):
    """Killed at random moments and started again: every readable file has one text, to its end;
    every damaged one is named, with status 1, and tried once at each start."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not here: it makes the files")
    folder, out, rng = tmp_path / "archive", tmp_path / "out.jsonl", random.Random(n_readable)
    folder.mkdir()
    lengths, damaged = make_readable(folder, n_readable), make_damaged(folder, n_damaged)
    arguments = [str(folder), "--model", str(BASE), "-o", str(out), "--batch-size", "2"]
    command = [sys.executable, "-m", "fastconformer.transcribe", *arguments]

    kills, share = 0, max(1, (n_readable + n_damaged) // (n_kills + 1))
    while kills < n_kills:
        before = len(lines_of(out)), paths_of(out, "error")
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        wanted = before[0] + rng.randint(0 if kills else 3, share)
        while process.poll() is None and len(lines_of(out)) < wanted:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.2)
        process.kill()
        assert process.wait() == -9, "it ended before it was killed"
        kills += 1
        retried = paths_of(out, "error")[len(before[1]) :]
        assert len(retried) == len(set(retried)) and set(retried) <= damaged
    heard = paths_of(out, "text")
    assert len(heard) == len(set(heard)) and 0 < len(heard) < n_readable
    tries = len(paths_of(out, "error"))

    assert transcribe.main(arguments) == 1
    told = capsys.readouterr().err.splitlines()
    assert f"{n_damaged} of {n_readable + n_damaged} inputs failed" in told[-1]
    assert all(line.startswith("transcribe: ") for line in told)
    for path in damaged:
        assert sum(path in line for line in told) == 1, path
    assert sorted(paths_of(out, "text")) == sorted(lengths)
    assert sorted(paths_of(out, "error")) == sorted(damaged) and tries <= n_damaged * n_kills
    for line in lines_of(out):
        if "text" in line:
            assert abs(line["duration"] - lengths[line["path"]]) < 0.1, line["path"]

    good = next(path for path in lengths if path.endswith(".wav"))
    mended = folder / "damaged" / "empty.wav"
    mended.write_bytes(Path(good).read_bytes())
    assert transcribe.main(arguments) == 1
    assert f"{n_readable} of {n_readable + n_damaged} clips are in" in capsys.readouterr().err
    assert sorted(paths_of(out, "text")) == sorted([*lengths, str(mended)])
    assert sorted(paths_of(out, "error")) == sorted(damaged - {str(mended)})
