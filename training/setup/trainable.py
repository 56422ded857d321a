"""What of a model is trained, as a user sees it: the table before step 0, and the watch over
gradients that should be there and are not."""

import re

import torch

from fastconformer import ASRModel
from training.setup.freeze import Freezing, ancestors


def parameter_table(model: ASRModel, freezing: Freezing, optimizer) -> list[dict]:
    """Rows of the table before step 0: {"module", "parameters", "trainable" (their numbers), "lr",
    "decay" (lists of the groups' values), "note"}; every parameter is in one row, encoder layers
    that are alike share one, and the last row is the sum."""
    groups = {
        name: (group["peak_lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["names"]
    }
    rows = {}
    for name, parameter in model.named_parameters():
        row = rows.setdefault(
            re.match(r"encoder\.layers\.\d+|encoder\.[^.]+|[^.]+", name)[0],
            {"parameters": 0, "trainable": 0, "lr": set(), "decay": set(), "from": set()},
        )
        row["parameters"] += parameter.numel()
        first = freezing.parameters[name]
        row["from"].add(first)
        if first is not None:
            row["trainable"] += parameter.numel()
            row["lr"].add(groups[name][0])
            row["decay"].add(groups[name][1])
    merged = []  # (first path, last path, row)
    for path, row in rows.items():
        layer = re.fullmatch(r"encoder\.layers\.\d+", path)
        if (
            layer
            and merged
            and merged[-1][0].startswith("encoder.layers.")
            and merged[-1][2] == row
        ):
            merged[-1] = (merged[-1][0], path, row)
        else:
            merged.append((path, path, row))
    table = []
    for first, last, row in merged:
        count = 1 + (int(last.split(".")[2]) - int(first.split(".")[2]) if first != last else 0)
        later = sorted(step for step in row["from"] if step)
        notes = [f"from step {', '.join(map(str, later))}"] if later else []
        if any(path in ancestors(first) for path in freezing.unused):
            notes.append("unused by this loss")
        elif row["trainable"] == 0:
            notes.append("frozen")
        table.append(
            {
                "module": first if first == last else f"{first}-{last.split('.')[2]}",
                "parameters": count * row["parameters"],
                "trainable": count * row["trainable"],
                "lr": sorted(row["lr"]),
                "decay": sorted(row["decay"]),
                "note": ", ".join(notes),
            }
        )
    total = {key: sum(row[key] for row in table) for key in ("parameters", "trainable")}
    return [*table, {"module": "all", **total, "lr": [], "decay": [], "note": ""}]


def format_table(rows: list[dict]) -> str:
    """`parameter_table` as text; ranges of rates as lowest - highest."""

    def span(values: list[float]) -> str:
        ends = values if len(values) < 2 else (values[0], values[-1])
        return " - ".join(f"{value:.3g}" for value in ends)

    cells = [("module", "parameters", "trainable", "lr", "decay", "")]
    for row in rows:
        numbers = (f"{row['parameters']:,}", f"{row['trainable']:,}")
        cells.append((row["module"], *numbers, span(row["lr"]), span(row["decay"]), row["note"]))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for module, *numbers, note in cells:
        columns = [f"{n:>{w}}" for n, w in zip(numbers, widths[1:-1], strict=True)]
        lines.append("  ".join([f"{module:<{widths[0]}}", *columns, note]).rstrip())
    return "\n".join(lines) + "\n"


class GradientWatch:
    """Finds parameters that should move and get no gradient, in a run's first steps and after each
    unfreezing. A gradient that is missing shows at once; one that is all zeros may be a skipped
    layer or the start of LoRA, and is believed after `patience` steps."""

    def __init__(self, model: ASRModel, patience: int = 10):
        self.model, self.patience = model, patience
        self.watched: frozenset[str] = frozenset()
        self.silent: set[str] = set()
        self.left = 0

    def check(self) -> None:
        """To be called after each backward pass that was finite, before gradients are cleared.

        Raises:
            ValueError: names the parameters.
        """
        moving = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if not moving.keys() <= self.watched:
            self.watched, self.silent = frozenset(moving), set(moving)
            self.left = self.patience
        if not self.left:
            return
        self.left -= 1
        missing = [name for name, parameter in moving.items() if parameter.grad is None]
        if missing:
            raise ValueError(_no_gradient(missing, "no gradient at all"))
        self.silent &= moving.keys()
        if self.silent:
            names = sorted(self.silent)
            counts = [moving[name].grad.count_nonzero() for name in names]
            counts = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in counts]
            counts = torch.stack(counts).tolist()  # one wait for the device
            self.silent -= {name for name, count in zip(names, counts, strict=True) if count}
        if not self.silent:
            self.left = 0
        elif not self.left:
            silent = [name for name in moving if name in self.silent]
            raise ValueError(_no_gradient(silent, f"only zeros in {self.patience} steps"))


def _no_gradient(names: list[str], what: str) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{', '.join(names[:3])}{more}: trainable, but the loss gives {what}; freeze it "
        "(freeze.modules) or train the head that needs it (loss.heads)"
    )
