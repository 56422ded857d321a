"""A Fun-ASR-Nano folder of ours to one that FunASR's AutoModel loads, the language model inside."""

import sys
from pathlib import Path

from converters.funasr2st import describe
from fastconformer import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = cli.parser("converters.st2funasr", __doc__, "runs/telephone_llm/model -o phone-nano")
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="folder from funasr2st, training or model.save"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="new folder to write"
    )
    args = parser.parse_args(argv)
    return cli.run("st2funasr", lambda: convert(args.folder, args.output))


def convert(folder: Path, output: Path) -> None:
    """Reads, checks, writes; a bad folder writes nothing."""
    from fastconformer.checkpoint.funasr_folder import write_funasr
    from fastconformer.checkpoint.read import read_checkpoint

    if output.exists():
        raise ValueError(f"{output} is there already; give the name of a new folder")
    checkpoint = read_checkpoint(folder)
    if checkpoint.kind != "funasr":
        raise ValueError(f"{folder} is no Fun-ASR-Nano model; see converters.st2nemo")
    try:
        summary = describe(checkpoint)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    kept = checkpoint.config["frontend_conf"].pop("mel_high_hz", None)
    if kept is not None:  # None: FunASR spreads its filters in the same way
        # FunASR has no such front end: its own at the rate for which the filters were made is the
        # nearest, audio is resampled to it, and nothing is above half of the old rate
        print(
            f"the front end keeps the filters of {2 * kept:.0f} Hz: FunASR will resample to that "
            "rate, and hear its resampler's leftovers above "
            f"{checkpoint.config['frontend_conf']['fs'] // 2} Hz"
        )
        checkpoint.config["frontend_conf"]["fs"] = int(2 * kept)
    write_funasr(output, checkpoint)
    print(summary)
    print(f"wrote {output}")


if __name__ == "__main__":
    sys.exit(main())
