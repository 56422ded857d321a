"""What a recipe will do, before it costs anything: against its start, or another recipe.

    python -m training.compare recipes/finetune.yaml                 # beside the pretrained model
    python -m training.compare recipes/finetune.yaml other.yaml
    python -m training.compare recipes/finetune.yaml model.nemo trainer.max_steps=2000

First what differs and what each difference means. Then a preflight of the recipe: the weights
load, the tokenizer covers the text, durations and lengths fit, memory and disk suffice, and one
batch goes forward and backward. A check that fails ends with status 1; nothing is written.
"""

import logging
import os
import sys
from pathlib import Path

from fastconformer import cli
from fastconformer.checkpoint.read import read_checkpoint
from training.pages.comparison import beside_checkpoint, facts, meaning, planned_stages
from training.recipe.recipe import Recipe, load_recipe, recipe_differences
from training.setup.batch_search import settled
from training.setup.preflight import preflight
from training.setup.prepare import Prepared, prepare_run


def text_table(rows: list[tuple], header: tuple) -> str:
    rows = [tuple(map(str, row)) for row in (header, *rows)]
    widths = [min(44, max(len(row[i]) for row in rows)) for i in range(len(header))]
    lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def short(value) -> str:
    text = str(value)
    return text if len(text) <= 44 else text[:41] + "..."


def prepared_stages(recipe: Recipe, name: str) -> dict[str, Prepared]:
    """{column: the prepared run} of a recipe's stages; one column where it has none.

    Raises what the run itself would raise. `data.batch_duration_s: auto` becomes a number.
    """
    stages = planned_stages(recipe)
    runs = [settled(prepare_run(stage)) for stage in stages]
    if len(runs) == 1:
        return {name: runs[0]}
    return {f"{name}, stage {number}": run for number, run in enumerate(runs, start=1)}


def show_comparison(recipe: Recipe, other: Recipe | None, checkpoint: Path | None) -> bool:
    """Prints what differs and the preflight; whether all checks passed."""
    mine = prepared_stages(recipe, "this recipe")
    others = {} if other is None else prepared_stages(other, "other")
    columns = {name: facts(run) for name, run in (others | mine).items()}
    names = next(iter(columns.values()))
    rows = [(name, *(column[name] for column in columns.values())) for name in names]
    print(text_table(rows, ("what it amounts to", *columns)))
    if other is not None:
        differences = recipe_differences(other, recipe).items()
        rows = [(key, short(a), short(b), meaning(key)) for key, (a, b) in differences]
        header = ("key", "other", "this recipe", "which means")
        print("\n" + (text_table(rows, header) if rows else "the recipes are the same"))
    elif checkpoint is not None:
        first = next(iter(mine.values()))
        rows = beside_checkpoint(first, read_checkpoint(checkpoint).config)
        header = ("what", "the checkpoint's", "this recipe", "which means")
        same = "nothing differs from what the checkpoint's config says of its training"
        print(f"\nbeside {checkpoint}:\n" + (text_table(rows, header) if rows else same))
    passed = True
    for name, run in mine.items():
        print("\npreflight:" if len(mine) == 1 else f"\npreflight of {name}:")
        for ok, text in preflight(run):
            passed &= ok
            print(f"  {'ok  ' if ok else 'FAIL'}  {text}")
    return passed


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser(
        "training.compare",
        "What a recipe changes, against its pretrained model or another recipe, what each change "
        "means, and whether the run can start.",
        "recipes/finetune.yaml other.yaml",
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument(
        "other",
        nargs="*",
        metavar="OTHER | key=value",
        help="another recipe, folder or .nemo, and overrides of the first recipe",
    )
    return cli.run("error", lambda: run(parser.parse_args(arguments)))


def run(options) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    overrides = [
        item
        for item in options.other
        if ("=" in item or item.startswith("~")) and not os.path.exists(item)
    ]
    others = [item for item in options.other if item not in overrides]
    try:
        if len(others) > 1:
            raise ValueError(f"compares two things, got {', '.join(others)} beside the recipe")
        recipe = load_recipe(options.recipe, overrides)
        is_recipe = others and Path(others[0]).suffix in (".yaml", ".yml", ".sh")
        other = load_recipe(others[0]) if is_recipe else None
    except (ValueError, FileNotFoundError) as error:
        raise cli.UsageError(str(error)) from None
    start = recipe.model.init_from
    checkpoint = Path(others[0]) if others and not is_recipe else start and Path(start)
    return cli.run(
        "preflight failed", lambda: int(not show_comparison(recipe, other, checkpoint or None))
    )


if __name__ == "__main__":
    sys.exit(main())
