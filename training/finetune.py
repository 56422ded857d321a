"""Fine-tune, or train from scratch: one recipe in, a run folder out.

    python -m training.finetune recipes/finetune.yaml
    python -m training.finetune recipes/finetune.yaml optim.lr=1e-4 output=runs/second
    torchrun --nproc-per-node 8 -m training.finetune recipes/finetune.yaml

The run folder holds `recipe.yaml` (resolved), `dropped.jsonl` (data that is left out, and why),
`log.jsonl` (every step), `ledger.jsonl` (every evaluation; the first is the untouched model),
`tensorboard/`, `checkpoints/` (for resuming), `best/`, `top/` and `last/` (model folders) and
`model.nemo` (the best), and `report.html`, made anew at every
evaluation. The same command goes on where a run was
stopped. A line about every run goes to `runs.jsonl` beside the run folder.

Everything random in a step follows from (seed, step), so that a resumed run repeats the unbroken
one bit for bit on a CPU with the same number of threads.
"""

import logging
import os
import sys
from pathlib import Path

from fastconformer import cli
from fastconformer.process_memory import is_out_of_memory
from training.loop.console import Lines, Stopped
from training.loop.evaluations import show_report
from training.loop.ranks import join, leave, lost_peer
from training.loop.stages import finetune
from training.recipe.recipe import load_recipe

log = logging.getLogger("finetune")

LOST = (
    "another process of this run, its machine or the network is gone; the last checkpoint stands: "
    "start the same command again, on as many processes as there are"
)


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser(
        "training.finetune",
        "Fine-tune a FastConformer, or train one from scratch, as a recipe says.",
        "recipes/finetune.yaml optim.lr=1e-4 output=runs/second   "
        "(the same command goes on where a run was stopped)",
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. trainer.seed=7")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    is_main = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if is_main else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[Lines()], force=True)
    who = "error" if is_main else f"error (process {os.environ['RANK']})"
    return cli.run(who, lambda: job(options, is_main))


def job(options, is_main: bool) -> int | None:
    with cli.usage():
        recipe = load_recipe(options.recipe, options.overrides)
    try:
        finetune(recipe, join())
    except Stopped as stop:
        return stop.end()
    except RuntimeError as error:
        if is_out_of_memory(error):  # outside of a step's passes, which are split
            words = " ".join(str(error).split())[:200]
            raise cli.Failed(f"{words}; lower data.batch_duration_s or batch_size") from None
        if not lost_peer(error):
            raise
        raise cli.Failed(LOST) from None
    except KeyboardInterrupt:  # the second Ctrl-C, or one before the first step
        print("interrupted; the last checkpoint stands", file=sys.stderr)
        return 130
    if is_main:
        show_report(Path(recipe.output))
        log.info("the run on one page: %s", Path(recipe.output) / "report.html")
    return None


if __name__ == "__main__":
    code = main()
    if code == 0:  # after an error torchrun ends the others; there is nobody to say goodbye to
        leave()
    sys.exit(code)
