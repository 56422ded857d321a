"""The evaluate command on golden audio: counts, skipped lines, comparison with an older result."""

import json
import os
import subprocess
import sys

import pytest
import soundfile
from conftest import golden
from safetensors.numpy import load_file

from fastconformer.evaluate import main
from fastconformer.jobs.scores import compare, read_results
from fastconformer.text.metrics import char_errors, normalize, word_errors

CASE = "hybrid_tdt_ctc_bpe"


@pytest.fixture(scope="module")
def nemo():
    return str(golden(CASE) / "model.nemo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden utterances as files, and manifest.jsonl with NeMo's own texts."""
    folder = tmp_path_factory.mktemp("evaluate")
    tensors = load_file(golden(CASE) / "golden.safetensors")
    entries = []
    references = ["Please turn off the lights in the kitchen", "", "yes of coarse"]
    clips = zip(tensors["audio"], tensors["audio_len"], references, strict=True)
    for k, (samples, length, text) in enumerate(clips):
        soundfile.write(folder / f"{k}.wav", samples[:length], 16000, subtype="PCM_16")
        duration = float(length) / 16000
        entries.append({"audio_filepath": f"{k}.wav", "duration": duration, "text": text})
    write_manifest(folder / "manifest.jsonl", entries)
    return folder


@pytest.fixture(scope="module")
def hypotheses():
    expected = json.loads((golden(CASE) / "expected.json").read_text())
    return expected["transcribe_plain_batched"]


def write_manifest(path, entries):
    lines = (e if isinstance(e, str) else json.dumps(e) for e in entries)
    path.write_text("\n".join(lines) + "\n")


def evaluate(folder, nemo, output, *options, manifest="manifest.jsonl"):
    status = main([str(folder / manifest), "--model", nemo, "-o", str(output), *options])
    return status, json.loads(output.read_text())


@pytest.mark.parametrize("head, key", [("tdt", "rnnt"), ("ctc", "ctc")])
def test_counts_equal_those_of_nemos_texts(folder, nemo, hypotheses, tmp_path, capsys, head, key):
    status, results = evaluate(folder, nemo, tmp_path / "r.json", "--head", head)
    assert status == 0
    utterances = results["utterances"]
    assert [u["hypothesis"] for u in utterances] == hypotheses[key]
    references = [u["reference"] for u in utterances]
    for part, normalizer in (("raw", "none"), ("normalized", "basic")):
        pair = [
            [normalize(t, normalizer) for t in texts] for texts in (references, hypotheses[key])
        ]
        words, characters = word_errors(*pair), char_errors(*pair)
        got = results[part]
        assert got["wer"] == words.rate and got["cer"] == characters.rate
        assert (got["errors"], got["words"]) == (words.errors, words.words)
        assert got["insertions"] == words.insertions and got["deletions"] == words.deletions
        assert got["substitutions"] == words.substitutions
    assert sum(u["errors"] for u in utterances) == results["raw"]["errors"]
    assert sum(u["normalized_words"] for u in utterances) == results["normalized"]["words"]
    assert results["raw"]["errors"] > results["normalized"]["errors"]  # "yes," and "Please"
    assert results["normalizer"] == "basic" and results["head"] == head
    out = capsys.readouterr().out
    assert f"WER basic   {100 * results['normalized']['wer']:8.2f}" in out and "CER raw" in out


def test_unusable_lines_are_skipped_and_listed(folder, nemo, tmp_path, capsys):
    good = {"audio_filepath": "2.wav", "duration": 1.052, "text": "yes of course"}
    (folder / "corrupt.wav").write_bytes(b"RIFF" + bytes(60))
    bad = [
        "{not json",
        {"audio_filepath": "0.wav", "duration": -1, "text": "negative"},
        {"audio_filepath": "0.wav", "duration": 1e12, "text": "absurd"},
        '{"audio_filepath": "0.wav", "duration": NaN, "text": "nan"}',
        {"audio_filepath": "0.wav", "duration": "2", "text": "a string"},
        {"audio_filepath": "0.wav", "duration": 1.6, "text": 7},
        {"audio_filepath": "0.wav", "duration": 1.6},
        {"duration": 1.6, "text": "no audio"},
        {"audio_filepath": "gone.wav", "duration": 1.6, "text": "gone"},
        {"audio_filepath": "corrupt.wav", "duration": 1.6, "text": "corrupt"},
        {"audio_filepath": "0.wav", "duration": 600, "text": "not this long"},
        {"audio_filepath": "0.wav", "duration": 1, "offset": 99, "text": "past the end"},
    ]
    write_manifest(folder / "bad.jsonl", [*bad[:6], good, "", *bad[6:]])
    status, results = evaluate(folder, nemo, tmp_path / "r.json", manifest="bad.jsonl")
    out, err = capsys.readouterr()
    assert status == 0 and results["n_utterances"] == 1 and results["normalized"]["errors"] == 0
    assert results["n_skipped"] == len(results["skipped"]) == len(bad)
    assert f"{len(bad)} skipped" in out and "skipped 2 more" in err
    listed = "\n".join(f"{s['audio']}: {s['reason']}" for s in results["skipped"])
    for words in ("bad.jsonl:1: not a JSON", "bad.jsonl:2: duration is -1", "nan", "gone.wav",
                  "bad.jsonl:11: ", "bad.jsonl:9: the line has no text",
                  "corrupt.wav", "600 s in the manifest", "past the end", "has no text",
                  "text is 7"):  # fmt: skip
        assert words in listed, words


def test_nothing_to_evaluate_fails(folder, nemo, tmp_path, capsys):
    write_manifest(folder / "none.jsonl", [{"audio_filepath": "gone.wav", "text": "a"}])
    status, results = evaluate(folder, nemo, tmp_path / "r.json", manifest="none.jsonl")
    assert status == 1 and results["n_skipped"] == 1
    assert "no utterance could be evaluated" in capsys.readouterr().err
    assert main([str(folder / "gone.jsonl"), "--model", nemo]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_against_an_older_result(folder, nemo, hypotheses, tmp_path, capsys):
    _, before = evaluate(folder, nemo, tmp_path / "ctc.json", "--head", "ctc")
    status, after = evaluate(
        folder, nemo, tmp_path / "tdt.json", "--against", str(tmp_path / "ctc.json")
    )
    assert status == 0
    comparison = after["comparison"]
    assert comparison["wer_before"] == before["normalized"]["wer"]
    assert comparison["wer_after"] == after["normalized"]["wer"]
    low, high = comparison["interval"]
    assert low <= comparison["difference"] <= high
    assert comparison["zero_inside"] == (low <= 0 <= high)
    changes = {u["audio"]: u["normalized_errors"] for u in after["utterances"]}
    for u in before["utterances"]:
        changes[u["audio"]] -= u["normalized_errors"]
    lost = {audio for audio, change in changes.items() if change > 0}
    won = {audio for audio, change in changes.items() if change < 0}
    assert {c["audio"] for c in comparison["lost"]} == lost and lost
    assert {c["audio"] for c in comparison["won"]} == won
    out = capsys.readouterr().out
    assert "95 % interval" in out and f"lost: {len(lost)} utterances" in out


def result(*pairs):
    return {
        "utterances": [
            {"audio": f"{k}.wav", "reference": r, "hypothesis": h} for k, (r, h) in enumerate(pairs)
        ]
    }


def test_comparison_sorts_by_change_and_tells_chance_from_gain():
    references = [f"word {k} of some more words" for k in range(40)]
    old = result(*((r, "nothing alike") for r in references))
    new = result(*((r, r) for r in references))
    new["utterances"][3]["hypothesis"] = references[3] + " and on and on and on and on"
    gain = compare(new, old, "none")
    assert gain["interval"][1] < 0 and not gain["zero_inside"]
    assert len(gain["won"]) == 39 and [c["audio"] for c in gain["lost"]] == ["3.wav"]
    assert gain["lost"][0]["change"] == 2  # eight insertions against six errors
    old["utterances"][5]["hypothesis"] = "nothing alike " * 10
    assert compare(new, old, "none")["won"][0]["audio"] == "5.wav"
    one_word = json.loads(json.dumps(new))
    one_word["utterances"][7]["hypothesis"] += " more"
    assert compare(one_word, new, "none")["zero_inside"]
    assert compare(new, new, "none")["interval"] == [0.0, 0.0]


def test_comparison_refuses_other_utterances():
    a, b = result(("one", "one"), ("two", "two")), result(("one", "one"))
    with pytest.raises(ValueError, match=r"1 only here \(1.wav\)"):
        compare(a, b, "basic")
    with pytest.raises(ValueError, match=r"1 only in the older \(1.wav\)"):
        compare(b, a, "basic")
    with pytest.raises(ValueError, match="reference of 0.wav differs"):
        compare(result(("one", "one")), result(("won", "one")), "basic")
    twice = {"utterances": b["utterances"] * 2}  # the same clip listed twice is two utterances
    assert compare(twice, twice, "basic")["difference"] == 0
    with pytest.raises(ValueError, match="1 only here"):
        compare(twice, b, "basic")


def test_mismatched_older_result_fails_but_keeps_the_new_one(folder, nemo, tmp_path, capsys):
    _, old = evaluate(folder, nemo, tmp_path / "old.json")
    del old["utterances"][0]
    (tmp_path / "old.json").write_text(json.dumps(old))
    status, results = evaluate(
        folder, nemo, tmp_path / "new.json", "--against", str(tmp_path / "old.json")
    )
    assert status == 1 and results["n_utterances"] == 3
    assert "1 only here (0.wav)" in capsys.readouterr().err
    old["utterances"][0]["audio"] = "other.wav"
    (tmp_path / "old.json").write_text(json.dumps(old))
    manifest = str(folder / "manifest.jsonl")
    assert main([manifest, "--model", "unread", "--against", str(tmp_path / "old.json")]) == 1
    assert "1 only in the older (other.wav)" in capsys.readouterr().err  # before any work


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"utterances": [{"audio": 1}]}', "\udcff"])
def test_not_a_result_file(tmp_path, text):
    path = tmp_path / "old.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="old.json is not a result file"):
        read_results(path)


def test_bad_usage(folder, nemo, tmp_path, capsys):
    manifest = str(folder / "manifest.jsonl")
    assert main([manifest, "--model", nemo, "--head", "rnnt"]) == 2
    assert main([manifest, "--model", nemo, "-o", str(tmp_path)]) == 2
    assert main([manifest, "--model", nemo, "--against", str(tmp_path / "no.json")]) == 1
    assert capsys.readouterr().err.count("\n") == 3
    with pytest.raises(SystemExit) as stop:
        main([manifest, "--model", nemo, "--normalizer", "magic"])
    assert stop.value.code == 2


@pytest.mark.parametrize("module", ["evaluate", "transcribe"])
def test_a_reader_that_leaves_is_no_failure_to_tell(folder, nemo, module):
    """`| head` closes the pipe: no message, and no traceback while Python ends."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", f"fastconformer.{module}", "--model", nemo]
    done = subprocess.run(
        [*command, str(folder / "manifest.jsonl")], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert done.returncode == 1 and done.stderr == b""


def test_skipme_lines_are_left_out_and_counted(folder, nemo, tmp_path, capsys):
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    skipped = json.loads(lines[1]) | {"_skipme": True, "text": "never scored"}
    write_manifest(folder / "skipme.jsonl", [lines[0], skipped, lines[2]])
    status, results = evaluate(folder, nemo, tmp_path / "r.json", manifest="skipme.jsonl")
    assert status == 0 and results["n_skipme"] == 1 and results["n_skipped"] == 0
    assert [u["audio"] for u in results["utterances"]] == ["0.wav", "2.wav"]
    assert "1 left out by _skipme" in capsys.readouterr().out
    lines = [lines[0], skipped | {"lang": "fr"}, json.loads(lines[1]) | {"lang": 7}, lines[2]]
    write_manifest(folder / "languages.jsonl", lines)
    options = ["--lang", "en"]
    status, results = evaluate(
        folder, nemo, tmp_path / "l.json", *options, manifest="languages.jsonl"
    )
    assert status == 0 and (results["n_skipme"], results["n_skipped"]) == (1, 1)
    assert results["skipped"][0]["reason"] == "lang is 7, expected a string"


def test_utterances_without_an_error_are_counted(folder, nemo, hypotheses, tmp_path, capsys):
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    lines[0]["text"] = hypotheses["rnnt"][0].upper() + "!"
    write_manifest(folder / "right.jsonl", lines)
    _, results = evaluate(folder, nemo, tmp_path / "r.json", manifest="right.jsonl")
    assert results["raw"]["n_correct"] < results["normalized"]["n_correct"]
    right = results["normalized"]["n_correct"]
    assert results["normalized"]["sequence_accuracy"] == right / len(lines)
    assert "utterances without an error:" in capsys.readouterr().out
