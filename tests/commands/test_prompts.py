"""Prompts on the command line, and manifests whose lines bring their own."""

import json

import pytest
import soundfile
from conftest import golden, load_case

from fastconformer import evaluate, transcribe

MODEL = ["--model", str(golden("canary_flash_agg") / "model.nemo")]


@pytest.fixture
def clips(tmp_path):
    case = load_case("canary_flash_agg")
    paths = []
    for i, length in enumerate(case.tensors["audio_len"]):
        path = tmp_path / f"clip{i}.wav"
        soundfile.write(path, case.tensors["audio"][i, :length].numpy(), 16000, subtype="PCM_16")
        paths.append(str(path))
    return paths


def test_slots_on_the_command_line(clips, capsys):
    assert transcribe.main([clips[0], *MODEL]) == 0
    assert capsys.readouterr().out.strip() == "I will call you back in five minutes, okay?"
    german = ["--source-lang", "en", "--target-lang", "de", "--pnc", "yes", "--prompt", "itn=no"]
    assert transcribe.main([clips[0], *MODEL, *german]) == 0
    assert capsys.readouterr().out.strip() == "Ich möchte gerne ein Glas Wasser trinken."


def test_times_of_every_format(clips, capsys):
    assert transcribe.main([clips[0], *MODEL, "--format", "srt"]) == 0
    assert "00:00:00,000 --> 00:00:0" in capsys.readouterr().out
    assert transcribe.main([clips[0], *MODEL, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["head"] == "aed"


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--source-lang", "xx"], "slot source_lang is 'xx', expected one of"),
        (["--prompt", "itn"], "--prompt is 'itn', expected SLOT=VALUE"),
        (["--prompt", "rhyme=yes"], "no slot 'rhyme'; slots of format canary2 are"),
        (["--task", "ast"], "no slot 'task'"),
    ],
)
def test_wrong_slots_are_bad_usage(clips, capsys, arguments, reason):
    assert transcribe.main([clips[0], *MODEL, *arguments]) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1


def test_another_model_takes_no_prompt(clips, capsys):
    other = ["--model", str(golden("ctc_bpe") / "model.nemo")]
    assert transcribe.main([clips[0], *other, "--source-lang", "en"]) == 2
    assert "this model's heads take no prompt" in capsys.readouterr().err


def test_manifest_lines_bring_their_own(clips, tmp_path, capsys):
    texts = ["Ich möchte gerne ein Glas Wasser trinken.", "good morning, how are you?"]
    slots = [{"source_lang": "en", "target_lang": "de"}, {"source_lang": "de", "target_lang": "en"}]
    lines = [
        json.dumps({"audio_filepath": path, "duration": 2.0, "text": text} | own)
        for path, text, own in zip(clips, texts, slots)
    ]
    manifest = tmp_path / "test.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    assert transcribe.main([str(manifest), *MODEL, "--source-lang", "de"]) == 0
    found = [line.split("\t")[-1] for line in capsys.readouterr().out.splitlines()]
    assert found == texts
    result = tmp_path / "result.json"
    assert evaluate.main([str(manifest), *MODEL, "-o", str(result)]) == 0
    found = json.loads(result.read_text())
    assert [one["hypothesis"] for one in found["utterances"]] == texts
    assert [*found["pairs"]] == ["de>en", "en>de"]
    assert all(scores["raw"]["wer"] == 0 for scores in found["pairs"].values())
    bleu = found["pairs"]["de>en"].get("bleu")
    said = capsys.readouterr().out
    assert "de>en: 1 utterances, WER basic 0.00 %" in said
    line = json.loads(lines[1])
    del line["target_lang"]  # asked by the command for it, or else by the checkpoint
    manifest.write_text(json.dumps(line) + "\n")
    for words, pair in (([], "de>en"), (["--target-lang", "fr"], "de>fr")):
        assert evaluate.main([str(manifest), *MODEL, *words, "-o", str(result)]) == 0
        assert [*json.loads(result.read_text())["pairs"]] == [pair]
    try:
        import sacrebleu  # noqa: F401
    except ModuleNotFoundError:
        assert "BLEU" not in said
    else:
        assert bleu == pytest.approx(100)
