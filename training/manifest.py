"""Lhotse's cuts become a NeMo manifest.

    python -m training.manifest cuts.jsonl.gz -o corpus

Writes `corpus/manifest.jsonl`, which training, transcribe and evaluate take. It names audio where
that lies in files; other audio is written beside it, in `corpus/audio`. What cannot be used is
named on stderr, with its reason in `corpus/left_out.jsonl`.
"""

import importlib
import sys
from pathlib import Path

from fastconformer import cli

TOLD = 10  # of those that cannot be used, on stderr


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser(
        "training.manifest",
        "Make a NeMo manifest of Lhotse cuts or a Lhotse Shar folder.",
        "cuts.jsonl.gz -o corpus",
    )
    parser.add_argument("source", help="cuts (.jsonl, .jsonl.gz) or a Shar folder")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new folder"
    )
    parser.add_argument("--lang", help="the language of lines that have none")
    options = parser.parse_args(arguments)
    return cli.run("manifest", lambda: run(options))


def run(options) -> int:
    from training.corpora.written import write_manifest

    found = write_manifest(read_items(options), options.output, options.lang)
    for item in found.unusable[:TOLD]:
        cli.report("manifest", item.name, item.reason)
    if len(found.unusable) > TOLD:
        more = f"{len(found.unusable) - TOLD} more: {options.output / 'left_out.jsonl'}"
        print(f"manifest: and {more}", file=sys.stderr)
    if found.left_fields:
        names = ", ".join(sorted(found.left_fields))
        print(cli.one_line(f"manifest: fields that no line takes: {names}"), file=sys.stderr)
    print(
        f"{found.n_clips} clips, {found.seconds / 3600:.2f} hours, {found.n_files} audio files "
        f"written: {options.output / 'manifest.jsonl'}; {len(found.unusable)} left out"
    )
    return 0


def read_items(options):
    """What the source holds, item by item. FileNotFoundError, or ValueError of something else."""
    from training.corpora import lhotse_cuts

    path = Path(options.source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file() and ".jsonl" in path.suffixes:
        need("lhotse")
        return lhotse_cuts.read_cuts(path)
    if lhotse_cuts.is_shar(path):
        need("lhotse")
        return lhotse_cuts.read_shar(path)
    raise ValueError(f"{path} holds no Lhotse cuts (.jsonl, .jsonl.gz), and is no Shar folder")


def need(package: str) -> None:
    """ValueError: the package, or one that it takes for granted, is missing."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(
            f'{error.name} is not installed; pip install "fastconformer[data]"'
        ) from None


if __name__ == "__main__":
    sys.exit(main())
