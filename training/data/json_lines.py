"""JSON lines that a run writes and reads back: a record a line, appended as they come."""

import contextlib
import json
from pathlib import Path

from fastconformer.checkpoint.files import ESCAPES, atomic_file


def json_line(record: dict) -> str:
    """A name of a file may hold bytes that are no text: such stay escapes."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    return line.encode(errors=ESCAPES).decode()


def append_line(path: Path, record: dict) -> None:
    """One more JSON line, on disk when this returns to the operating system."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json_line(record))


def read_lines(path: Path) -> list[dict]:
    """The records of a file of JSON lines; none where there is no file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:  # not splitlines: U+2028 may stand within a line
        return [json.loads(line) for line in file]


def keep_lines_until(path: Path, step: int) -> None:
    """Drop lines past a step, which a resumed run writes again, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
