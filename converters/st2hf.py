"""A model to a folder that transformers' from_pretrained loads, ready for the hub."""

import sys
from pathlib import Path

from converters import add_card_arguments, load_exportable, model_card
from fastconformer import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = cli.parser(
        "converters.st2hf",
        f"{__doc__}\nParakeetForCTC, ForRNNT or ForTDT; what those cannot run is refused.",
        "parakeet.nemo -o parakeet-hf --head tdt --results test.json --licence cc-by-4.0",
    )
    parser.add_argument("model", metavar="MODEL", help="whatever load_model takes")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--head", help="which of the model's heads (default: its first)")
    add_card_arguments(parser)
    args = parser.parse_args(argv)
    return cli.run("st2hf", lambda: convert(args))


def convert(args) -> None:
    """Loads, checks, writes."""
    from fastconformer.export import hugging_face

    model = load_exportable(args.model)
    with cli.usage("--"):
        head = model.head(args.head).name
    source = Path(args.model)
    card = model_card(args, source, args.output, model.config, head, "transformers")
    try:
        note = hugging_face.export(model, head, args.output, card)
    except ValueError as error:
        raise ValueError(f"{args.model}: {error}") from None
    print(f"head {head}, for transformers; its card is README.md")
    if note:
        print(f"note: {note}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    sys.exit(main())
