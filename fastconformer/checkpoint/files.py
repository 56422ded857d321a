"""Writing files whole or not at all: a temporary name, fsync, rename."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name; what is written there is on disk under `path` when the block ends
    well, and gone otherwise."""
    temporary = path.with_name(f".{path.name}.tmp")  # a killed run's is written over
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)  # the rename, too
    except OSError as error:
        if error.filename is None:  # a full disk does not say which file it was
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, in UTF-8. Raises OSError."""
    with atomic_file(path) as temporary:
        # a file's name may hold bytes that are no text: as escapes, in JSON too
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


@contextmanager
def work_folder(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder in parent to write `name` in before it is renamed to its place; removed at
    the end. What a killed run left in it goes first."""
    work = parent / f".{name}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
