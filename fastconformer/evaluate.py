"""Error rates of a model on a manifest: `python -m fastconformer.evaluate MANIFEST --model M`.

    python -m fastconformer.evaluate test.jsonl --model before.nemo --output before.json
    python -m fastconformer.evaluate test.jsonl --model after.nemo --against before.json

Corpus WER and CER (total errors over total words), of the texts as they are (raw) and under a named
normaliser; insertions, deletions, substitutions, empty outputs. Lines and audio that cannot be used
are skipped, counted and listed. `--against` an older result file names the utterances that were
lost and won, and says whether the difference may be chance.
"""

import argparse
import json
import sys
from pathlib import Path

from . import cli
from .checkpoint.files import write_text
from .formats.manifest import read_manifest
from .jobs.scores import (
    LISTED,
    check_comparable,
    compare,
    comparison_table,
    evaluate,
    read_results,
    table,
)
from .text.metrics import NORMALIZERS, normalize


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.parser(
        "fastconformer.evaluate",
        "Word and character error rates of a model on a manifest.",
        "test.jsonl --model model.nemo --output after.json --against before.json",
    )
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="JSON lines with text")
    cli.add_model_arguments(parser)
    cli.add_decoding_arguments(parser)
    parser.add_argument("--lang", help="only lines of this `lang` (or without one)")
    parser.add_argument(
        "--normalizer",
        choices=sorted(NORMALIZERS),
        default="basic",
        help="for the second pair of rates (%(default)s: NFKC, lower case, no punctuation)",
    )
    parser.add_argument("-o", "--output", type=Path, help="result file (JSON), an entry a clip")
    parser.add_argument("--against", type=Path, help="an older result file to compare with")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    return cli.run("evaluate", lambda: run(parse_arguments(argv)))


def run(args) -> int:
    if args.output:
        cli.check_output(args.output, args.manifest, args.model)
    normalize("", args.normalizer)  # it may need a package
    clips, left_out = read_manifest(args.manifest, args.lang)
    old = read_results(args.against) if args.against else None
    if old:  # what the manifest lacks, no transcription will bring
        check_comparable(clips, old)
    model = cli.load_model(args)
    decoding = cli.decoding_options(args, model)
    results = evaluate(model, clips, args.head, args.batch_size, args.normalizer, **decoding)
    bad = [line for line in left_out if not line.is_wanted]
    results["skipped"][:0] = [{"audio": line.place, "reason": line.detail} for line in bad]
    results["n_skipped"] = len(results["skipped"])
    results["n_skipme"] = sum(line.reason == "skipme" for line in left_out)
    results = {"manifest": str(args.manifest), "model": str(args.model)} | results
    for skipped in results["skipped"][:LISTED]:
        cli.report("evaluate: skipped", skipped["audio"], skipped["reason"])
    if len(results["skipped"]) > LISTED:
        print(f"evaluate: skipped {len(results['skipped']) - LISTED} more", file=sys.stderr)
    _write(args.output, results)  # before anything that may fail on the older result
    if not results["utterances"]:
        raise ValueError(f"{args.manifest}: no utterance could be evaluated")
    print(table(results))
    if old:
        results["comparison"] = compare(results, old, args.normalizer) | {
            "against": str(args.against)
        }
        _write(args.output, results)
        print(comparison_table(results["comparison"]))
    return 0


def _write(path: Path | None, results: dict):
    if path:
        write_text(path, json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
