"""Which evaluation is the best: any logged metric, the guard against forgetting, patience.

Works on records, the lines of `ledger.jsonl`: {"wer", "cer", "train_loss", "sets": {set: {head:
{"wer", "cer"}}}, "all": {head: {"wer", "cer"}}, ...}; writes nothing.
"""

import dataclasses
import math

from training.recipe.sections import GuardRecipe, KeepRecipe

RATES = ("wer", "cer", "raw_wer", "raw_cer")  # raw: beside the manifest's text as it stands


def metrics_of(record: dict) -> dict[str, float]:
    """{"wer", "cer", "train_loss", "wer/SET/HEAD", "cer/SET/HEAD", "raw_wer/SET/HEAD" ...}; SET
    "all": all together."""
    metrics = {name: record[name] for name in ("wer", "cer", "train_loss")}
    for name, heads in {**record["sets"], "all": record["all"]}.items():
        for head, rates in heads.items():
            metrics |= {f"{kind}/{name}/{head}": rate for kind, rate in rates.items()}
    return {name: value for name, value in metrics.items() if value is not None}


def check_metric(metric: str, sets, heads) -> None:
    """Before a run: raises ValueError for a metric that its evaluations will not have."""
    known = ["wer", "cer", "train_loss"]
    known += [f"{kind}/{s}/{h}" for s in (*sets, "all") for h in heads for kind in RATES]
    if metric not in known:
        raise ValueError(f"keep.metric is {metric!r}; this run logs {', '.join(known)}")


def guard_holds(record: dict, baseline: dict, guard: GuardRecipe) -> bool:
    """Whether the guarded set's WER, of the run's first head, is within its limit of the untouched
    model's."""
    if guard.set is None:
        return True
    now, before = (r["sets"][guard.set][record["head"]]["wer"] for r in (record, baseline))
    return now <= highest_wer(before, guard) + 1e-12  # equal is within, however it was rounded


def highest_wer(before: float, guard: GuardRecipe) -> float:
    """What the guard allows where the untouched model's WER is `before`."""
    return before * (1 + guard.limit) if guard.relative else before + guard.limit


@dataclasses.dataclass
class Kept:
    """The evaluations that stay, and what early stopping counts; part of every checkpoint.

    top: [metric, CER, step] of the best, best first. stale: evaluations since the best got better
    by min_delta; mark: the value it was then. broken: evaluations in a row beyond the guard.
    """

    top: list = dataclasses.field(default_factory=list)
    stale: int = 0
    mark: float | None = None
    broken: int = 0

    def consider(self, record: dict, keep: KeepRecipe, holds: bool) -> bool:
        """Take an evaluation in if it is among the best; gives whether it is the best of all."""
        metrics = metrics_of(record)
        self.broken = 0 if holds else self.broken + 1
        value = metrics.get(keep.metric, math.inf)  # the untouched model has no training loss
        candidate = [value, record["cer"], record["step"]]
        if holds:
            self.top = sorted([*self.top, candidate])[: keep.top_k]  # a tie: the earlier one
        is_best = holds and self.top[0] == candidate
        if is_best and (self.mark is None or value < self.mark - keep.min_delta):
            self.mark, self.stale = value, 0
        else:
            self.stale += 1
        return is_best

    def reason_to_stop(self, keep: KeepRecipe, guard: GuardRecipe) -> str | None:
        """Why the run ends here, or None."""
        if keep.patience is not None and self.stale >= keep.patience:
            return f"{keep.metric} has not become better for {self.stale} evaluations"
        if guard.stop_after is not None and self.broken >= guard.stop_after:
            return f"{guard.set} was beyond its limit for {self.broken} evaluations"
        return None
