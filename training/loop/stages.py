"""A whole recipe: its stages one after another, each from the best model of the one before."""

import contextlib
import logging
import time
from pathlib import Path

from fastconformer import load_model
from fastconformer.checkpoint.files import atomic_file
from fastconformer.checkpoint.folder import write_folder
from fastconformer.checkpoint.native import write_native
from fastconformer.checkpoint.read import read_checkpoint
from training.data.json_lines import append_line, json_line, read_lines
from training.data.sources import read_sets
from training.loop.console import Stopped
from training.loop.ranks import ONE, Ranks
from training.loop.run_folder import RunState, alone_in
from training.loop.train import summary, train_stage
from training.loop.validate import results_table, validate
from training.objective.objective import trained_heads
from training.recipe.recipe import Recipe, recipe_to_yaml, stage_recipes
from training.setup.device import choose_device

log = logging.getLogger("finetune")


def finetune(recipe: Recipe, ranks: Ranks = ONE, baseline: dict | None = None) -> RunState:
    """Run a recipe, stage after stage, to its end, or on from where its run folder stands.

    Args:
        baseline: the ledger's record of the model that was there before the first stage.
    Raises:
        ValueError, FileNotFoundError: the recipe's model or data cannot be used, or too many steps
            were not finite.
        Stopped: SIGINT or SIGTERM; a checkpoint is written before.
    """
    out = Path(recipe.output)
    with contextlib.ExitStack() as stack:
        if ranks.is_main:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone_in(out))
            with atomic_file(out / "recipe.yaml") as temporary:
                temporary.write_text(recipe_to_yaml(recipe), encoding="utf-8")
        entry = stack.enter_context(listed_run(out, ranks))
        if not recipe.stages:
            log.info("recipe, as resolved:\n%s", recipe_to_yaml(recipe))
            progress = train_stage(recipe, ranks, baseline, entry)
            measure_test(recipe, ranks)
            return progress
        for number, stage in enumerate(stage_recipes(recipe), start=1):
            log.info("stage %d of %d, in %s", number, len(recipe.stages), stage.output)
            progress = finetune(stage, ranks, baseline)
            baseline = progress.baseline
            entry |= summary(progress, stage)
        if ranks.is_main:
            gather_stages(out, stage_recipes(recipe))
        ranks.barrier()
        measure_test(recipe, ranks)
        return progress


def measure_test(recipe: Recipe, ranks: Ranks) -> None:
    """Error rates of `data.test`, of the model that is kept, into `test.json`; once a run."""
    out, trainer = Path(recipe.output), recipe.trainer
    path = out / "test.json"
    if not recipe.data.test or path.exists():
        return
    kept = out / "best" if (out / "best").is_dir() else out / "last"
    model = load_model(kept, choose_device(trainer.device))
    sets = read_sets(recipe.data.test, recipe.data, model.sample_rate)
    bf16 = trainer.precision == "bf16"
    heads = trained_heads(model, recipe.loss.heads)
    result = validate(model, sets, heads, recipe.data, bf16, lambda: None, ranks)
    del result["worst"]
    record = {"model": str(kept), "head": heads[0], "wer": result["all"][heads[0]]["wer"], **result}
    log.info("test, of %s:\n%s", kept, results_table(record))
    if ranks.is_main:
        with atomic_file(path) as temporary:
            temporary.write_text(json_line(record), encoding="utf-8")
    ranks.barrier()


def gather_stages(out: Path, stages: list[Recipe]) -> None:
    """The last stage's models, and all evaluations, where a run of one stage has them."""
    last = Path(stages[-1].output)
    for name in ("best", "last"):
        if (last / name).is_dir():
            write_folder(out / name, read_checkpoint(last / name))
    best = out / "best" if (last / "best").is_dir() else out / "last"
    archive = write_native(out, read_checkpoint(best))
    lines = []
    for number, stage in enumerate(stages, start=1):
        records = read_lines(Path(stage.output) / "ledger.jsonl")
        lines += [json_line({"stage": number} | record) for record in records]
    with atomic_file(out / "ledger.jsonl") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    log.info("all stages are done: %s is %s", archive, best)


@contextlib.contextmanager
def listed_run(out: Path, ranks: Ranks):
    """A line in `runs.jsonl`, beside the run folder, however the run ends; gives the dict to fill.
    Without "steps" in it nothing was done, and nothing is written."""
    entry = {"output": str(out), "status": "failed", "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        yield entry
        entry["status"] = "done"
    except (Stopped, KeyboardInterrupt):
        entry["status"] = "stopped"
        raise
    finally:
        if ranks.is_main and "steps" in entry:
            append_line(out.parent / "runs.jsonl", entry)
