"""The largest `data.batch_duration_s` that the device takes, found by trying.

    python -m training.find_batch recipes/finetune.yaml --write
    python -m training.find_batch recipes/finetune.yaml --memory-gb 24

`data.batch_duration_s: auto` does the same when a run starts (training/setup/batch_search.py).
"""

import dataclasses
import logging
import math
import re
import sys
from pathlib import Path

from fastconformer import cli
from fastconformer.checkpoint.files import atomic_file
from training.loop.console import Lines
from training.recipe.recipe import load_recipe
from training.setup.batch_search import find_for
from training.setup.prepare import prepare_run


def write_batch_duration(path: str | Path, seconds: float) -> None:
    """Set `data.batch_duration_s` in a recipe file; its comments and the rest stay.

    Raises:
        ValueError: the file is written in a way in which the place cannot be found.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    value = f"batch_duration_s: {seconds}"
    changed, count = re.subn(r"(?<![\w.])batch_duration_s:\s*[^\s,}#]+", value, text, count=1)
    if not count:  # at the head of the section, in either of YAML's two styles
        changed, count = re.subn(r"^data:\s*\{", f"data: {{{value}, ", text, count=1, flags=re.M)
    if not count:
        pattern = r"^(data:[ \t]*(?:#.*)?\n)((?:[ \t]*(?:#.*)?\n)*)([ \t]+)"
        changed, count = re.subn(pattern, rf"\1\2\3{value}\n\3", text, count=1, flags=re.M)
    before = load_recipe(path)
    expected = dataclasses.replace(
        before, data=dataclasses.replace(before.data, batch_duration_s=float(seconds))
    )
    with atomic_file(path) as temporary:
        temporary.write_text(changed, encoding="utf-8")
        if not count or load_recipe(temporary) != expected:
            raise ValueError(
                f"{path}: no place found to write data.batch_duration_s; add {value} to it by hand"
            )


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser(
        "training.find_batch",
        "Find the largest data.batch_duration_s that the device takes, on noise in the worst "
        "shapes that the recipe's data can make.",
        "my.yaml --memory-gb 24 --write",
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. optim.name=adamw8bit"
    )
    parser.add_argument(
        "--memory-gb", type=float, help="most memory, in 10^9 bytes; else: all free"
    )
    parser.add_argument(
        "--write", action="store_true", help="write the number into the recipe file"
    )
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[Lines()], force=True)
    return cli.run("error", lambda: run(options))


def run(options) -> None:
    memory_gb = options.memory_gb
    if memory_gb is not None and not 0 < memory_gb < math.inf:
        raise cli.UsageError(f"--memory-gb is {memory_gb}, expected more than 0")
    with cli.usage():
        # The value that is searched for need not be there; a search needs none.
        recipe = load_recipe(options.recipe, [*options.overrides, "data.batch_duration_s=auto"])
    found = find_for(prepare_run(recipe), memory_gb)
    print(f"data.batch_duration_s: {found:g}")
    if options.write:
        write_batch_duration(options.recipe, found)
        print(f"written into {options.recipe}")


if __name__ == "__main__":
    sys.exit(main())
