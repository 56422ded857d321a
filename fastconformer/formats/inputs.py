"""What a user names to be transcribed: files, folders, patterns, manifests and lists -> clips."""

import glob
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .manifest import Clip, read_manifest

AUDIO_SUFFIXES = frozenset([
    ".wav", ".wave", ".bwf", ".flac", ".ogg", ".oga", ".ogx", ".opus", ".spx", ".mp3", ".mp2",
    ".mpga", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".sph", ".nist",
    ".voc", ".gsm", ".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".mka",
    ".webm", ".weba", ".aac", ".ac3", ".eac3", ".dts", ".amr", ".awb", ".wma", ".wmv", ".asf",
    ".avi", ".flv", ".f4v", ".mpg", ".mpeg", ".mts", ".m2ts", ".ts", ".vob", ".ogv", ".wv", ".tta",
    ".ape", ".mpc", ".ra", ".rm", ".rmvb", ".qcp",
])  # fmt: skip
MANIFEST_SUFFIXES = frozenset([".jsonl", ".json"])


@dataclass
class Found:
    """Clips in the order of the inputs; (name, reason) of each input that is none; how many lines
    of manifests say `_skipme`."""

    clips: list[Clip] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    n_skipme: int = 0

    def add(self, other: "Found") -> None:
        self.clips += other.clips
        self.problems += other.problems
        self.n_skipme += other.n_skipme


def find_clips(inputs: Iterable[str]) -> Found:
    """Clips of files, folders (searched deeply), patterns, manifests and `-`: names from stdin."""
    found = Found()
    for name in inputs:
        found.add(_find(name))
    return found


def _find(name: str) -> Found:
    path = Path(name)
    if path.is_dir():
        return _in_folder(path, name)
    if name == "-":
        return _from_stdin()
    if glob.has_magic(name) and not path.exists():
        names = sorted(p for p in glob.glob(name, recursive=True) if Path(p).is_file())
        return find_clips(names) if names else Found([], [(name, "no file is named like this")])
    if path.suffix.lower() in MANIFEST_SUFFIXES:
        return _in_manifest(path, name)
    return Found([Clip(path, name)])


def read_names(path: str) -> list[str]:
    """Names from a file, or from stdin (`-`), one a line. FileNotFoundError, ValueError."""
    if path == "-":
        content = sys.stdin.buffer.read()
    elif not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such list of names")
    else:
        content = Path(path).read_bytes()
    if b"\0" in content:
        raise ValueError(f"{path} is no text; it should hold a name on each line")
    return _lines(content)


def _lines(content: bytes) -> list[str]:
    # as the file system has them: a name may hold bytes that are no text
    names = os.fsdecode(content.removeprefix(b"\xef\xbb\xbf")).split("\n")
    return [name.rstrip("\r") for name in names if name.strip()]


def _from_stdin() -> Found:
    """What is piped in: a recording, or names of some."""
    if not hasattr(sys.stdin, "buffer"):
        return find_clips(line.rstrip("\r\n") for line in sys.stdin if line.strip())
    content = sys.stdin.buffer.read()
    if b"\0" in content[:4096]:  # no text has one, and no recording is long without
        return Found([Clip(Path("-"), "-", content=content)])
    return find_clips(_lines(content))


def _in_folder(folder: Path, name: str) -> Found:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
    paths = [p for p in paths if p.is_file() and _is_recording(p)]
    clips = [Clip(p, str(p), folder=folder) for p in paths]
    return Found(clips, [] if paths else [(name, "the folder holds no audio file")])


def _is_recording(path: Path) -> bool:
    if path.name.startswith("._"):  # what macOS keeps beside each file of a foreign disk
        return False
    if path.suffix.lower() != ".ts":
        return True
    with open(path, "rb") as file:  # MPEG packets, or a program in TypeScript
        return file.read(1) == b"G"


def _in_manifest(path: Path, name: str) -> Found:
    try:
        clips, left_out = read_manifest(path)
    except (OSError, ValueError) as error:
        return Found([], [(name, str(error))])
    problems = [(line.place, line.detail) for line in left_out if not line.is_wanted]
    return Found(clips, problems, sum(line.is_wanted for line in left_out))
