"""A Fun-ASR-Nano folder, as released or fine-tuned with FunASR, to a folder of ours."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastconformer import cli

if TYPE_CHECKING:
    from fastconformer.checkpoint.contents import Checkpoint


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = cli.parser("converters.funasr2st", __doc__, "Fun-ASR-Nano-2512 -o nano")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with config.yaml, model.pt")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder to write"
    )
    parser.add_argument(
        "--weights", default="model.pt", metavar="NAME", help="file of its tensors (%(default)s)"
    )
    parser.add_argument(
        "--like",
        type=Path,
        metavar="FOLDER",
        help="what it was trained from: tensors and tokenizers that it lacks come from there "
        "(FunASR's training leaves the language model out)",
    )
    args = parser.parse_args(argv)
    return cli.run("funasr2st", lambda: convert(args.folder, args.output, args.weights, args.like))


def convert(folder: Path, output: Path, weights: str = "model.pt", like: Path | None = None):
    """Reads, checks, writes; a bad folder writes nothing."""
    from fastconformer.checkpoint.contents import check_finite
    from fastconformer.checkpoint.folder import write_folder
    from fastconformer.checkpoint.funasr_folder import read_funasr

    checkpoint = read_funasr(folder, weights, like)
    try:
        check_finite(checkpoint.state_dict)
        summary = describe(checkpoint)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    write_folder(output, checkpoint)
    print(summary)
    print(f"wrote {output}")


def describe(checkpoint: "Checkpoint") -> str:
    """A line about the model. ValueError: its parts do not fit one another."""
    from fastconformer.funasr import fitted

    model, state = fitted(checkpoint)
    sizes = {}
    for name, tensor in state.items():
        part = name.partition(".")[0]
        sizes[part] = sizes.get(part, 0) + tensor.numel()
    if model.config.llm.tie_word_embeddings:  # stored twice
        sizes["llm"] -= state["llm.lm_head.weight"].numel()
    listed = ", ".join(f"{part} {size / 1e6:.2f} M" for part, size in sizes.items())
    return f"Fun-ASR-Nano, heads {' '.join(model.heads)}, {model.sample_rate} Hz: {listed}"


if __name__ == "__main__":
    sys.exit(main())
