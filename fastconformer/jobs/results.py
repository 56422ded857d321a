"""A transcription job over an archive: files read ahead, results written as they come, resumable.

Results are JSON lines, one a clip, appended and flushed. A killed job leaves whole lines and at
most a torn last one, which the next start cuts off; clips that already have a line are not
transcribed again. Under torchrun each process has every n-th clip and a file of its own, which the
first process merges at the end, in the order of the clips.
"""

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from ..checkpoint.files import atomic_file


def read_results(path: Path, mend: bool = False) -> dict[tuple, str]:
    """{clip's key: its line} of a results file, empty where there is none.

    `mend`: a torn last line (of a killed job) is cut off. ValueError: a line is not a result.
    """
    lines: dict[tuple, str] = {}
    if not path.exists():
        return lines
    whole = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                lines[key_of(json.loads(line))] = line.decode("utf-8")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{path}, line {number}, is not a result of this command; name another file"
                ) from None
    if mend and whole < path.stat().st_size:
        os.truncate(path, whole)
    return lines


def key_of(result: dict) -> tuple:
    """What names a clip in a results file: its path, and its section."""
    return result["path"], result.get("offset"), result.get("clip_duration")


def part_path(path: Path, rank: int, world_size: int) -> Path:
    """Where a process of several writes until the end."""
    return path if world_size == 1 else path.with_name(f"{path.name}.part-{rank}-of-{world_size}")


def all_results(path: Path, mend: bool = False) -> dict[tuple, str]:
    """Lines of the results file and of all parts that processes left beside it."""
    lines = read_results(path, mend)
    for part in sorted(path.parent.glob(f"{path.name}.part-*-of-*")):
        lines |= read_results(part, mend)
    return lines


def merge_results(path: Path, keys: Iterable[tuple]) -> int:
    """One file of all parts, in the order of `keys`, then whatever else was there; the parts go.
    Returns the number of lines."""
    lines = all_results(path)
    ordered = {key: lines.pop(key) for key in keys if key in lines} | lines
    with atomic_file(path) as temporary:
        temporary.write_text("".join(ordered.values()), encoding="utf-8")
    for part in path.parent.glob(f"{path.name}.part-*-of-*"):
        part.unlink()
    return len(ordered)


class Progress:
    """A line on a terminal's stderr: clips, hours, times real time, time left."""

    def __init__(self, n_clips: int, show: bool | None = None):
        self.n_clips, self.done, self.seconds = n_clips, 0, 0.0
        self.live = sys.stderr.isatty() if show is None else show
        self.started = self.printed = time.monotonic()

    def add(self, audio_s: float) -> None:
        self.done += 1
        self.seconds += audio_s
        if self.live and time.monotonic() - self.printed > 0.5:
            self.printed = time.monotonic()
            print(f"\r\033[K{self}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.live:
            print(f"\r\033[Ktranscribe: {self}", file=sys.stderr)

    def __str__(self) -> str:
        elapsed = max(time.monotonic() - self.started, 1e-6)
        text = f"{self.done}/{self.n_clips} clips, {self.seconds / 3600:.2f} h of audio"
        text += f" in {elapsed / 60:.1f} min, RTFx {self.seconds / elapsed:.1f}"
        if 0 < self.done < self.n_clips:
            left = elapsed / self.done * (self.n_clips - self.done)
            text += f", {left / 60:.1f} min left"
        return text
