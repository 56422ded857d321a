"""What is named to be transcribed: folders with links, lists, pipes, and names that are none."""

import gzip
import io
import os
import threading
from pathlib import Path

import pytest
from conftest import SAMPLES

from fastconformer import cli
from fastconformer.formats.inputs import find_clips, read_names
from fastconformer.transcribe import main

BASE = str(Path(__file__).parents[2] / "models" / "base_tiny.nemo")
CLIP = SAMPLES / "sentence.wav"


@pytest.fixture
def stdin(monkeypatch):
    def give(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))

    return give


def names(found) -> list[str]:
    return [clip.audio for clip in found.clips]


def test_links_in_a_folder(tmp_path):
    """Folders behind links are searched once, also in a circle; a link to nothing is named."""
    folder, beside = tmp_path / "archive", tmp_path / "beside"
    folder.mkdir()
    beside.mkdir()
    (beside / "b.wav").write_bytes(b"")
    (folder / "a.wav").write_bytes(b"")
    (folder / "linked").symlink_to(beside)
    (folder / "twice").symlink_to(beside)
    (beside / "circle").symlink_to(folder)
    (folder / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    found = find_clips([str(folder)])
    assert [Path(name).name for name in names(found)] == ["a.wav", "gone.wav", "b.wav"]
    assert found.problems == []
    found = find_clips([str(tmp_path / "archive" / "linked" / "circle" / "linked")])
    assert sorted(Path(name).name for name in names(found)) == ["a.wav", "b.wav", "gone.wav"]


def test_a_link_to_nothing_is_told(tmp_path, capsys):
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    (tmp_path / "a.wav").write_bytes(CLIP.read_bytes())
    assert main([str(tmp_path), "--model", BASE]) == 1
    told = capsys.readouterr()
    assert "gone.wav: no such audio file" in told.err and told.out.startswith(f"{tmp_path}/a.wav\t")


def test_lists_with_zero_bytes(tmp_path, stdin):
    odd = tmp_path / "two\nlines.wav"
    odd.write_bytes(b"")
    content = os.fsencode(odd) + b"\0gone.wav\0"
    (tmp_path / "list").write_bytes(content)
    assert read_names(str(tmp_path / "list")) == [str(odd), "gone.wav"]
    stdin(content)
    assert names(find_clips(["-"])) == [str(odd), "gone.wav"]
    stdin(CLIP.read_bytes())
    assert find_clips(["-"]).clips[0].content == CLIP.read_bytes()
    (tmp_path / "list").write_bytes(CLIP.read_bytes())
    with pytest.raises(ValueError, match="list is no text"):
        read_names(str(tmp_path / "list"))


def test_a_pipe_with_a_name(tmp_path):
    """As a shell's <(command) is one."""
    pipe = tmp_path / "63"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(CLIP.read_bytes()))
    writer.start()
    [clip] = find_clips([str(pipe)]).clips
    writer.join()
    assert clip.content == CLIP.read_bytes() and clip.audio == str(pipe)


def test_names_behind_two_dashes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("-a.wav", "b.wav"):
        (tmp_path / name).write_bytes(CLIP.read_bytes())
    assert main(["--model", BASE, "--", "-a.wav"]) == 0
    alone = capsys.readouterr().out
    assert main(["b.wav", "--model", BASE, "--", "-a.wav"]) == 0
    assert capsys.readouterr().out == f"b.wav\t{alone}-a.wav\t{alone}"


def test_closed_streams(tmp_path, monkeypatch):
    """`<&- >&- 2>&-`, and Windows' pythonw: Python has None in their place."""
    out = tmp_path / "a.txt"
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", None)
    assert main(["-", "no.wav", "--model", BASE]) == 1
    assert main([str(CLIP), "--model", BASE]) == 0
    assert main([str(CLIP), "--model", BASE, "-o", str(out)]) == 0 and out.read_text().strip()


def test_packed_manifests(tmp_path):
    line = b'{"audio_filepath": "a.wav"}\n'
    packed = tmp_path / "m.jsonl.gz"
    packed.write_bytes(gzip.compress(line * 2))
    assert names(find_clips([str(packed)])) == ["a.wav", "a.wav"]
    packed.write_bytes(packed.read_bytes()[:-9])
    assert "m.jsonl.gz is cut or damaged" in find_clips([str(packed)]).problems[0][1]
    (tmp_path / "m.json").write_text(line.decode(), encoding="utf-16")
    assert "m.json is UTF-16" in find_clips([str(tmp_path / "m.json")]).problems[0][1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "transcribe: '': the name is empty\n"),
        (
            "https://host/a.wav",
            "transcribe: https://host/a.wav: is an address; download it first\n",
        ),
        ("-", "transcribe: stdin: nothing came in\n"),
    ],
)
def test_what_is_no_name(name, said, stdin, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(CLIP.read_bytes())  # which nobody asked for
    stdin(b"\n")
    assert main([name, "--model", BASE]) == 1
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", said)
    stdin(b"\n")
    assert main(["--from-file", "-", "--model", BASE]) == 1
    assert capsys.readouterr().err == "transcribe: stdin holds no name\n"


def test_a_short_name_is_told(capsys):
    cli.report("transcribe", "e", "the folder holds no audio file")
    cli.report("transcribe", "e", "e is damaged")
    wanted = "transcribe: e: the folder holds no audio file\ntranscribe: e is damaged\n"
    assert capsys.readouterr().err == wanted
