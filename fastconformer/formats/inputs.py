"""What a user names to be transcribed: files, folders, patterns, manifests and lists -> clips."""

import glob
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .manifest import Clip, read_manifest

AUDIO_SUFFIXES = frozenset([
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd",
    ".caf", ".w64", ".rf64", ".sph", ".nist",
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
        return find_clips(line.rstrip("\r\n") for line in sys.stdin if line.strip())
    if glob.has_magic(name) and not path.exists():
        names = sorted(p for p in glob.glob(name, recursive=True) if Path(p).is_file())
        return find_clips(names) if names else Found([], [(name, "no file is named like this")])
    if path.suffix.lower() in MANIFEST_SUFFIXES:
        return _in_manifest(path, name)
    return Found([Clip(path, name)])


def _in_folder(folder: Path, name: str) -> Found:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
    clips = [Clip(p, str(p)) for p in paths if p.is_file()]
    return Found(clips, [] if paths else [(name, "the folder holds no audio file")])


def _in_manifest(path: Path, name: str) -> Found:
    try:
        clips, left_out = read_manifest(path)
    except (OSError, ValueError) as error:
        return Found([], [(name, str(error))])
    problems = [(line.place, line.detail) for line in left_out if not line.is_wanted]
    return Found(clips, problems, sum(line.is_wanted for line in left_out))
