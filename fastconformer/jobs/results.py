"""The result file of a job over an archive, and the line that tells how far the job is.

Results are JSON lines, one a clip, appended and flushed. A killed job leaves whole lines and at
most a torn last one, which the next start cuts off. Of several processes each has a part of its
own, and all are merged into one file at the end.
"""

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from ..checkpoint.files import write_text

EVERY_S = 0.5  # the progress is told anew


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
    """What names a clip in a results file: its path, its section, its channel."""
    channel = result.get("channel")
    channel = tuple(channel) if isinstance(channel, list) else channel
    return result["path"], result.get("offset"), result.get("clip_duration"), channel


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
    """One file of all parts, in the order of the clips' `keys` (channels in theirs), then whatever
    else was there; the parts go. Returns the number of lines."""
    lines = all_results(path)
    places = {key: place for place, key in enumerate(keys)}
    whole = {key[:3] for key in lines if key[3] is not None and key[:3] in places}
    for clip in whole:  # a recording that could not be read, and then was, channel by channel
        lines.pop((*clip, None), None)
    order = sorted(
        lines, key=lambda key: (places.get(key[:3], len(places)), key[3] is not None, key[3] or 0)
    )
    text = "".join(lines[key] for key in order)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    for part in path.parent.glob(f"{path.name}.part-*-of-*"):
        part.unlink()
    return len(order)


class Progress:
    """A line on a terminal's stderr: clips, hours, times real time, time left; within a long
    recording how much of it is heard."""

    def __init__(self, n_clips: int):
        self.n_clips, self.done, self.seconds = n_clips, 0, 0.0
        self.batch_s, self.heard_s = 0.0, 0.0  # of the batch that is worked on
        self.live = sys.stderr.isatty()
        self.started = self.printed = time.monotonic()
        self.line_is_open = False

    def add(self, audio_s: float) -> None:
        self.done += 1
        self.seconds += audio_s
        self._show()

    @property
    def options(self) -> dict:
        """What tells `transcribe_clips` to call `within`, where anyone sees it."""
        return {"progress": self.within} if self.live else {}

    def within(self, heard_s: float, batch_s: float) -> None:
        """So much of the clips that go through together is heard."""
        self.batch_s, self.heard_s = (batch_s, heard_s) if heard_s < batch_s else (0.0, 0.0)
        self._show()

    def _show(self) -> None:
        if self.live and time.monotonic() - self.printed > EVERY_S:
            self.printed = time.monotonic()
            print(f"\r\033[K{self}", end="", file=sys.stderr, flush=True)
            self.line_is_open = True

    def clear(self) -> None:
        """Takes the line away, before another is printed."""
        if self.line_is_open:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self.line_is_open = False

    def close(self) -> None:
        self.clear()
        if self.live:
            print(f"transcribe: {self}", file=sys.stderr)

    def __str__(self) -> str:
        elapsed = max(time.monotonic() - self.started, 1e-6)
        heard_s = self.seconds + self.heard_s
        text = f"{self.done}/{self.n_clips} clips, {heard_s / 3600:.2f} h of audio"
        text += f" in {elapsed / 60:.1f} min, RTFx {heard_s / elapsed:.1f}"
        if self.heard_s:
            text += f", {self.heard_s / self.batch_s:.0%} of the next {self.batch_s / 60:.1f} min"
        elif 0 < self.done < self.n_clips:
            left = elapsed / self.done * (self.n_clips - self.done)
            text += f", {left / 60:.1f} min left"
        return text
