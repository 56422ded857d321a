"""A model to a folder of ONNX files that onnx-asr or sherpa-onnx loads."""

import sys
from pathlib import Path

from fastconformer import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = cli.parser(
        "converters.st2onnx",
        f"{__doc__} What the client cannot run is refused\nbefore anything is written.",
        "parakeet.nemo -o parakeet-onnx --for onnx-asr --head tdt",
    )
    parser.add_argument("model", metavar="MODEL", help="whatever load_model takes")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--for", dest="client", required=True, choices=["onnx-asr", "sherpa-onnx"])
    parser.add_argument("--head", help="which of the model's heads (default: its first)")
    parser.add_argument(
        "--int8",
        action="store_true",
        help="8-bit weights in the matrix products: files of about a third, named *.int8.onnx, "
        "beside those of 32 bits if the folder has them",
    )
    args = parser.parse_args(argv)
    return cli.run(
        "st2onnx", lambda: convert(args.model, args.output, args.client, args.head, args.int8)
    )


def convert(model: str, folder: Path, client: str, head: str | None, int8: bool) -> None:
    """Loads, checks, writes."""
    from fastconformer import load_model
    from fastconformer.export import onnx_asr, sherpa_onnx

    loaded = load_model(model)
    head = head or loaded.heads[0]
    if head not in loaded.heads:
        raise ValueError(f"head is {head!r}, this model has {', '.join(loaded.heads)}")
    export = {"onnx-asr": onnx_asr.export, "sherpa-onnx": sherpa_onnx.export}[client]
    try:
        export(loaded, head, folder, int8)
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from None
    print(f"head {head}, for {client}{', 8-bit weights' if int8 else ''}")
    print(f"wrote {folder}")


if __name__ == "__main__":
    sys.exit(main())
