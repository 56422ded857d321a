"""Evaluations of a run: measured, written down, and kept where they are among the best."""

import json
import logging
import math
import time
from pathlib import Path

from fastconformer import ASRModel, load_model
from fastconformer.checkpoint.files import write_text
from fastconformer.checkpoint.folder import write_folder
from training.loop.keep import guard_holds, metrics_of
from training.loop.phases import PHASES, phase
from training.loop.run_folder import RunState, save_model, top_folder
from training.loop.validate import results_table, validate
from training.optim.average import average_checkpoints
from training.optim.ema import plain_checkpoint, plain_weights
from training.pages.report import write_report
from training.setup.run import Run

log = logging.getLogger("finetune")


def measure(run: Run, model: ASRModel, facts: dict, stop_early) -> dict:
    """Evaluate a model, and write it down; gives the ledger's record, `facts` in it."""
    progress, heads, guard = run.progress, run.objective.heads, run.recipe.guard
    log.info("step %d: evaluating", progress.step)
    result = validate(
        model,
        run.validation,
        heads,
        run.recipe.data,
        run.recipe.trainer.precision == "bf16",
        stop_early,
        run.ranks,
    )
    worst = result.pop("worst")
    record = ledger_record(progress, result, heads[0], run.started) | facts
    if progress.baseline is None:
        progress.baseline = run.baseline or record
    record["guard_holds"] = guard_holds(record, progress.baseline, guard)
    run.write("ledger.jsonl", record)
    log.info("step %d:\n%s", progress.step, results_table(record, progress.baseline))
    log.info("phase: %s (%s)", record["phase"], PHASES[record["phase"]])
    if run.ranks.is_main:
        write_text(run.out / "worst.json", json.dumps(worst, ensure_ascii=False))
    run.say("phase", record["phase"])
    run.say("worst", "\n\n".join(f"{w['said']}  \n→ {w['heard']}" for w in worst[:5]))
    if not record["guard_holds"]:
        log.info("%s is beyond guard.limit: not a candidate for best", guard.set)
    return record


def keep_evaluation(run: Run, stop_early) -> None:
    """Evaluate the model as it would be saved; keep it if it is among the best."""
    progress, keep, ranks = run.progress, run.recipe.keep, run.ranks
    with plain_weights(run.model, run.ema):
        run.parallel.gather_weights()
        record = measure(run, run.model, {}, stop_early)
        run.parallel.release_weights()
    if progress.kept.consider(record, keep, record["guard_holds"]):
        save_model(plain_checkpoint(run.model, run.ema), run.out / "best", ranks)
        progress.best = record
    if keep.top_k != 1 and progress.step in [number for _, _, number in progress.kept.top]:
        folder = top_folder(run.out, progress.step)
        save_model(plain_checkpoint(run.model, run.ema), folder, ranks)
    run.draw(metrics_of(record))
    progress.evaluated, progress.losses = progress.step, []
    progress.ended = progress.kept.reason_to_stop(keep, run.recipe.guard)
    if ranks.is_main:
        show_report(run.out)


def show_report(out: Path) -> None:
    """The page as it stands now; a run does not end for it."""
    try:
        write_report(out)
    except (ValueError, OSError, RuntimeError) as error:
        log.warning("no report.html: %s; python -m training.report makes it", error)


def keep_average(run: Run, stop_early) -> None:
    """The mean of the best models' weights becomes `best/` if it is better than all of them."""
    progress, metric, out = run.progress, run.recipe.keep.metric, run.out
    numbers = [number for _, _, number in progress.kept.top]
    if run.ranks.is_main:
        folders = [top_folder(out, number) for number in numbers]
        write_folder(out / "average", average_checkpoints(folders))
    run.ranks.barrier()
    model = load_model(out / "average", run.device)
    record = measure(run, model, {"average_of": numbers}, stop_early)
    now, before = (metrics_of(r).get(metric, math.inf) for r in (record, progress.best))
    better = record["guard_holds"] and (now, record["cer"]) < (before, progress.best["cer"])
    log.info(
        "average of %d: %s %.4f, the best single %.4f: %s",
        *(len(numbers), metric, now, before, "kept" if better else "not kept"),
    )
    if better:
        save_model(model.to_checkpoint(), out / "best", run.ranks)
        progress.best = record
    progress.averaged = True


def ledger_record(progress: RunState, result: dict, head: str, started: float) -> dict:
    losses = progress.losses
    return {
        "step": progress.step,
        "epoch": progress.epoch,
        "head": head,
        "wer": result["all"][head]["wer"],
        "cer": result["all"][head]["cer"],
        "sets": result["sets"],
        "all": result["all"],
        "train_loss": sum(losses) / len(losses) if losses else None,
        "skipped_steps": progress.skipped,
        "splits": progress.splits,
        "emission": round(result["emission"], 4),
        "phase": phase(result["all"][head]["wer"], result["emission"]),
        "heard_h": round(progress.heard_s / 3600, 4),
        "minutes": round((time.monotonic() - started) / 60, 3),
    }
