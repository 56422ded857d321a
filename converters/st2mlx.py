"""A model to a folder that parakeet-mlx loads on Apple's machines."""

import sys
from pathlib import Path

from converters import load_exportable
from fastconformer import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = cli.parser(
        "converters.st2mlx",
        f"{__doc__}\nIts own features differ a little, so texts are near to ours, not equal.",
        "parakeet.nemo -o parakeet-mlx",
    )
    parser.add_argument("model", metavar="MODEL", help="whatever load_model takes")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args(argv)
    return cli.run("st2mlx", lambda: convert(args.model, args.output))


def convert(model: str, folder: Path) -> None:
    """Loads, checks, writes."""
    from fastconformer.export import mlx

    loaded = load_exportable(model)
    try:
        mlx.export(loaded, folder)
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from None
    print(f"wrote {folder}")


if __name__ == "__main__":
    sys.exit(main())
