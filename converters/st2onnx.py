"""A model to a folder of ONNX files that onnx-asr or sherpa-onnx loads."""

import sys
from pathlib import Path

from converters import load_exportable
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
    parser.add_argument(
        "--offline",
        action="store_true",
        help="for sherpa-onnx: a cache-aware model for the OfflineRecognizer, not the online one",
    )
    parser.add_argument(
        "--look-ahead",
        type=int,
        metavar="FRAMES",
        help="of a cache-aware model, in encoder frames: one that it was trained with "
        "(default: its first)",
    )
    parser.add_argument(
        "--target-lang",
        metavar="NAME",
        help="of a model that is told a language behind its encoder: this one for good (default: "
        "the client chooses where it can, sherpa-onnx's OnlineRecognizer; else auto)",
    )
    args = parser.parse_args(argv)
    if args.offline and args.client != "sherpa-onnx":
        parser.error("--offline is for sherpa-onnx; onnx-asr takes whole recordings in any case")
    return cli.run("st2onnx", lambda: convert(args))


def convert(args) -> None:
    """Loads, checks, writes."""
    from fastconformer.export import onnx_asr, sherpa_onnx
    from fastconformer.surgery.language import with_language
    from fastconformer.surgery.look_ahead import with_look_ahead

    model = load_exportable(args.model)
    with cli.usage("--"):
        head = model.head(args.head).name
    with cli.usage():
        model = with_language(with_look_ahead(model, args.look_ahead), args.target_lang)
    try:
        if args.client == "onnx-asr":
            onnx_asr.export(model, head, args.output, args.int8)
        else:
            sherpa_onnx.export(model, head, args.output, args.int8, args.offline)
    except ValueError as error:
        raise ValueError(f"{args.model}: {error}") from None
    print(f"head {head}, for {args.client}{', 8-bit weights' if args.int8 else ''}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    sys.exit(main())
