"""Data sets of Lhotse and Hugging Face become a NeMo manifest.

    python -m training.manifest cuts.jsonl.gz -o corpus
    python -m training.manifest owner/name --split train --lang nl -o corpus

Writes `corpus/manifest.jsonl`, which training, transcribe and evaluate take. It names audio where
that lies in files; other audio is written beside it, in `corpus/audio`. What cannot be used is
named on stderr, with its reason in `corpus/left_out.jsonl`.
"""

import dataclasses
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fastconformer import cli

TOLD = 10  # of those that cannot be used, on stderr
EVERY_S = 1.0


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser(
        "training.manifest",
        "Make a NeMo manifest of Lhotse cuts or of a Hugging Face data set.",
        "cuts.jsonl.gz -o corpus",
    )
    parser.add_argument(
        "source",
        help="cuts (.jsonl, .jsonl.gz), a Shar folder, a folder of save_to_disk, parquet or arrow "
        "files, or a name of the Hugging Face hub",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new folder"
    )
    parser.add_argument("--lang", help="the language of lines that have none")
    group = parser.add_argument_group("Hugging Face data sets")
    group.add_argument("--split", help="such as train (the only one)")
    group.add_argument("--config", help="of several under a name of the hub")
    group.add_argument("--audio-column", metavar="NAME", help="(the only one of audio)")
    group.add_argument(
        "--text-column",
        metavar="NAME",
        help="(text, sentence, transcription, transcript, normalized_text: the first there)",
    )
    group.add_argument("--lang-column", metavar="NAME", help="(lang, where there is one)")
    options = parser.parse_args(arguments)
    return cli.run("manifest", lambda: run(options))


def run(options) -> int:
    from training.corpora.written import write_manifest

    found = write_manifest(counted(read_items(options)), options.output, options.lang)
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


def read_items(options) -> Iterator:
    """What the source holds, item by item. FileNotFoundError, or ValueError of something else."""
    from training.corpora import hugging_face, lhotse_cuts

    path = Path(options.source)
    asked = {f.name: getattr(options, f.name) for f in dataclasses.fields(hugging_face.Wanted)}
    is_file = path.is_file() and ".jsonl" in path.suffixes
    if not is_file and not lhotse_cuts.is_shar(path) and hugging_face.is_dataset(options.source):
        need("datasets")
        return hugging_face.read_dataset(options.source, hugging_face.Wanted(**asked))
    given = [name.replace("_", "-") for name, value in asked.items() if value is not None]
    if given:
        raise cli.UsageError(f"--{given[0]} is for Hugging Face data sets, {path} is none")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not is_file and not lhotse_cuts.is_shar(path):
        raise ValueError(
            f"{path} is no file of Lhotse cuts (.jsonl, .jsonl.gz), no Shar folder and no Hugging "
            "Face data set"
        )
    need("lhotse")
    return lhotse_cuts.read_cuts(path) if is_file else lhotse_cuts.read_shar(path)


def counted(items: Iterator) -> Iterator:
    """The items; on a terminal a line tells how many there were so far."""
    if not sys.stderr.isatty():
        yield from items
        return
    told = time.monotonic()
    try:
        for number, item in enumerate(items, start=1):
            yield item
            if time.monotonic() - told > EVERY_S:
                told = time.monotonic()
                print(f"\r\033[K{number} items", end="", file=sys.stderr, flush=True)
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


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
