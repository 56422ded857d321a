"""Columns beside one another, a status and a meaning for each row, and the checklist of a careful
person: what `training.compare` shows, as text and as a page."""

import dataclasses
import re

from training.pages.comparison import meaning
from training.pages.html import Markup, escape, page, table
from training.setup.prepare import Prepared

NOTES = {  # row: the recipe key whose difference it is
    "heads trained": "loss.heads",
    "front end": "model.sample_rate",
    "parameters that move": "freeze",
    "training audio": "data.train",
    "audio in a step": "data.batch",
    "steps": "trainer.max_steps",
    "epochs": "trainer.epochs",
    "audio heard": "trainer.max_steps",
    "highest lr": "optim.lr",
    "lowest lr": "schedule",
    "schedule": "schedule",
    "warm-up": "schedule",
    "optimizer": "optim.name",
    "betas": "optim",
    "weight decay": "optim",
    "most clips in a batch": "data.batch",
    "most seconds in a batch": "data.batch",
    "batches in a step": "trainer.accumulate",
    "precision": "trainer.precision",
    "frozen parts": "freeze",
    "longest clip, s": "data.max",
    "dropout": "model.dropout",
    "attention": "encoder",
    "pieces": "model.tokenizer",
    "sample rate": "model.sample_rate",
    "loss": "loss",
    "lattice cells left out": "loss.eps",
    "SpecAugment": "spec_augment",
    "other augmentation": "augment",
}
# Published ranges: NeMo's fine-tuning configuration has 1e-4, FastConformers are trained from
# scratch at 1e-3, and papers on a few hours of data stay below 3e-4.
HIGHEST_LR, HIGHEST_LR_FEW_HOURS, FEW_HOURS = 1e-3, 3e-4, 10.0
EPOCHS_WITHOUT_MASKS = 5  # more without SpecAugment learn the clips by heart


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing in every column ("" where a column does not tell it); status: same, changed, new
    (what the first column does not have) or dangerous."""

    what: str
    values: tuple[str, ...]
    status: str
    note: str


@dataclasses.dataclass(frozen=True)
class Check:
    passed: bool | None  # None: to be looked at, no reason to stop
    text: str


def compare_columns(columns: dict[str, dict[str, str]], runs: dict[str, Prepared]) -> list[Row]:
    """Rows of all columns, in the order of the fullest."""
    names = dict.fromkeys(name for name in NOTES if any(name in c for c in columns.values()))
    rows = []
    for name in names:
        values = tuple(column.get(name, "") for column in columns.values())
        told = [value for value in values if value]
        if len(set(told)) <= 1 and len(told) == len(values):
            status = "same"
        elif not values[0]:
            status = "new"
        else:
            status = "changed" if len(set(told)) > 1 else "same"
        if is_dangerous(name, values):
            status = "dangerous"
        note = "" if status != "dangerous" and len(set(told)) <= 1 else meaning(NOTES[name])
        rows.append(Row(name, values, status, note))
    return rows


def is_dangerous(what: str, values: tuple[str, ...]) -> bool:
    """Whether a row alone may ruin a run: a rate beyond what is published."""
    if what != "highest lr" or not values[-1]:
        return False
    return _rate(values[-1]) > 3 * HIGHEST_LR


def _rate(text: str) -> float:
    return float(re.match(r"[\d.e+-]+", text)[0])


def checklist(run: Prepared, facts: dict[str, str], is_trained: bool) -> list[Check]:
    """What a careful person looks at before a run, beside the preflight."""
    checks, recipe = [], run.recipe
    hours = float(run.train.durations_s.sum()) / 3600
    moving = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    checks.append(Check(moving > 0, f"{moving / 1e6:.2f} M parameters move"))
    rate, most = _rate(facts["highest lr"]), HIGHEST_LR
    if is_trained and hours < FEW_HOURS:
        most = HIGHEST_LR_FEW_HOURS
    text = f"highest rate {rate:.3g} for {hours:.2f} h of data; published: up to {most:g}"
    checks.append(Check(True if rate <= most else None, text))
    epochs, masked = float(facts["epochs"]), facts["SpecAugment"] != "none"
    text = "SpecAugment is on" if masked else f"no SpecAugment in {epochs:.1f} epochs"
    checks.append(Check(True if masked or epochs <= EPOCHS_WITHOUT_MASKS else None, text))
    if not recipe.data.validation:
        checks.append(Check(None, "nothing is measured: data.validation is empty"))
    return checks


def as_text(columns: dict, rows: list[Row], checks: dict[str, list[Check]]) -> str:
    """The whole comparison, for a terminal."""
    header = ("what it amounts to", *columns, "status", "which means")
    cells = [(row.what, *row.values, row.status, row.note) for row in rows]
    if len(columns) == 1:
        header = header[:2]
        cells = [row[:2] for row in cells]
    parts = [text_table(cells, header)]
    for name, found in checks.items():
        parts.append("\npreflight:" if len(checks) == 1 else f"\npreflight of {name}:")
        for check in found:
            word = {True: "ok", False: "FAIL", None: "look"}[check.passed]
            parts.append(f"  {word:4}  {check.text}")
    return "\n".join(parts)


def text_table(rows: list[tuple], header: tuple, widest: int = 44) -> str:
    rows = [tuple(map(str, row)) for row in (header, *rows)]
    widths = [min(widest, max(len(row[i]) for row in rows)) for i in range(len(header))]
    lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def as_page(
    title: str,
    columns: dict,
    rows: list[Row],
    keys: tuple[tuple, list[tuple]],
    checks: dict[str, list[Check]],
) -> str:
    """The same as a page of its own; `keys`: header and rows of the recipe keys that differ."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for name, found in checks.items():
        items = "".join(
            f'<li class="{ {True: "pass", False: "fail", None: "changed"}[c.passed] }">'
            f"{escape(c.text)}</li>"
            for c in found
        )
        parts += [f"<h2>Checklist of {escape(name)}</h2>", f"<ul>{items}</ul>"]
    header = ["what it amounts to", *columns, "status", "which means"]
    cells = [
        [row.what, *row.values, Markup(f'<b class="{row.status}">{row.status}</b>'), row.note]
        for row in rows
    ]
    parts += ["<h2>Side by side</h2>", table(header, cells)]
    if keys[1]:
        parts += ["<h2>Keys that differ</h2>", table(*keys)]
    return page(title, parts)
