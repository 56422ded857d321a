"""What a recipe will do, before it costs anything: against its start, or another recipe.

    python -m training.compare recipes/finetune.yaml                 # beside the pretrained model
    python -m training.compare recipes/finetune.yaml other.yaml
    python -m training.compare recipes/finetune.yaml model.nemo trainer.max_steps=2000

The pretrained model, each stage of the recipe and any number of others stand side by side, each
row with a status (same, changed, new, dangerous) and what it means. Then a checklist: rates beside
published ones, SpecAugment, weights, tokenizer, durations and lengths, memory and disk, and one
batch forward and backward. A check that fails ends with status 1; nothing is written but --html.
"""

import logging
import os
import sys
from pathlib import Path

from fastconformer import cli
from fastconformer.checkpoint.files import atomic_file
from fastconformer.checkpoint.read import read_checkpoint
from training.pages.comparison import checkpoint_facts, facts, meaning, planned_stages
from training.pages.decision import (
    Check,
    as_page,
    as_text,
    checklist,
    compare_columns,
    text_table,
)
from training.recipe.recipe import Recipe, load_recipe, recipe_differences
from training.setup.batch_search import settled
from training.setup.preflight import preflight
from training.setup.prepare import Prepared, prepare_run

RECIPES = (".yaml", ".yml", ".sh")


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


def show_comparison(
    recipe: Recipe, others: list[str | Recipe], names: list[str], html: Path | None = None
) -> bool:
    """Prints what the recipe amounts to beside its start and the others, what that means, and the
    checklist; whether all checks passed.

    Args:
        others: further recipes, and paths of checkpoints.
        names: what they are called.
        html: a file for the same as a page.
    """
    columns, runs = {}, {}
    start = recipe.model.init_from
    recipes = {
        name: other for name, other in zip(names, others, strict=True) if isinstance(other, Recipe)
    }
    checkpoints = {n: o for n, o in zip(names, others, strict=True) if not isinstance(o, Recipe)}
    if start is not None:
        checkpoints = {"pretrained": start} | checkpoints
    for name, path in checkpoints.items():
        columns[name] = checkpoint_facts(read_checkpoint(Path(path)).config)
    for name, other in recipes.items():
        columns |= {n: facts(run) for n, run in prepared_stages(other, name).items()}
    runs = prepared_stages(recipe, "this recipe")
    mine = {name: facts(run) for name, run in runs.items()}
    columns |= mine
    rows = compare_columns(columns, runs)
    checks = {}
    for name, run in runs.items():
        checks[name] = checklist(run, mine[name], start is not None)
        checks[name] += [Check(ok, text) for ok, text in preflight(run)]
    header, keys = differing_keys(recipe, recipes)
    print(as_text(columns, rows, checks))
    if recipes:
        same = "the recipes are the same"
        print("\n" + (text_table(keys, header) if keys else same))
    if html is not None:
        with atomic_file(html) as temporary:
            text = as_page(f"Before {recipe.output}", columns, rows, (header, keys), checks)
            temporary.write_text(text, encoding="utf-8")
        print(f"wrote {html}")
    return all(check.passed is not False for found in checks.values() for check in found)


def differing_keys(recipe: Recipe, recipes: dict[str, Recipe]) -> tuple[tuple, list[tuple]]:
    """(header, rows) of the recipe keys that any of the others has differently."""
    found: dict[str, dict[str, object]] = {}
    for name, other in recipes.items():
        for key, (theirs, mine) in recipe_differences(other, recipe).items():
            found.setdefault(key, {"this recipe": mine})[name] = theirs
    rows = [
        (
            key,
            *(short(values.get(n, values["this recipe"])) for n in (*recipes, "this recipe")),
            meaning(key),
        )
        for key, values in sorted(found.items())
    ]
    return ("key", *recipes, "this recipe", "which means"), rows


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser(
        "training.compare",
        "What a recipe changes, against its pretrained model or another recipe, what each change "
        "means, and whether the run can start.",
        "recipes/finetune.yaml other.yaml --html before.html",
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument(
        "other",
        nargs="*",
        metavar="OTHER | key=value",
        help="other recipes, folders or .nemo files, and overrides of the first recipe",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the same as a page")
    return cli.run("error", lambda: run(parser.parse_intermixed_args(arguments)))


def run(options) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    overrides = [
        item
        for item in options.other
        if ("=" in item or item.startswith("~")) and not os.path.exists(item)
    ]
    others = [item for item in options.other if item not in overrides]
    if options.html:
        cli.check_output(options.html, options.recipe, *others)
    with cli.usage():
        recipe = load_recipe(options.recipe, overrides)
        read = [load_recipe(p) if Path(p).suffix in RECIPES else p for p in others]
    names = ["other"] if len(others) == 1 else [f"other: {Path(p).stem}" for p in others]
    if len(set(names)) < len(names):
        names = [f"other {number}" for number in range(1, len(others) + 1)]
    return cli.run(
        "preflight failed", lambda: int(not show_comparison(recipe, read, names, options.html))
    )


if __name__ == "__main__":
    sys.exit(main())
