"""A converted folder to a NeMo archive that NeMo's restore_from takes."""

import argparse
import os
import sys
from pathlib import Path

from converters import check, run


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m converters.st2nemo",
        description=__doc__,
        epilog="example: python -m converters.st2nemo parakeet -o parakeet.nemo",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="folder from nemo2st, training or model.save"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="model.nemo",
        help="archive to write (default: the folder's name with .nemo)",
    )
    args = parser.parse_args(argv)
    folder = args.folder
    if folder.name in ("", ".."):  # "." has a name only as an absolute path
        folder = Path(os.path.abspath(folder))
    archive = args.output or folder.with_name(f"{folder.name}.nemo")
    return run("st2nemo", lambda: convert(args.folder, archive))


def convert(folder: Path, archive: Path) -> None:
    """Reads, checks, writes; a bad folder writes nothing."""
    from fastconformer.checkpoint import read_checkpoint
    from fastconformer.nemo_archive import write_nemo

    if folder.is_file():
        raise ValueError(f"{folder} is a file; expected a folder written by nemo2st")
    checkpoint = read_checkpoint(folder)
    try:
        summary = check(checkpoint)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    write_nemo(archive, checkpoint)
    print(summary)
    print(f"wrote {archive}")


if __name__ == "__main__":
    sys.exit(main())
