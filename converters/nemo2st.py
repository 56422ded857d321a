"""A NeMo archive, or a Lightning checkpoint, to a folder of config.json, model.safetensors and
tokenizer files."""

import sys
from pathlib import Path

from converters import check
from fastconformer import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = cli.parser("converters.nemo2st", __doc__, "parakeet.nemo -o parakeet")
    parser.add_argument("archive", type=Path, metavar="model.nemo", help="NeMo archive to read")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder to write (default: the archive's name without .nemo)",
    )
    parser.add_argument(
        "--like",
        type=Path,
        metavar="model.nemo",
        help="of a Lightning .ckpt: the model that has its config and tokenizer",
    )
    args = parser.parse_args(argv)
    if args.output is None and args.archive.suffix != ".nemo":
        parser.error(f"{args.archive} does not end in .nemo: name the folder with -o FOLDER")
    folder = args.output or args.archive.with_suffix("")
    return cli.run("nemo2st", lambda: convert(args.archive, folder, args.like))


def convert(archive: Path, folder: Path, like: Path | None = None) -> None:
    """Reads, checks, writes; a bad archive writes nothing."""
    from fastconformer.checkpoint.folder import write_folder
    from fastconformer.checkpoint.read import read_checkpoint

    if archive.is_dir():
        raise ValueError(f"{archive} is a folder; expected a .nemo file")
    checkpoint = read_checkpoint(archive, like)
    try:
        summary = check(checkpoint)
    except ValueError as error:
        raise ValueError(f"{archive}: {error}") from error
    write_folder(folder, checkpoint)
    print(summary)
    if checkpoint.dropped:
        print(f"not kept, the model does not use them: {', '.join(checkpoint.dropped)}")
    print(f"wrote {folder}")


if __name__ == "__main__":
    sys.exit(main())
