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
    finally:
        temporary.unlink(missing_ok=True)


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
