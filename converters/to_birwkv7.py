"""A model with self-attention to one with BiRWKV7: position encodings go, all else stays.

The new time mixing starts from the attention's projections (--random: from RWKV-7's own initial
values) and has to be trained: `python -m training.distill`, or fine-tuning.
"""

import argparse
import sys
from pathlib import Path

from converters import check
from fastconformer import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = cli.parser("converters.to_birwkv7", __doc__, "parakeet.nemo -o parakeet_birwkv7")
    parser.add_argument(
        "model", type=Path, metavar="FOLDER|model.nemo", help="converted folder or NeMo archive"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="folder to write, or an archive if it ends in .nemo",
    )
    parser.add_argument("--random", action="store_true", help="take nothing from the attention")
    parser.add_argument(
        "--head-size", type=int, metavar="N", help="width of the heads (default: 64 if it fits)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is random (%(default)s)")
    args = parser.parse_args(argv)
    return cli.run("to_birwkv7", lambda: convert(args))


def convert(args: argparse.Namespace) -> None:
    """Reads, converts, checks, writes; a bad model writes nothing."""
    from fastconformer.checkpoint.folder import write_folder
    from fastconformer.checkpoint.nemo_archive import write_nemo
    from fastconformer.checkpoint.read import read_checkpoint
    from fastconformer.surgery.birwkv7 import to_birwkv7

    checkpoint = read_checkpoint(args.model)
    try:
        check(checkpoint)
        checkpoint = to_birwkv7(checkpoint, not args.random, args.head_size, args.seed)
        summary = check(checkpoint)
    except ValueError as error:
        raise ValueError(f"{args.model}: {error}") from error
    (write_nemo if args.output.suffix == ".nemo" else write_folder)(args.output, checkpoint)
    print(summary)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    sys.exit(main())
