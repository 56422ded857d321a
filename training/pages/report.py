"""The page about a run, made from what lies in its folder: at every evaluation and at the end.

No model is loaded: rates come from `ledger.jsonl`, the worst utterances from `worst.json`.
"""

import base64
import io
import json
import math
from collections import Counter
from pathlib import Path

import soundfile

from fastconformer.audio.files import load_audio
from fastconformer.checkpoint.files import write_text
from fastconformer.text.metrics import align
from training.data.json_lines import read_lines
from training.loop.keep import highest_wer, metrics_of
from training.loop.phases import PHASES
from training.pages.html import Markup, chart, escape, facts, folded, page, smoothed, table
from training.recipe.recipe import Recipe, load_recipe, recipe_differences, recipe_to_yaml

PLAYER_HZ = 16000


def write_report(run: Path, path: Path | None = None, n_worst: int = 15) -> Path:
    """Writes RUN/report.html, or `path`; gives the file.

    Raises:
        FileNotFoundError, ValueError: the folder is not that of a run.
    """
    text = report(run, n_worst)
    path = path or run / "report.html"
    write_text(path, text)
    return path


def report(run: Path, n_worst: int = 15) -> str:
    """The page, as HTML. Raises as `write_report`."""
    if not (run / "recipe.yaml").is_file():
        raise FileNotFoundError(f"{run} has no recipe.yaml; give the folder of a run")
    recipe = load_recipe(run / "recipe.yaml")
    stages = sorted(run.glob("stage_*")) or [run]
    traces = ("run.json", "log.jsonl", "ledger.jsonl")
    if not any((folder / name).is_file() for folder in stages for name in traces):
        raise FileNotFoundError(f"{run} has a recipe.yaml and no run; start it, or give another")
    log, ledger, dropped = [], [], []
    for number, folder in enumerate(stages, start=1):
        before = log[-1]["at"] if log else 0  # steps of the stages before
        log += [line | {"at": before + line["step"]} for line in read_lines(folder / "log.jsonl")]
        lines = read_lines(folder / "ledger.jsonl")
        ledger += [line | {"at": before + line["step"], "stage": number} for line in lines]
        dropped += read_lines(folder / "dropped.jsonl")
    about = _read_json(stages[-1] / "run.json") or {}
    parts = [f"<h1>{escape(run)}</h1>", facts(headline(recipe, ledger, about))]
    if ledger:
        parts += [_phase(ledger[-1]), "<h2>Error rates</h2>", *_rates(recipe, ledger)]
    parts += ["<h2>Training</h2>", *_training(log)]
    worst = _read_json(stages[-1] / "worst.json") or []
    if worst:
        parts += ["<h2>Worst utterances</h2>", _worst(worst[:n_worst])]
    counts = Counter(item["reason"] for item in dropped).most_common()
    parts.append("<h2>Data left out</h2>")
    parts.append(table(["reason", "lines"], counts) if counts else "<p>Nothing.</p>")
    parts += ["<h2>Settings</h2>", *_settings(recipe)]
    for folder in stages:
        if (folder / "trainable.txt").exists():
            text = (folder / "trainable.txt").read_text(encoding="utf-8")
            title = "What is trained" + (f", {folder.name}" if len(stages) > 1 else "")
            parts.append(folded(title, f"<pre>{escape(text)}</pre>"))
    return page(run.name, parts)


def _read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def headline(recipe: Recipe, ledger: list[dict], about: dict) -> list[tuple[str, str]]:
    """(what, value) of a run in a line."""
    found = []
    if ledger:
        best = best_record(ledger, recipe.keep.metric)
        first, last = ledger[0], ledger[-1]
        found += [
            ("best WER so far", f"{100 * best['wer']:.2f} % at step {best['at']}"),
            ("before", f"{100 * first['wer']:.2f} %"),
            ("steps", f"{last['at']}"),
            ("minutes", f"{sum_of_last(ledger, 'minutes'):.1f}"),
            ("hours heard", f"{sum_of_last(ledger, 'heard_h'):.2f}"),
        ]
    found.append(("seed", str(recipe.trainer.seed)))
    found += [(name, str(about[name])) for name in ("device", "version", "torch") if name in about]
    return found


def sum_of_last(ledger: list[dict], name: str) -> float:
    """Of each stage the last record's value, added up."""
    last = {record["stage"]: record.get(name) or 0.0 for record in ledger}
    return sum(last.values())


def best_record(ledger: list[dict], metric: str) -> dict:
    """The record that the run kept as its best, by `training.loop.keep`, in the last stage."""

    def rank(record):
        value = metrics_of(record).get(metric, math.inf)
        return not record["guard_holds"], value, record["cer"], record["step"]

    stage = ledger[-1].get("stage")
    return min((record for record in ledger if record.get("stage") == stage), key=rank)


def _phase(record: dict) -> str:
    name = record.get("phase")
    if name is None:
        return ""
    return f"<p>The model's phase is <b>{escape(name)}</b>: {escape(PHASES[name])}.</p>"


def _rates(recipe: Recipe, ledger: list[dict]) -> list[str]:
    best, first, last = best_record(ledger, recipe.keep.metric), ledger[0], ledger[-1]
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in ledger:
        for name, heads in record["sets"].items():
            for head, rates in heads.items():
                point = (record["at"], 100 * rates["wer"])
                curves.setdefault(f"{name} {head}", []).append(point)
    marks = {"before, all": 100 * first["wer"]}
    guard = recipe.guard
    if guard.set is not None and guard.set in first["sets"]:
        before = first["sets"][guard.set][first["head"]]["wer"]
        marks[f"guard of {guard.set}"] = 100 * highest_wer(before, guard)
    rows = []
    for name in (*best["sets"], "all"):
        for head in best["all"]:
            records = [r["all"] if name == "all" else r["sets"][name] for r in (first, best, last)]
            # a head that another stage trained was not asked in this one
            rates = [r.get(head, {}).get(k) for r in records for k in ("wer", "cer")]
            cells = ["" if rate is None else f"{100 * rate:.2f}" for rate in rates]
            rows.append([name, head, *cells])
    header = ["set", "head", "WER before", "CER", f"WER at step {best['step']}, best", "CER"]
    header += [f"WER at step {last['step']}, last", "CER"]
    return [table(header, rows), chart("WER, %", curves, marks)]


def _training(log: list[dict]) -> list[str]:
    """Charts of the loss and its parts, the rate and the gradient."""
    parts = []
    known = ("step", "at", "epoch", "lr", "grad_norm", "splits", "clips", "active_share")
    names = dict.fromkeys(name for line in log for name in line if name not in known)
    losses = {n: [(r["at"], r[n]) for r in log if r.get(n) is not None] for n in names}
    losses = {name: smoothed(points) for name, points in losses.items() if points}
    parts.append(chart("Loss", losses, dots=False))
    for name, title in (("lr", "Learning rate"), ("grad_norm", "Gradient norm before clipping")):
        points = [(r["at"], r[name]) for r in log if r.get(name) is not None]
        parts.append(chart(title, {name: smoothed(points)} if points else {}, dots=False))
    return parts if any(parts) else ["<p>No step yet.</p>"]


def aligned(reference: str, hypothesis: str) -> Markup:
    """Words of both: what was said and not heard struck out, what was heard and not said marked."""
    words = []
    for edit in align(reference.split(), hypothesis.split()):
        said, heard = escape(edit.reference or ""), escape(edit.hypothesis or "")
        if said == heard:
            words.append(said)
            continue
        struck = f"<del>{said}</del>" if said else ""
        words.append(f"{struck} <ins>{heard}</ins>".strip() if heard else struck)
    return Markup(" ".join(words))


def _worst(worst: list[dict]) -> str:
    rows = []
    for item in worst:
        text = aligned(item["said"], item["heard"])
        if item["text"] != item["said"]:
            text += f'<br><span class="dim">in the manifest: {escape(item["text"])}</span>'
        rows.append([item["errors"], item["name"], Markup(text), player(item)])
    note = '<p class="dim">struck out: said, not heard; coloured: heard, not said</p>'
    return note + table(["errors", "clip", "said and heard", "audio"], rows)


def player(item: dict) -> Markup:
    """The clip as an audio element that holds it; a dash where it cannot be read now."""
    if item.get("tar"):
        return Markup("in a tar")
    try:
        seconds = item["duration"] if item["offset"] is not None else None
        channel = tuple(item.get("channel") or ()) or None
        samples = load_audio(item["audio"], PLAYER_HZ, item["offset"] or 0.0, seconds, channel)
    except (OSError, ValueError):
        return Markup("&ndash;")
    data = io.BytesIO()
    soundfile.write(data, samples, PLAYER_HZ, format="FLAC", subtype="PCM_16")
    coded = base64.b64encode(data.getvalue()).decode()
    source = f"data:audio/flac;base64,{coded}"
    return Markup(f'<audio controls preload="none" src="{source}"></audio>')


def _settings(recipe: Recipe) -> list[str]:
    """The settings that differ from the defaults, and all of them, folded."""
    changed = recipe_differences(Recipe(), recipe)
    rows = [(name, value) for name, (_, value) in changed.items() if value is not None]
    everything = f"<pre>{escape(recipe_to_yaml(recipe))}</pre>"
    return [table(["key", "value"], rows), folded("All settings", everything)]
