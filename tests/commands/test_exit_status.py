"""One rule in all commands: what is not there, or is something else, is 1; what a command cannot
mean, by itself or with this model, is 2; either way one line on stderr, and nothing written."""

import importlib

import pytest
from conftest import golden

MODEL = str(golden("ctc_bpe") / "model.nemo")
STREAMING = str(golden("stream_ctc") / "model.nemo")
OUT = ["-o", "out"]
ONNX = [*OUT, "--for", "sherpa-onnx"]
MISSING = {  # every input of every command
    "fastconformer.transcribe": [["no"], ["a.wav", "--lm", "no"], ["--from-file", "no"]],
    "fastconformer.evaluate": [["no"], ["m.jsonl", "--against", "no"]],
    "fastconformer.listen": [["--input", "no"]],
    "fastconformer.serve": [["--api-key-file", "no"]],
    "training.segment": [["no", "t.txt", *OUT], ["a.wav", "no", *OUT]],
    "training.finetune": [["no.yaml"]],
    "training.compare": [["no.yaml"]],
    "training.distill": [["no.yaml"]],
    "training.find_batch": [["no.yaml"]],
    "training.average": [["no", *OUT]],
    "training.report": [["no"]],
    "training.manifest": [["no", *OUT]],
    "training.synthesize": [["out", "--sentences", "no"]],
    "converters.nemo2st": [["no.nemo"]],
    "converters.st2nemo": [["no"]],
    "converters.st2onnx": [["no", *ONNX]],
    "converters.st2hf": [["no", *OUT]],
    "converters.hf2st": [["no", *OUT]],
    "converters.st2mlx": [["no", *OUT]],
    "converters.check_export": [["no", "--audio", "."]],
    "converters.funasr2st": [["no", *OUT]],
    "converters.st2funasr": [["no", *OUT]],
    "converters.to_birwkv7": [["no", *OUT]],
    "converters.train_tokenizer": [["no", "--size", "9", *OUT]],
    "converters.merge_tokenizers": [["no", "no", *OUT]],
    "converters.train_lm": [["no", *OUT]],
}
UNFIT = [
    ("fastconformer.transcribe", ["a.wav", "--head", "tdt"]),
    ("fastconformer.serve", ["--wyoming-languages", "de"]),
    ("fastconformer.transcribe", ["a.wav", "--look-ahead", "3"]),
    ("fastconformer.listen", ["--input", "a.wav", "--head", "tdt"]),
    ("fastconformer.listen", ["--input", "a.wav", "--look-ahead", "-1"]),
    ("fastconformer.listen", ["--input", "a.wav", "--target-lang", "de"]),
    ("converters.st2onnx", [MODEL, *ONNX, "--head", "tdt"]),
    ("converters.st2onnx", [MODEL, *ONNX, "--look-ahead", "3"]),
    ("converters.st2onnx", [MODEL, *ONNX, "--target-lang", "de"]),
    ("converters.st2hf", [MODEL, *OUT, "--head", "tdt"]),
    ("converters.train_lm", ["t.txt", "-o", "t.txt"]),
    ("converters.train_lm", ["t.txt", "-o", "no/words.arpa"]),
    ("converters.train_tokenizer", ["t.txt", "--size", "0", *OUT]),
    ("converters.train_tokenizer", ["t.txt", "--extend", "x.model", "--type", "bpe", *OUT]),
    ("converters.st2nemo", [".", "--licence", "mit"]),
    ("fastconformer.transcribe", ["a.wav", "--long", "full", "--window-s", "9"]),
    ("fastconformer.listen", ["--input", "a.wav", "--part-s", "2", "--model", STREAMING]),
    ("training.finetune", ["wrong.yaml"]),
    ("training.compare", ["wrong.yaml", "--html", "no/page.html"]),
    ("training.report", [".", "-o", "no/page.html"]),
]
WITH_MODEL = ("transcribe", "evaluate", "listen", "serve", "segment", "check_export")


def status(module: str, arguments: list[str]) -> int:
    more = ["--model", MODEL] if module.endswith(WITH_MODEL) else []
    try:
        return importlib.import_module(module).main([*more, *arguments])
    except SystemExit as stop:  # argparse's
        return stop.code


@pytest.fixture(autouse=True)
def inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("hello\n")
    (tmp_path / "a.wav").write_text("no audio")
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav", "duration": 1, "text": "a"}\n')
    (tmp_path / "wrong.yaml").write_text("optim: {lr: -1}\n")
    yield
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.wav",
        "m.jsonl",
        "t.txt",
        "wrong.yaml",
    ]
    assert (tmp_path / "t.txt").read_text() == "hello\n"


@pytest.mark.parametrize(
    "module, arguments", [(module, case) for module, cases in MISSING.items() for case in cases]
)
def test_what_is_missing_is_1(module, arguments, capsys):
    assert status(module, arguments) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "no" in told


@pytest.mark.parametrize("module, arguments", UNFIT)
def test_what_does_not_fit_is_2(module, arguments, capsys):
    assert status(module, arguments) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line[:1] not in ("u", " ")]
    assert len(told) == 1  # beside argparse's usage
