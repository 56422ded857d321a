"""Files and memory: writing whole or not at all, giving back what was read."""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None


ESCAPES = "backslashreplace"  # a file's name may hold bytes that are no text; in JSON it stays one


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """An OSError inside names this file: a full disk does not say which it was."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name; what is written there is on disk under `path` when the block ends
    well, and gone otherwise."""
    temporary = path.with_name(f".{path.name}.tmp")  # a killed run's is written over
    try:
        with naming_file(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)  # the rename, too
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, in UTF-8. Raises OSError."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=ESCAPES, newline="\n")


@contextmanager
def only_process(path: Path) -> Iterator[None]:
    """ValueError where another process writes this file; it is made if it is not there, and taken
    away again if nothing was written. The lock ends with its process, however that ends."""
    is_new = not path.exists()
    with open(path, "a") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"{path}: another process is writing it; wait for it, or name another file"
            ) from None
        except OSError:  # a disk that knows no locks
            pass
        try:
            yield
        finally:
            if is_new and path.exists() and path.stat().st_size == 0:
                path.unlink()


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


@contextmanager
def filled_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder; when the block ends well, its files lie in `folder`. A new one appears
    whole or not at all; in one that is there, file after file is replaced, others stay.

    ValueError: folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the name of a folder")
    # Inside an existing folder, which may be a file system of its own; beside a new one.
    parent = folder if folder.is_dir() else folder.parent
    with work_folder(parent, folder.name) as work:
        new = work / "new"
        new.mkdir()
        yield new
        names = sorted(file.name for file in new.iterdir())
        for name in names:
            os.chmod(new / name, 0o666 & ~_umask())  # some writers make files for one user only
            sync(new / name)
        if parent == folder:
            for name in names:
                os.replace(new / name, folder / name)
        else:
            sync(new)
            os.rename(new, folder)
        sync(parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def give_back(tensor) -> None:
    """Lets the system drop the memory of a tensor that lies in a mapped file and is done with; used
    again, it is read again. Other memory stays as it is, and so does all where the system knows no
    such advice."""
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    page = os.sysconf("SC_PAGE_SIZE")
    start = tensor.data_ptr()
    first, last = -(-start // page) * page, (start + tensor.nbytes) // page * page
    if tensor.is_contiguous() and first < last:
        pageout = 21  # MADV_PAGEOUT, of Linux 5.4: nothing is lost, what no file holds included
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), pageout)
