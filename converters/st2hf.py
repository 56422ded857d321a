"""A model to a folder that transformers' from_pretrained loads, ready for the hub."""

import sys
from pathlib import Path

from fastconformer import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = cli.parser(
        "converters.st2hf",
        f"{__doc__}\nParakeetForCTC, ForRNNT or ForTDT; what those cannot run is refused.",
        "parakeet.nemo -o parakeet-hf --head tdt",
    )
    parser.add_argument("model", metavar="MODEL", help="whatever load_model takes")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--head", help="which of the model's heads (default: its first)")
    args = parser.parse_args(argv)
    return cli.run("st2hf", lambda: convert(args.model, args.output, args.head))


def convert(model: str, folder: Path, head: str | None = None) -> None:
    """Loads, checks, writes."""
    from fastconformer import load_model
    from fastconformer.export import hugging_face

    loaded = load_model(model)
    head = loaded.head(head).name
    try:
        hugging_face.export(loaded, head, folder)
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from None
    print(f"head {head}, for transformers")
    print(f"wrote {folder}")


if __name__ == "__main__":
    sys.exit(main())
