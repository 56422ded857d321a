"""A converted folder to a NeMo archive that NeMo's restore_from takes."""

import gzip
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from converters import add_card_arguments, check, model_card
from fastconformer import cli

if TYPE_CHECKING:
    from torch import Tensor


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = cli.parser("converters.st2nemo", __doc__, "parakeet -o parakeet.nemo")
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
    parser.add_argument(
        "--half",
        action="store_true",
        help="under half the size: weights of 2 or more dimensions rounded to float16, which NeMo "
        "and load_model make float32 again, and the archive gzipped",
    )
    parser.add_argument(
        "--card",
        action="store_true",
        help="a README.md for the hub beside the archive, where there is none yet",
    )
    add_card_arguments(parser)
    args = parser.parse_args(argv)
    of_card = args.results, args.recipe, args.licence, args.base_model, args.languages
    if any(of_card) and not args.card:
        parser.error("--results, --recipe, --licence, --base-model, --languages are of a --card")
    folder = args.folder
    if folder.name in ("", ".."):  # "." has a name only as an absolute path
        folder = Path(os.path.abspath(folder))
    archive = args.output or folder.with_name(f"{folder.name}.nemo")

    def job():
        convert(args.folder, archive, args.half)
        if args.card:
            write_card(args, archive)

    return cli.run("st2nemo", job)


def write_card(args, archive: Path) -> None:
    """The archive's README.md; one that is there stays."""
    from fastconformer.checkpoint.files import write_text
    from fastconformer.checkpoint.read import read_checkpoint
    from fastconformer.config import ModelConfig

    config = ModelConfig.from_nemo(read_checkpoint(args.folder).config)
    path = archive.parent / "README.md"
    if path.exists():
        print(f"kept {path}")
        return
    write_text(path, model_card(args, args.folder, archive, config, config.heads[0], "nemo"))
    print(f"wrote {path}")


def convert(folder: Path, archive: Path, half: bool = False) -> None:
    """Reads, checks, writes; a bad folder writes nothing. `half`: see `halved`."""
    from fastconformer.checkpoint.native import write_for_nemo
    from fastconformer.checkpoint.read import read_checkpoint

    if folder.is_file():
        raise ValueError(f"{folder} is a file; expected a folder written by nemo2st")
    checkpoint = read_checkpoint(folder)
    try:
        summary = check(checkpoint)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if half:
        try:
            checkpoint.state_dict = halved(checkpoint.state_dict)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
    write_for_nemo(archive, checkpoint)
    if half:
        compress(archive)
    print(summary)
    print(f"wrote {archive}")


def halved(state_dict: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """float32 tensors of 2 or more dimensions as float16; all else as it is.

    Vectors stay: they take no room, and BatchNorm's variances and the norms' scales span more than
    float16 does. So does the front end, which is not learned. Both NeMo's load_state_dict and
    load_model copy into float32, so computing does not change, only the weights' rounding.

    Raises:
        ValueError: a weight is above float16's range.
    """
    import torch

    smaller = {}
    for name, tensor in state_dict.items():
        if tensor.dtype == torch.float32 and tensor.dim() > 1 and "preprocessor." not in name:
            tensor = tensor.half()
            if not tensor.isfinite().all():
                raise ValueError(f"tensor {name} is beyond float16's range; write without --half")
        smaller[name] = tensor
    return smaller


def compress(archive: Path) -> None:
    """gzips a file in place, whole or not at all; its bytes depend on the content alone. NeMo's
    restore_from reads an archive in either form."""
    from fastconformer.checkpoint.files import sync, work_folder

    with work_folder(archive.parent, archive.name) as work:
        smaller = work / "archive"
        with (
            archive.open("rb") as source,
            smaller.open("wb") as target,
            gzip.GzipFile("", "wb", compresslevel=9, fileobj=target, mtime=0) as zipped,
        ):
            shutil.copyfileobj(source, zipped, 1 << 20)
        sync(smaller)
        os.replace(smaller, archive)
        sync(archive.parent)


if __name__ == "__main__":
    sys.exit(main())
