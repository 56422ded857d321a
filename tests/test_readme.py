"""What README, docs, Makefile and recipes promise: commands, snippets, links, keys, quickstart."""

import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import golden

from fastconformer import ModelConfig, load_model
from fastconformer.__main__ import COMMANDS
from fastconformer.checkpoint.folder import write_folder
from fastconformer.checkpoint.read import read_checkpoint
from training.recipe.recipe import Recipe, load_recipe
from training.setup.start import read_tokenizer, scratch_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "Makefile"]
MODELS = sorted(ROOT.glob("recipes/*_model.yaml"))
RECIPES = [path for path in sorted(ROOT.glob("recipes/*.yaml")) if path not in MODELS]
BASE = ROOT / "models" / "base_tiny.nemo"


MODULES = {name: home for group in COMMANDS.values() for name, (home, _) in group.items()}
LINE = re.compile(
    r"(?:    |\t)(?P<before>[^`]*\| |torchrun [^`]*)?"
    r"(?:(?:\$\(BIN\)/)?(?:python )?-m (?P<module>[\w.]+)|fastconformer (?P<name>\w+))"
    r" ?(?P<rest>.*)"
)


def commands(alone: bool = False) -> list[tuple[str, str, list[str]]]:
    """(page, module, arguments) of every `python -m ...` and `fastconformer ...` that stands on a
    line of its own; also behind a pipe or torchrun, unless they shall stand alone."""
    found = []
    for page in PAGES:
        text = re.sub(r" *\\\n\s*", " ", page.read_text(encoding="utf-8"))  # goes on below
        for line in text.splitlines():
            match = LINE.match(line)
            if not match or match["module"] in ("pip", "pytest", "venv"):
                continue
            if alone and match["before"]:
                continue
            arguments = re.sub(r"\$\((\w+)\)", r"\1", match["rest"])  # make's variables
            module = match["module"] or MODULES[match["name"]]
            found.append((page.name, module, shlex.split(arguments)))
    return found


@functools.cache
def help_of(module: str) -> str:
    """What `python -m module --help` prints."""
    printed = io.StringIO()
    main = importlib.import_module(module).main
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0, module
    return printed.getvalue()


def test_commands_and_their_options_exist():
    seen = commands()
    assert len(seen) > 60
    for page, module, arguments in seen:
        known = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", help_of(module)))
        for argument in arguments:
            if argument.startswith("-") and argument != "-":
                assert argument in known, f"{page}: {module} has no {argument}"
            elif module == "training.finetune" and "=" in argument:
                named = [a for a in arguments if a.startswith("recipes/")]
                load_recipe(ROOT / (named[0] if named else "recipes/finetune.yaml"), [argument])
            elif argument.startswith("recipes/"):
                assert (ROOT / argument).is_file(), f"{page}: there is no {argument}"


def test_every_flag_is_on_a_page():
    """Of the commands that `fastconformer` leads to; benchmarks have their own."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES[:-1])
    missing = [
        f"{module} {flag}"
        for module in sorted(set(MODULES.values()))
        for flag in re.findall(r"^  (?:-\w(?: \S+)?, )?(--[a-z][a-z0-9-]*)", help_of(module), re.M)
        if flag != "--help" and not re.search(rf"{flag}(?![\w-])", text)
    ]
    assert not missing, f"no page says what these do: {', '.join(missing)}"


def test_modules_in_text_exist():
    names = set()
    for page in PAGES:
        names |= set(re.findall(r"python -m ([a-z_.0-9]+)", page.read_text(encoding="utf-8")))
    for name in names - {"pip", "pytest", "venv"}:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name


def test_imports_in_pages_exist():
    seen = 0
    for page in PAGES[:-1]:
        for module, names in re.findall(r"^    from (\S+) import (.+)$", page.read_text(), re.M):
            found = importlib.import_module(module)
            for name in names.split("  #")[0].split(", "):
                assert hasattr(found, name.strip()), f"{page.name}: {module} has no {name}"
                seen += 1
    assert seen > 1


def test_extras_exist():
    """Those that pages, refusals and comments name, and what the refusals of a bare install say."""
    known = re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), re.M)
    sources = [*PAGES, ROOT / "Dockerfile", ROOT / "Makefile"]
    sources += [p for folder in ("fastconformer", "training", "converters", "benchmarks")
                for p in (ROOT / folder).rglob("*.py")]  # fmt: skip
    named = {}
    for path in sources:
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"(?:\bfastconformer|[ \"'`]\.)\[([a-z][a-z,]*)\]", text)
        found += re.findall(r"extra `(\w+)`", text)
        for name in ",".join(found).split(",") if found else ():
            named[name] = path.name
    assert named.keys() >= {"fast", "train", "serve", "export", "media", "hub", "eval", "llm"}
    assert not named.keys() - set(known), named


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES[:-1]:
        for target in re.findall(r"make ([a-z-]+)(?=[`\n ]*)", _code(page)):
            assert re.search(rf"^{target}:", makefile, re.M), f"{page.name}: make {target}"


def clone(folder: Path) -> None:
    """What the pages' commands find in a clone."""
    for name in ("recipes", "samples"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "models", folder / "models")  # a page writes there


RUNNABLE = {
    "fastconformer.transcribe",
    "fastconformer.evaluate",
    "converters.nemo2st",
    "converters.st2nemo",
    "converters.st2onnx",
    "converters.st2hf",
    "converters.st2mlx",
    "converters.hf2st",
    "converters.to_birwkv7",
    "converters.train_lm",
    "converters.funasr2st",
    "converters.st2funasr",
}
MODELS_OF_READERS = ("model.nemo", "parakeet.nemo", "before.nemo", "after.nemo")
SHORTER = {"samples/talk.ogg": "samples/espeak.wav", "cuda": "cpu", "bfloat16": "float32"}


def reader(folder: Path) -> None:
    """What someone has who reads the pages: a clone, a model, a few recordings and texts."""
    clone(folder)
    for name in (*MODELS_OF_READERS, "runs/finetune/model.nemo"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(folder / "models" / BASE.name)
    (folder / "canary.nemo").symlink_to(golden("canary_flash_agg") / "model.nemo")
    write_folder(folder / "runs" / "finetune" / "best", read_checkpoint(BASE))
    (folder / "Fun-ASR-Nano-2512").symlink_to(golden("fun_asr_nano_tiny"))
    lines = []
    for line in (ROOT / "samples" / "digits_8k.jsonl").read_text().splitlines()[:3]:
        entry = json.loads(line)
        path = ROOT / "samples" / entry["audio_filepath"]
        lines.append(json.dumps(entry | {"audio_filepath": str(path)}) + "\n")
        for name in ("recordings", "archive"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / path.name).symlink_to(path)
    for name in ("test.jsonl", "train.jsonl"):
        (folder / name).write_text("".join(lines))
    sentences = (ROOT / "samples" / "talk_sentences.jsonl").read_text().splitlines()
    (folder / "texts.txt").write_text("\n".join(json.loads(x)["text"] for x in sentences))
    (folder / "names.txt").write_text("newgate\nmister quilter\t2\n")


@pytest.mark.parametrize("page", [p.name for p in PAGES[:-1]])
def test_commands_run(page, tmp_path, monkeypatch, capsys):
    """Those that take seconds on a CPU, in the page's order; those that need a corpus or a run of
    training are left out."""
    reader(tmp_path)
    monkeypatch.chdir(tmp_path)
    for _, module, arguments in (c for c in commands(alone=True) if c[0] == page):
        written = {b for a, b in itertools.pairwise(arguments) if a in ("-o", "--output", "--out")}
        read = [a for a in arguments if a.startswith(("data/", "runs/")) and a not in written]
        if module not in RUNNABLE or not all(Path(a).exists() for a in read):
            continue
        words = [SHORTER.get(a, a) for a in arguments]
        status = importlib.import_module(module).main(words)
        assert not status, f"{page}: {module} {' '.join(words)}: {capsys.readouterr().err}"


def _code(page: Path) -> str:
    """The indented lines and the `inline` code of a page."""
    text = page.read_text(encoding="utf-8")
    return "\n".join([*re.findall(r"^    (.*)$", text, re.M), *re.findall(r"`([^`\n]+)`", text)])


def test_the_tree_is_the_tree():
    """A line for each file of the packages, and none for another; add what is missing where a
    reader would look for it."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("### File by file")[1]
    listed, above = [], []
    for indent, name, text in re.findall(r"^    ( *)(\S+) +(\S.*)$", section.split("###")[0], re.M):
        above = [*above[: len(indent) // 2], name]
        listed.append("".join(above))
        assert text.strip(), name
    packages = {name.split("/")[0] for name in listed}
    there = [p.relative_to(ROOT) for package in packages for p in (ROOT / package).rglob("*.py")]
    there = {str(p.parent) + "/" if p.name == "__init__.py" else str(p) for p in there}
    assert len(listed) == len(set(listed)) and len(packages) == 5
    assert sorted(there - set(listed)) == [], "README.md lacks these"
    assert sorted(set(listed) - there) == [], "README.md lists these, which are not there"


def test_every_page_is_listed():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [p.name for p in PAGES[1:-1] if f"(docs/{p.name})" not in readme]
    assert not missing, f"README.md does not list {missing}"


def test_links_lead_somewhere():
    pages = [*PAGES[:-1], *ROOT.glob("*/README.md"), *ROOT.glob("tests/*/README.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not link.startswith("https:"):
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_python_snippets_run(tmp_path, monkeypatch, capsys):
    """With what a clone has, and nothing else in the folder."""
    clone(tmp_path)
    monkeypatch.chdir(tmp_path)
    n_snippets = 0
    for page in PAGES[:-1]:
        for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
            (tmp_path / "snippet.py").write_text(snippet)
            runpy.run_path(str(tmp_path / "snippet.py"))
            n_snippets += 1
    assert n_snippets
    text, *words = capsys.readouterr().out.splitlines()
    assert text == "the evidence indicates that he continued"
    assert len(words) == len(text.split())
    assert all(re.fullmatch(r"\d+\.\d\d-\d+\.\d\d s  \S+", word) for word in words)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_load(path):
    recipe = load_recipe(path)
    assert recipe.output.startswith("runs/")


def test_scratch_models_are_models(tmp_path):
    files = load_model(golden("hybrid_tdt_ctc_bpe") / "model.nemo").tokenizer_files
    (tmp_path / "tokenizer.model").write_bytes(files["tokenizer.model"])
    assert MODELS
    for path in MODELS:
        config, _ = scratch_config(str(path), *read_tokenizer(str(tmp_path)))
        assert ModelConfig.from_nemo(config).heads == ("tdt", "ctc")


def test_the_key_table_is_the_recipe():
    """docs/finetuning.md names every key, in the recipe's order, with its default."""
    page = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    section = page.split("## Every key")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| (.*?) ?\|", section, re.M)
    expected = {}

    def walk(tree: dict, prefix: str):
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                expected[prefix + key] = list(value) if isinstance(value, tuple) else value

    walk(dataclasses.asdict(Recipe()), "")
    assert [key for key, _ in rows] == list(expected)
    for key, default in rows:
        if default not in ("", "checkpoint's"):
            found = yaml.safe_load(default.strip("`"))
            found = float(found) if isinstance(expected[key], float) else found  # 1e-08
            assert found == expected[key], key
        else:
            assert expected[key] in (None, ""), key


def test_the_base_is_small_and_loads():
    assert BASE.is_file(), "models/base_tiny.nemo is missing: docs/base-checkpoint.md makes it"
    assert BASE.stat().st_size <= 8_000_000
    model = load_model(BASE)
    assert model.heads == ("tdt", "ctc") and model.tokenizer.vocab_size == 128


@pytest.mark.slow
def test_a_new_language_from_a_clone(tmp_path, monkeypatch):
    """The commands of docs/new-language.md's scenario A with few clips, and two steps."""
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed")
    clone(tmp_path)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "new-language.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    python -m (\S+) (.*)$", page.split("## B:")[0], re.M)
    assert len(lines) == 8
    for module, words in lines:
        words = (
            re.sub(r"--count \d+", "--count 60", words).replace("--size 128", "--size 90").split()
        )
        if module == "training.finetune":
            words += ["trainer.max_steps=2", "schedule.warmup_steps=1", "trainer.val_every_steps=2"]
        assert not importlib.import_module(module).main(words), f"{module} {words}"
    assert load_model("runs/new_language/model.nemo").tokenizer.vocab_size > 128


@pytest.mark.slow
def test_quickstart(tmp_path):
    """`make quickstart` from end to end, with 40 steps; the environment is this one."""
    if not BASE.is_file():
        pytest.skip("models/base_tiny.nemo is not here")
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "recipes").mkdir()
    recipe = (ROOT / "recipes" / "quickstart.yaml").read_text()
    recipe, n_changed = re.subn(r"max_steps: \d+", "max_steps: 40", recipe)
    assert n_changed == 1
    (tmp_path / "recipes" / "quickstart.yaml").write_text(recipe)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".quickstart-installed").touch()  # newer than what it depends on
    command = ["make", "quickstart", f"BIN={Path(sys.executable).parent}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / "quickstart"
    comparison = json.loads((run / "after.json").read_text())["comparison"]
    assert comparison["wer_after"] < comparison["wer_before"]
    assert re.search(r"WER basic: [\d.]+ % before, [\d.]+ % after", done.stdout)
    assert re.search(r"^000000 1 \d+\.\d+ \d+\.\d+ [a-z']+$", done.stdout, re.M)
    assert load_model(run / "model" / "model.nemo").heads == ("tdt", "ctc")
