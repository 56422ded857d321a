"""The benchmark's command on a tiny model: what it writes, and how it fails."""

import json

import pytest
import soundfile
import torch
from conftest import golden, load_case

from benchmarks.rtfx import main

MODEL = str(golden("hybrid_tdt_ctc_bpe") / "model.nemo")


@pytest.fixture(autouse=True)
def threads():
    """The command sets their number; the tests that follow keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_numbers_of_a_manifest(tmp_path, capsys):
    case = load_case("hybrid_tdt_ctc_bpe")
    samples = case.tensors["audio"][2, : case.tensors["audio_len"][2]].numpy()
    soundfile.write(tmp_path / "clip.wav", samples, 16000)
    manifest, out = tmp_path / "m.jsonl", tmp_path / "out.json"
    manifest.write_text(json.dumps({"audio_filepath": "clip.wav", "text": "yes, of course"}) + "\n")
    arguments = ["--model", MODEL, "--manifest", str(manifest), "--out", str(out)]
    arguments += ["--rounds", "1", "--batch-sizes", "1", "--threads", "1"]
    assert main(arguments) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["wer"] == 0 and row["rtfx_memory"] > 0 and row["rtfx_files"] > 0
    assert "RTFx" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^rtfx: ours:float32 failed: .*this model has tdt, ctc$"):
        main([*arguments, "--head", "rnnt"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--model is needed"),
        (["--model", MODEL, "--audio", "no-such.wav"], "name a recording with --audio"),
        (["--model", MODEL, "--audio", MODEL, "--threads", "0"], "are at least 1"),
        (["--model", MODEL, "--audio", MODEL, "--batch-sizes", "0"], "are at least 1"),
    ],
)
def test_bad_usage(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err
