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
    if not name.strip():  # of a shell's variable that is not set, and no word for this folder
        return Found([], [(repr(name), "the name is empty")])
    if path.is_dir():
        return _in_folder(path, name)
    if name == "-":
        return _from_stdin()
    if glob.has_magic(name) and not path.exists():
        names = sorted(p for p in glob.glob(name, recursive=True) if Path(p).is_file())
        return find_clips(names) if names else Found([], [(name, "no file is named like this")])
    if Path(name.lower().removesuffix(".gz")).suffix in MANIFEST_SUFFIXES:
        return _in_manifest(path, name)
    if path.is_fifo():  # <(...) of a shell
        return Found([Clip(path, name, content=path.read_bytes())])
    if "://" in name and not path.exists():
        return Found([], [(name, "is an address; download it first")])
    return Found([Clip(path, name)])


def read_names(path: str) -> list[str]:
    """Names from a file, or from stdin (`-`): one a line, or with a zero byte behind each, as `find
    -print0` has them. FileNotFoundError, ValueError."""
    if path == "-":
        content = sys.stdin.buffer.read()
    elif not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such list of names")
    else:
        content = Path(path).read_bytes()
    if b"\0" in content and not _ends_with_zeros(content):
        raise ValueError(f"{path} is no text; it should hold a name on each line")
    names = _lines(content)
    if not names:
        raise ValueError(f"{'stdin' if path == '-' else path} holds no name")
    return names


def _ends_with_zeros(content: bytes) -> bool:
    """Whether these are names with a zero byte behind each, told by the first."""
    return os.path.lexists(content.partition(b"\0")[0])


def _lines(content: bytes) -> list[str]:
    # as the file system has them: a name may hold bytes that are no text
    names = os.fsdecode(content.removeprefix(b"\xef\xbb\xbf"))
    if "\0" in names:
        return [name for name in names.split("\0") if name]
    return [name.rstrip("\r") for name in names.split("\n") if name.strip()]


def _from_stdin() -> Found:
    """What is piped in: a recording, or names of some."""
    if not hasattr(sys.stdin, "buffer"):
        return find_clips(line.rstrip("\r\n") for line in sys.stdin if line.strip())
    content = sys.stdin.buffer.read()
    if b"\0" in content[:4096] and not _ends_with_zeros(content):
        return Found([Clip(Path("-"), "-", content=content)])  # no recording is long without
    names = _lines(content)
    return find_clips(names) if names else Found([], [("stdin", "nothing came in")])


def _in_folder(folder: Path, name: str) -> Found:
    """What lies in it and in folders that are linked there, each once; a link that leads nowhere is
    a recording that cannot be read."""
    paths, been, problems = [], set(), []

    def note(error: OSError) -> None:
        problems.append((str(error.filename), error.strerror or str(error)))

    for within, folders, names in os.walk(folder, onerror=note, followlinks=True):
        real = os.path.realpath(within)
        if real in been:
            folders.clear()
            continue
        been.add(real)
        folders.sort()
        paths += [Path(within, n) for n in names if Path(n).suffix.lower() in AUDIO_SUFFIXES]
    paths = [p for p in sorted(paths) if (p.is_file() and _is_recording(p)) or not p.exists()]
    if not paths:
        problems.append((name, "the folder holds no audio file"))
    return Found([Clip(p, str(p), folder=folder) for p in paths], problems)


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
