"""One self-contained page about a finished run: `python -m training.report RUN`, and `report.html`
at the end of every `training.finetune`.

    python -m training.report runs/finetune
    python -m training.report runs/finetune --clips 300 -o finetune.html

Curves of the loss and of WER, a table of every validation set before and after, the phase that the
model is in, the worst utterances aligned in colour with players for their audio, what data was left
out, the recipe and the versions. The utterances come from the run's `model.nemo`, which transcribes
its validation sets again. Nothing is loaded from elsewhere: the audio is in the page.
"""

import base64
import contextlib
import html
import io
import math
import platform
import sys
from collections import Counter
from pathlib import Path

import soundfile
import torch

from fastconformer import cli, load_model
from fastconformer.audio.files import load_audio
from fastconformer.checkpoint.files import atomic_file
from fastconformer.checkpoint.native import native_model
from fastconformer.text.metrics import align
from training.data.json_lines import read_lines
from training.data.utterances import Utterance, read_utterances
from training.loop.keep import metrics_of
from training.loop.validate import as_written
from training.recipe.recipe import Recipe, load_recipe

COLOURS = {"insertion": "#c50", "deletion": "#a00", "substitution": "#06c"}
PHASES = (
    ("random characters", "it writes pieces that have little to do with the audio; go on"),
    ("mute", "it has learnt that silence costs least, as every model does on its way; wait"),
    ("basic", "frequent words come out; most are still wrong"),
    ("major vocabulary", "most common words are right; rare ones and endings are not"),
    ("convergence", "what is left are names, rare words and noise; watch for overfitting"),
)
WIDTH, HEIGHT, MARGIN = 560, 200, 40


def phase(wer: float, emission: float) -> tuple[str, str]:
    """(name, advice) of where a training stands.

    Args:
        wer: share of words that are wrong.
        emission: characters that the model writes, over those that were said.
    """
    if emission < 0.25:
        return PHASES[1]
    if wer > 0.9:
        return PHASES[0]
    if wer > 0.5:
        return PHASES[2]
    return PHASES[3] if wer > 0.2 else PHASES[4]


def curve(title: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """An SVG of lines {name: [(step, value), ...]}; empty where there is nothing to draw."""
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return ""
    right = max(x for points in lines.values() for x, _ in points) or 1
    top = max(y for points in lines.values() for _, y in points) or 1
    colours = ("#06c", "#c50", "#080", "#a0a", "#a00", "#088", "#660", "#333")
    parts = [f'<svg width="{WIDTH}" height="{HEIGHT + 18 * len(lines)}" role="img">']
    parts.append(f'<text x="{MARGIN}" y="14">{html.escape(title)}</text>')
    for share in (0, 0.5, 1):
        y = HEIGHT - 20 - share * (HEIGHT - 50)
        parts.append(f'<line x1="{MARGIN}" x2="{WIDTH - 10}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="2" y="{y + 4}">{share * top:.3g}</text>')
    for i, (name, points) in enumerate(lines.items()):
        xy = " ".join(
            f"{MARGIN + x / right * (WIDTH - MARGIN - 10):.1f},"
            f"{HEIGHT - 20 - y / top * (HEIGHT - 50):.1f}"
            for x, y in points
        )
        colour = colours[i % len(colours)]
        parts.append(f'<polyline points="{xy}" fill="none" stroke="{colour}"/>')
        label = f"{html.escape(name)}: {points[-1][1]:.4g} at step {points[-1][0]:.0f}"
        parts.append(
            f'<text x="{MARGIN}" y="{HEIGHT + 14 + 18 * i}" fill="{colour}">{label}</text>'
        )
    return "".join([*parts, "</svg>"])


def smoothed(points: list[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """Means over equal pieces, at most `most` of them."""
    size = -(-len(points) // most)
    pieces = [points[i : i + size] for i in range(0, len(points), size)]
    return [(piece[-1][0], sum(y for _, y in piece) / len(piece)) for piece in pieces]


def aligned(reference: str, hypothesis: str) -> str:
    """Words of both, in colour where they differ."""
    words = []
    for edit in align(reference.split(), hypothesis.split()):
        said, heard = (html.escape(word or "") for word in (edit.reference, edit.hypothesis))
        if said == heard:
            words.append(said)
            continue
        kind = "substitution" if said and heard else "deletion" if said else "insertion"
        text = f"<s>{said}</s> {heard}".strip() if said else f"<u>{heard}</u>"
        words.append(f'<span style="color:{COLOURS[kind]}">{text}</span>')
    return " ".join(words)


def as_in_manifest(utterance: Utterance, written: str) -> str:
    """The manifest's own text, where the tokenizer cannot write it."""
    if utterance.text == written:
        return ""
    return f"<br><small>in the manifest: {html.escape(utterance.text)}</small>"


def player(utterance: Utterance, sample_rate_hz: int) -> str:
    """The clip as an audio element that holds it."""
    if utterance.tar_member is not None:
        return "in a tar"
    samples = load_audio(
        utterance.audio_path, sample_rate_hz, utterance.offset_s or 0.0, utterance.duration_s
    )
    data = io.BytesIO()
    soundfile.write(data, samples, sample_rate_hz, format="FLAC", subtype="PCM_16")
    coded = base64.b64encode(data.getvalue()).decode()
    return f'<audio controls preload="none" src="data:audio/flac;base64,{coded}"></audio>'


def table(rows: list[list], header: list[str]) -> str:
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def results(ledger: list[dict], metric: str) -> str:
    """WER and CER of every set and head: before, best by `keep.metric` in the last stage, last."""

    def rank(record):  # as training.loop.keep chooses
        value = metrics_of(record).get(metric, math.inf)
        return not record["guard_holds"], value, record["cer"], record["step"]

    stage = ledger[-1].get("stage")
    best = min((record for record in ledger if record.get("stage") == stage), key=rank)
    rows = []
    for name in (*best["sets"], "all"):
        for head in best["all"]:
            # an earlier stage may not have trained this head: before is when it was first measured
            first = next(r for r in ledger if head in r["all"] and name in (*r["sets"], "all"))
            found = [r["all"] if name == "all" else r["sets"][name] for r in (first, best)]
            found.append(ledger[-1]["all"] if name == "all" else ledger[-1]["sets"][name])
            cells = [f"{100 * r[head][k]:.2f}" for r in found for k in ("wer", "cer")]
            rows.append([name, head, *cells])
    header = ["set", "head", "WER before", "CER", f"WER at step {best['step']}, best", "CER"]
    return table(rows, [*header, f"WER at step {ledger[-1]['step']}, last", "CER"])


def worst_utterances(model, recipe: Recipe, n_clips: int, n_worst: int) -> tuple[str, str]:
    """(the phase, a table of the clips with the most errors) over the validation sets."""
    found, said, heard = [], 0, 0
    for manifest in recipe.data.validation.values():
        utterances, clips = [], []
        for u in read_utterances(manifest, recipe.data.lang)[0][:n_clips]:
            with contextlib.suppress(OSError, ValueError):  # the run has told of these
                seconds = (u.offset_s or 0.0, u.duration_s)
                clips.append(load_audio(u.audio_path, model.sample_rate, *seconds))
                utterances.append(u)
        for utterance, transcript in zip(utterances, model.transcribe(clips), strict=True):
            written = as_written(model.tokenizer, utterance)
            edits = align(written.split(), transcript.text.split())
            errors = sum(edit.reference != edit.hypothesis for edit in edits)
            found.append((errors, utterance, written, transcript.text))
            said, heard = said + len(written), heard + len(transcript.text)
    words = sum(len(written.split()) for _, _, written, _ in found)
    name, advice = phase(sum(e for e, *_ in found) / max(1, words), heard / max(1, said))
    found.sort(key=lambda item: -item[0])
    rows = "".join(
        f"<tr><td>{errors}</td>"
        f"<td>{aligned(written, text)}{as_in_manifest(utterance, written)}</td>"
        f"<td>{player(utterance, model.sample_rate)}</td></tr>"
        for errors, utterance, written, text in found[:n_worst]
    )
    heading = "<tr><th>errors</th><th>said and heard</th><th>audio</th></tr>"
    return f"<b>{name}</b>: {advice}", f"<table>{heading}{rows}</table>"


def report(run: Path, n_clips: int = 100, n_worst: int = 15) -> str:
    """The page, as HTML.

    Raises:
        FileNotFoundError, ValueError: the folder is not that of a finished run.
    """
    archive = native_model(run)
    recipe = load_recipe(run / "recipe.yaml")
    ledger, log = read_lines(run / "ledger.jsonl"), read_lines(run / "log.jsonl")
    dropped = read_lines(run / "dropped.jsonl")
    for stage in sorted(run.glob("stage_*")):
        log += read_lines(stage / "log.jsonl")
        dropped += read_lines(stage / "dropped.jsonl")
    model = load_model(archive)
    sections = [f"<h1>{html.escape(str(run))}</h1>"]
    if ledger:
        state, worst = worst_utterances(model, recipe, n_clips, n_worst)
        steps = Counter()
        curves: dict[str, list] = {}
        for record in ledger:
            steps[record.get("stage", 1)] += 1
            for name, heads in record["sets"].items():
                for head, rates in heads.items():
                    point = (record["step"], 100 * rates["wer"])
                    curves.setdefault(f"{name} {head}", []).append(point)
        sections += [f"<p>The model's phase is {state}.</p>", "<h2>Error rates, %</h2>"]
        sections += [results(ledger, recipe.keep.metric)]
        if len(steps) == 1:
            sections.append(curve("WER, %", curves))
    losses = [(i, r["loss"]) for i, r in enumerate(log, 1) if r.get("loss") is not None]
    rates = [(i, r["lr"]) for i, r in enumerate(log, 1) if r.get("lr") is not None]
    sections.append(curve("training loss", {"loss": smoothed(losses)} if losses else {}))
    sections.append(curve("learning rate", {"lr": smoothed(rates)} if rates else {}))
    if ledger:
        legend = ", ".join(f'<span style="color:{c}">{k}</span>' for k, c in COLOURS.items())
        sections += ["<h2>Worst utterances</h2>", f"<p>{legend}</p>", worst]
    counts = Counter(item["reason"] for item in dropped).most_common()
    sections += ["<h2>Data left out</h2>"]
    sections += [table(counts, ["reason", "lines"]) if counts else "<p>Nothing.</p>"]
    if (run / "trainable.txt").exists():
        text = (run / "trainable.txt").read_text(encoding="utf-8")
        sections += ["<h2>What was trained</h2>", f"<pre>{html.escape(text)}</pre>"]
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    sections += ["<h2>Recipe</h2>", f"<pre>{html.escape(text)}</pre>"]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    sections += [f"<p>{html.escape(versions)}, {html.escape(platform.platform())}</p>"]
    style = (
        "body{font:15px sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:3px 8px;text-align:left}"
        "pre{background:#f6f6f6;padding:1em;overflow:auto}svg{display:block;font:12px sans-serif}"
    )
    title = html.escape(run.name)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{style}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(sections)}</body></html>\n"


def write_report(
    run: Path, path: Path | None = None, n_clips: int = 100, n_worst: int = 15
) -> Path:
    """Writes `report` to RUN/report.html, or to `path`; gives the file. Raises as it does."""
    page = report(run, n_clips, n_worst)
    path = path or run / "report.html"
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser(
        "training.report", "One self-contained HTML page about a finished run.", "runs/finetune"
    )
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--clips", type=int, default=100, help="of each validation set (100)")
    parser.add_argument("--worst", type=int, default=15, help="utterances that are shown (15)")
    parser.add_argument("-o", "--output", type=Path, help="RUN/report.html")
    options = parser.parse_args(arguments)

    def job():
        path = write_report(options.run, options.output, options.clips, options.worst)
        print(f"wrote {path}")

    return cli.run("error", job)


if __name__ == "__main__":
    sys.exit(main())
