"""A Hugging Face folder of transformers' Parakeet to a folder that load_model and st2nemo take."""

import sys
from pathlib import Path

from converters import check
from fastconformer import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = cli.parser(
        "converters.hf2st",
        f"{__doc__}\nThe SentencePiece model is rebuilt from tokenizer.json.",
        "parakeet-hf -o parakeet",
    )
    parser.add_argument("folder", type=Path, metavar="HF_FOLDER")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args(argv)
    return cli.run("hf2st", lambda: convert(args.folder, args.output))


def convert(source: Path, folder: Path) -> None:
    """Reads, checks, writes; a bad folder writes nothing."""
    from fastconformer.checkpoint.folder import write_folder
    from fastconformer.checkpoint.hugging_face import is_hugging_face
    from fastconformer.checkpoint.read import read_checkpoint

    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    if not is_hugging_face(source):
        raise ValueError(
            f"{source} is no folder of transformers: its config.json names no model_type"
        )
    checkpoint = read_checkpoint(source)
    try:
        summary = check(checkpoint)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    write_folder(folder, checkpoint)
    print(summary)
    print(f"wrote {folder}")


if __name__ == "__main__":
    sys.exit(main())
