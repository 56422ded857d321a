"""Speaks a corpus with eSpeak NG: sentences in, 16 kHz clips and a NeMo manifest out.

    python -m training.synthesize OUT --vocabulary quickstart --count 400 --seed 1
    python -m training.synthesize OUT --sentences text.txt --count 10000 --digits 1500 --jobs 2

Writes `OUT/manifest.jsonl` and `OUT/audio/NNNNNN.flac` (16-bit, mono). A corpus repeats bit for bit
from its texts and seed, with any number of processes.

Many voices: English accents x eSpeak's voice variants x speaking rate x pitch x a warp of the
sampling rate, which moves pitch and formants together as another throat would. Then, in numpy, a
room, a microphone, a telephone band and noise. `--voices heldout` takes voice variants and texts
that `--voices train` (the default) never uses.
"""

import argparse
import sys
from pathlib import Path

from fastconformer import cli
from training.speech.corpus import synthesize
from training.speech.texts import GRAMMARS, choose_texts


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.parser(
        "training.synthesize",
        "Speak a corpus with eSpeak NG: 16 kHz FLAC clips and a NeMo manifest.",
        "corpus --vocabulary quickstart --count 400",
    )
    parser.add_argument("out", type=Path, help="folder for manifest.jsonl and audio/")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--sentences",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="text files, a sentence a line; of a .tsv the last column",
    )
    source.add_argument("--vocabulary", choices=list(GRAMMARS), help="a built-in small grammar")
    parser.add_argument("--count", type=int, default=400, help="clips of sentences (%(default)s)")
    parser.add_argument("--digits", type=int, default=0, help="further clips of digits and numbers")
    parser.add_argument("--phrases", type=int, default=0, help="further clips of words and phrases")
    parser.add_argument("--hours", type=float, help="stop once this much audio is spoken")
    parser.add_argument("--max-words", type=int, default=16, help="longer sentences are cut (16)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same corpus (%(default)s)")
    parser.add_argument(
        "--voices",
        choices=["train", "heldout"],
        default="train",
        help="heldout: voices and sentences that `train` never uses",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    args = parser.parse_args(argv)
    if args.jobs < 1 or args.seed < 0 or args.max_words < 3:
        parser.error("--jobs must be at least 1, --seed 0, --max-words 3")
    if min(args.count, args.digits, args.phrases) < 0 or (args.hours or 1) <= 0:
        parser.error("--count, --digits and --phrases must not be negative, --hours positive")
    return args


def main(argv=None) -> int:
    return cli.run("synthesize", lambda: run(parse_arguments(argv)))


def run(args) -> None:
    try:
        texts = choose_texts(args)
        heldout = args.voices == "heldout"
        lang = GRAMMARS[args.vocabulary][0] if args.vocabulary else "en"
        entries = synthesize(args.out, texts, args.seed, heldout, args.jobs, args.hours, lang)
    except (ModuleNotFoundError, RuntimeError) as error:
        raise cli.Failed(str(error)) from None
    minutes = sum(entry["duration"] for entry in entries) / 60
    voices = len({entry["speaker"] for entry in entries})
    print(f"{len(entries)} clips, {minutes:.1f} min, {voices} voices: {args.out}/manifest.jsonl")


if __name__ == "__main__":
    sys.exit(main())
