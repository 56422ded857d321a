"""One self-contained page about a run: `report.html` in its folder, written at every evaluation and
at the end of `training.finetune`, and made again by this command.

    python -m training.report runs/finetune
    python -m training.report runs/finetune --worst 30 -o finetune.html

Charts of the error rates and of the loss with the baseline and the guard as lines, the phase that
the model is in, the worst utterances aligned with players for their audio, what data was left out,
and the settings. Nothing is loaded from elsewhere: the audio is in the page.
"""

import sys
from pathlib import Path

from fastconformer import cli
from training.pages.report import write_report


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser("training.report", "One self-contained page about a run.", "runs/finetune")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--worst", type=int, default=15, help="utterances that are shown (15)")
    parser.add_argument("-o", "--output", type=Path, help="RUN/report.html")
    options = parser.parse_args(arguments)
    if options.worst < 0:
        parser.error(f"--worst is {options.worst}, expected 0 or more")

    def job():
        if options.output:
            cli.check_output(options.output)
        print(f"wrote {write_report(options.run, options.output, options.worst)}")

    return cli.run("error", job)


if __name__ == "__main__":
    sys.exit(main())
