"""The page about a run: made by a real run, read back."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import yaml
from conftest import golden

import training.loop.train
from training import finetune
from training.loop.phases import PHASES, phase
from training.loop.run_folder import check_format
from training.pages import report
from training.pages.html import chart, ticks
from training.report import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, its folder, and its clips by text."""
    folder = tmp_path_factory.mktemp("report")
    rng, lines, clips = np.random.default_rng(0), [], {}
    for i, text in enumerate(["one <two>", "three", "nine", "seven six"]):
        clips[text] = np.round(3000 * rng.standard_normal(16000)).astype(np.int16)
        soundfile.write(folder / f"{i}.wav", clips[text], 16000)
        lines.append(json.dumps({"audio_filepath": f"{i}.wav", "duration": 1.0, "text": text}))
    lines.append(json.dumps({"audio_filepath": "gone.wav", "duration": 1.0, "text": "gone"}))
    (folder / "train.jsonl").write_text("\n".join(lines[1:]) + "\n")
    (folder / "dev.jsonl").write_text("\n".join(lines[:4]) + "\n")
    recipe = {
        "output": str(folder / "run"),
        "model": {"init_from": str(golden("train_parity") / "model.nemo")},
        "data": {"train": [str(folder / "train.jsonl")]},
        "trainer": {"max_steps": 2, "val_every_steps": 1, "threads": 1},
    }
    recipe["data"]["validation"] = {"dev": str(folder / "dev.jsonl")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert finetune.main([str(folder / "recipe.yaml")]) == 0
    return folder / "run", clips


class Page(HTMLParser):
    """Text, audio sources, and whether every tag is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.sources = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href") and v != "data:,"]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


def test_a_run_ends_with_its_page(run):
    folder, _ = run
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    for words in (
        "phase is",
        "WER before",
        "Worst utterances",
        "missing_audio",
        "max_steps: 2",
        "hours heard",
    ):
        assert words in page.text, words
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert f"{100 * ledger[0]['all'][ledger[0]['head']]['wer']:.2f}" in page.text
    assert "in the manifest: one <two>" in page.text  # escaped, or the parser would have seen a tag


def test_the_audio_is_in_the_page(run):
    folder, clips = run
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert len(page.sources) == 4 and all(s.startswith("data:audio/flac") for s in page.sources)
    sounds = [
        soundfile.read(io.BytesIO(base64.b64decode(s.split(",")[1])), dtype="int16")[0]
        for s in page.sources
    ]
    for clip in clips.values():
        assert any(np.array_equal(sound, clip) for sound in sounds)


def test_alignment_shows_each_kind_of_error():
    text = report.aligned("one two three", "one too three four")
    assert text == "one <del>two</del> <ins>too</ins> three <ins>four</ins>"
    assert report.aligned("one two", "one") == "one <del>two</del>"
    assert report.aligned("a b", "a b") == "a b"
    assert report.aligned("<b>", "x") == "<del>&lt;b&gt;</del> <ins>x</ins>"


def test_a_chart_shows_its_points_marks_and_scale():
    text = chart("WER, %", {"dev": [(0, 50.0), (100, 45.0), (200, 44.0)]}, {"guard": 46.0}, " %")
    assert text.count("<circle") == 3 and "dev, step 100: 45 %" in text and "guard: 46 %" in text
    labels = [float(value) for value in re.findall(r">([\d.]+) %</text>", text)]
    assert min(labels) > 43 and max(labels) <= 51 and len(labels) >= 3  # not from 0
    assert chart("nothing", {"a": []}) == ""
    assert chart("one point", {"a": [(5, 1.0)]}).count("<circle") == 1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (43.2, 50.9), (1e-6, 3e-4), (0, 12345)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 7 and low <= found[0] and found[-1] <= high * (1 + 1e-9)


@pytest.mark.parametrize(
    "wer, emission, name",
    [
        (1.0, 0.0, "mute"),
        (1.5, 2.0, "random characters"),
        (0.7, 0.9, "basic"),
        (0.3, 1.0, "major vocabulary"),
        (0.05, 1.0, "convergence"),
    ],
)
def test_phases(wer, emission, name):
    assert phase(wer, emission) == name in PHASES


def test_a_folder_without_a_model_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "has no recipe.yaml" in capsys.readouterr().err
    data = {"train": ["a.jsonl"], "validation": ["b.jsonl"]}
    copied = {"output": "run", "model": {"init_from": "a.nemo"}, "data": data}
    copied["trainer"] = {"max_steps": 1}
    (tmp_path / "recipe.yaml").write_text(json.dumps(copied))
    assert main([str(tmp_path)]) == 1 and not (tmp_path / "report.html").exists()
    assert "no run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), "--worst", "-1"])
    assert end.value.code == 2


def test_the_best_is_what_the_run_kept():
    def record(step, wer, dev_cer, holds=True):
        rates = {"dev": {"tdt": {"wer": wer, "cer": dev_cer}}}
        common = {"step": step, "wer": wer, "cer": dev_cer, "train_loss": 1.0}
        return common | {"guard_holds": holds, "sets": rates, "all": rates["dev"]}

    ledger = [
        record(0, 0.9, 0.8),
        record(1, 0.2, 0.5),
        record(2, 0.4, 0.3),
        record(3, 0.1, 0.1, False),
    ]
    ledger = [entry | {"stage": 1, "at": entry["step"]} for entry in ledger]
    assert report.best_record(ledger, "wer")["step"] == 1
    assert report.best_record(ledger, "cer/dev/tdt")["step"] == 2
    stages = [r | {"stage": 1 + (r["step"] == 0)} for r in ledger[::-1]]  # the last stage: step 0
    assert report.best_record(stages, "wer")["step"] == 0


def test_the_page_is_there_while_the_run_goes_on(corpus, monkeypatch):
    recipe, run = corpus
    seen = []
    step = training.loop.train.take_step

    def watched(*arguments):
        seen.append((run / "report.html").read_text(encoding="utf-8"))
        return step(*arguments)

    monkeypatch.setattr(training.loop.train, "take_step", watched)
    options = ["trainer.val_every_steps=2", "guard.set=dev"]
    assert finetune.main([str(recipe), *options]) == 0
    assert "No step yet" in seen[0] and "No step yet" not in seen[-1]
    assert "guard of dev" in seen[-1] and "best WER so far" in seen[-1]
    facts = json.loads((run / "run.json").read_text())
    assert facts["format_version"] == 1 and facts["version"]
    (run / "run.json").write_text(json.dumps(facts | {"format_version": 99, "version": "9.9"}))
    assert finetune.main([str(recipe), *options]) == 1


def test_a_newer_run_folder_is_refused_by_name(tmp_path):
    (tmp_path / "run.json").write_text('{"format_version": 99, "version": "9.9"}')
    with pytest.raises(ValueError, match=r"was written by version 9\.9, this is"):
        check_format(tmp_path)
