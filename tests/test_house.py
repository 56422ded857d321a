"""The house, from the code's own imports: which way they fall, no circles, and files that one reads
in a sitting. docs/where-does-it-go.md says it in words."""

import ast
import statistics
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fastconformer", "training", "converters", "benchmarks", "rwkv_cuda")
ALLOWED = {  # beside itself
    "rwkv_cuda": set(),
    "fastconformer": {"rwkv_cuda"},
    "training": {"fastconformer", "rwkv_cuda"},
    "converters": {"fastconformer", "rwkv_cuda"},
    "benchmarks": {"fastconformer", "rwkv_cuda", "training", "converters"},
}
# Rooms of the library from the top down; what stands on a line may import what stands on it or
# below. Commands are the files with `main`.
STORIES = (
    {"COMMANDS"},
    {"cli", "serving", "export"},
    {"jobs"},
    {"formats", "load", "metrics", "timestamps", "tokenizer"},
    {"model", "funasr"},
    {"heads", "recordings"},
    {"decoding", "losses", "surgery"},
    {"checkpoint"},
    {"networks", "audio"},
    {"config", "text", "compiled", "process_memory", "transfers"},
)
HEADS = {"ctc", "rnnt", "tdt", "aed", "llm"}


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for path in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def for_types_only(node: ast.AST) -> bool:
    test = getattr(node, "test", None)
    return isinstance(node, ast.If) and getattr(test, "id", None) == "TYPE_CHECKING"


def nodes(module: str):
    """All of a file's nodes but what only a type checker reads."""
    left = [tree(module)]
    while left:
        node = left.pop()
        yield node
        if not for_types_only(node):
            left += ast.iter_child_nodes(node)


@cache
def imported(module: str) -> frozenset[str]:
    """Modules of ours that a file imports, at its top or in its functions."""
    is_package = modules()[module].name == "__init__.py"
    package = module.split(".") if is_package else module.split(".")[:-1]
    names = set()
    for node in nodes(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            names |= {name if name in modules() else base for name in inner}
    return frozenset(n for n in names if n in modules() and n != module)


def is_command(module: str) -> bool:
    body = tree(module).body
    return any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in body)


def story(module: str) -> int:
    room = "COMMANDS" if is_command(module) else module.split(".")[1]
    found = [i for i, rooms in enumerate(STORIES) if room in rooms]
    assert found, f"{module}: no story of STORIES has the room {room!r}"
    return found[0]


def test_no_file_imports_one_that_imports_it():
    """Nor in a longer circle: files are taken away whose imports have all gone before."""
    left = {module: set(imported(module)) for module in modules()}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    circle = {m: sorted(needs & left.keys()) for m, needs in left.items()}
    assert not circle, f"these import one another: {circle}"


def test_packages_import_downwards():
    wrong = [
        f"{module} imports {other}"
        for module in modules()
        for other in imported(module)
        if other.split(".")[0] not in ALLOWED[module.split(".")[0]] | {module.split(".")[0]}
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_of_the_library_import_downwards():
    ours = [m for m in modules() if m.startswith("fastconformer.")]
    wrong = [
        f"{module} imports {other}"
        for module in ours
        for other in imported(module)
        if other.startswith("fastconformer.") and story(other) < story(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_but_commands_imports_a_command():
    """What another file would import from a command belongs elsewhere."""
    ours = [m for m in modules() if m.split(".")[0] in ("fastconformer", "training", "converters")]
    wrong = [
        f"{module} imports {other}"
        for module in ours
        for other in imported(module)
        if other in ours and is_command(other) and not is_command(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_recipes_are_read_without_what_runs_them():
    wrong = [
        f"{module} imports {other}"
        for module in modules()
        if module.startswith("training.recipe")
        for other in imported(module)
        if other.startswith("training.") and not other.startswith("training.recipe")
    ]
    assert not wrong, "\n".join(wrong)


def test_files_are_read_in_a_sitting():
    lengths = {
        module: len(path.read_text(encoding="utf-8").splitlines())
        for module, path in modules().items()
    }
    long = {module: n for module, n in lengths.items() if n > 500}
    assert not long, f"past 500 lines there is a second idea inside: {long}"
    measured = [n for m, n in lengths.items() if not m.startswith("benchmarks")]
    assert statistics.median(measured) <= 250


def test_files_say_what_they_are():
    silent = [m for m in modules() if tree(m).body and not ast.get_docstring(tree(m))]
    assert not silent


def names_a_head(node: ast.expr) -> bool:
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(names_a_head(x) for x in node.elts)
    return isinstance(node, ast.Constant) and node.value in HEADS


def compares_heads(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        return any(names_a_head(x) for x in (node.left, *node.comparators))
    return isinstance(node, ast.MatchValue) and names_a_head(node.value)


@pytest.mark.parametrize("package", ["fastconformer", "training", "converters"])
def test_nobody_asks_for_a_heads_name(package):
    """Outside the heads' own room and the configuration: heads are asked for what they can."""
    wrong = [
        f"{module}:{node.lineno}"
        for module in modules()
        if module.split(".")[0] == package
        and not module.startswith(("fastconformer.heads", "fastconformer.config"))
        for node in nodes(module)
        if compares_heads(node)
    ]
    assert not wrong, f"these compare a head's name: {', '.join(wrong)}"


ANY_MODEL = ["recordings", "formats", "jobs", "serving"]


@pytest.mark.parametrize(
    "room", [*(f"fastconformer.{room}" for room in ANY_MODEL), "training.loop"]
)
def test_functions_take_any_model(room):
    """They know what a model offers, not of which class it is."""
    classes = {"fastconformer.model", "fastconformer.funasr"}
    wrong = [m for m in modules() if m.startswith(room) and classes & imported(m)]
    assert not wrong
