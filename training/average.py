"""Average the weights of several checkpoints of one model.

    python -m training.average runs/a/top/step_00000800 runs/a/top/step_00001000 -o runs/a/average

Each is a model folder, a `.nemo` archive or a `.pt` checkpoint of a run (its moving average, where
it has one, with LoRA merged).
"""

import sys

from fastconformer import cli
from fastconformer.checkpoint.folder import write_folder
from training.optim.average import average_checkpoints


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser(
        "training.average",
        "Average the weights of checkpoints of one model into a model folder.",
        "runs/a/top/step_* -o runs/a/average",
    )
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="folder, .nemo, or a run's .pt"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER")
    parser.add_argument("--like", metavar="MODEL", help="of Lightning .ckpt: config and tokenizer")
    options = parser.parse_args(arguments)

    def job():
        write_folder(options.output, average_checkpoints(options.checkpoints, options.like))
        print(f"{options.output}: the average of {len(options.checkpoints)} checkpoints")

    return cli.run("error", job)


if __name__ == "__main__":
    sys.exit(main())
