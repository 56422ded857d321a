"""Attention to BiRWKV7 without text: the new time mixing learns from the attention it replaces.

    python -m training.distill recipes/birwkv7.yaml
    python -m training.finetune recipes/birwkv7.yaml model.init_from=runs/birwkv7_distilled/model

The teacher is the recipe's `model.init_from`, and stays as it is. Stage 1 (`distill.block_steps`):
each block, fed with what the teacher's attention is fed with, learns that attention's output.
Stage 2 (`distill.model_steps`): the student's encoder as a whole learns the teacher's encoder
output and, where a head has them, each frame's distribution over tokens; the heads stay. Both need
audio only: `data.train` as training.finetune takes it, with or without `text`, cut into batches and
changed by `augment` in the same way. Then comes normal fine-tuning.

The run folder, `distill.output` or `<output>_distilled`, holds `recipe.yaml`, `log.jsonl` (every
step), `ledger.jsonl` (error rates of teacher and student, where `data.validation` has text),
`checkpoint.pt` (for resuming: the same command goes on) and `model/` (the student). What is random
in a step follows from (seed, step).

Source: RADLADS (arXiv:2505.03005) and LoLCATs (arXiv:2410.10254) do so for language models.
"""

import logging
import os
import sys

from fastconformer import cli
from training.loop.console import Lines, Stopped
from training.loop.distill import distill
from training.recipe.recipe import load_recipe


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser(
        "training.distill",
        "Teach BiRWKV7 what a model's attention does, from audio without text.",
        "recipes/birwkv7.yaml distill.block_steps=2000   "
        "(the same command goes on where a run was stopped)",
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. trainer.seed=7")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[Lines()], force=True)
    return cli.run("error", lambda: run(options))


def run(options) -> int | None:
    with cli.usage():
        recipe = load_recipe(options.recipe, options.overrides)
    try:
        distill(recipe)
    except Stopped as stop:
        return stop.end()
    return None


if __name__ == "__main__":
    sys.exit(main())
