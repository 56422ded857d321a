"""Fun-ASR-Nano's folder in and out: nothing changes there and back, FunASR loads what we write,
and what is no such folder is told in one line, with nothing written."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import golden

from converters import funasr2st, st2funasr
from fastconformer import load_model
from fastconformer.checkpoint import read_checkpoint

CASE = "fun_asr_nano_tiny"


@pytest.fixture
def folder(tmp_path):
    """A copy of the released layout, to be damaged."""
    copy = tmp_path / "released"
    shutil.copytree(golden(CASE), copy, ignore=shutil.ignore_patterns("audio", "golden*"))
    return copy


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)["state_dict"]


def save(folder, state, name="model.pt"):
    torch.save({"state_dict": state}, folder / name)


def there_and_back(folder, tmp_path, *arguments):
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert funasr2st.main([str(folder), "-o", str(ours), *arguments]) == 0
    assert st2funasr.main([str(ours), "-o", str(back)]) == 0
    return ours, back


def test_there_and_back_changes_nothing(folder, tmp_path, capsys):
    ours, back = there_and_back(folder, tmp_path)
    assert "Fun-ASR-Nano, heads llm ctc, 16000 Hz: audio_encoder 0.28 M" in capsys.readouterr().out
    before, after = read_checkpoint(folder), read_checkpoint(back)
    assert before.config == after.config == read_checkpoint(ours).config
    assert before.tokenizer_files == after.tokenizer_files
    assert before.state_dict.keys() == after.state_dict.keys()
    for name, tensor in before.state_dict.items():  # types too: bfloat16, CTC in float32
        assert after.state_dict[name].dtype == tensor.dtype
        assert torch.equal(after.state_dict[name], tensor), name
    assert {path.name for path in back.rglob("*")} >= {"configuration.json", "Qwen3-0.6B"}


def test_a_saved_model_is_the_same_model(folder, tmp_path):
    model = load_model(folder)
    model.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert model.config == again.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert again.llm.lm_head.weight is again.llm.model.embed_tokens.weight


def test_funasr_gives_the_same_text_for_what_we_write(folder, tmp_path):
    python = os.environ.get("FASTCONFORMER_FUNASR_PYTHON")
    if not python:
        pytest.skip("FASTCONFORMER_FUNASR_PYTHON is not set: the path of a Python with FunASR")
    state = {k: v for k, v in weights(folder).items() if not k.startswith("ctc")}
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    save(plain, state)  # as the published copy without CTC
    backs = [there_and_back(f, tmp_path / f"of_{f.name}")[1] for f in (folder, plain)]
    clips = [str(golden(CASE) / "audio" / f"clip_{i}.wav") for i in range(4)]
    script = Path(__file__).with_name("funasr_reads.py")
    paths = ",".join(map(str, (folder, *backs)))
    done = subprocess.run(
        [python, script, paths, *clips], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    original, ours, without = lines
    assert ours["texts"] == original["texts"] and ours["ctc_texts"] == original["ctc_texts"]
    assert without["texts"] == original["texts"] and without["ctc_texts"] == [None] * 4
    model = load_model(backs[0])
    assert [t.text for t in model.transcribe(clips)] == original["texts"]
    assert [t.text for t in model.transcribe(clips, head="ctc")] == original["ctc_texts"]


def test_the_language_model_comes_from_what_it_was_trained_from(folder, tmp_path, capsys):
    """FunASR's training saves without `llm.`, and beside no tokenizer."""
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    shutil.copy(folder / "config.yaml", tuned)
    state = {k: v + 0.5 for k, v in weights(folder).items() if k.startswith("audio_encoder")}
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tuned / "model.pt.avg10")
    name = ["--weights", "model.pt.avg10"]
    assert funasr2st.main([str(tuned), "-o", str(tmp_path / "x"), *name]) == 1
    assert "holds no folder of the language model" in capsys.readouterr().err
    arguments = [str(tuned), "-o", str(tmp_path / "ours"), *name, "--like", str(folder)]
    assert funasr2st.main(arguments) == 0
    merged = read_checkpoint(tmp_path / "ours").state_dict
    original = weights(folder)
    assert merged.keys() == original.keys()
    for key, tensor in merged.items():
        assert torch.equal(tensor, state.get(key, original[key]))


def without_llm(folder):
    save(folder, {k: v for k, v in weights(folder).items() if not k.startswith("llm.")})


def truncated(folder):
    data = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(data[: len(data) // 2])


class Hostile:
    def __reduce__(self):
        return print, ("owned",)


def hostile(folder):
    torch.save({"state_dict": weights(folder), "hook": Hostile()}, folder / "model.pt")


def other_vocabulary(folder):
    lines = (folder / "multilingual.tiktoken").read_text().splitlines()
    (folder / "multilingual.tiktoken").write_text("\n".join(lines[:400]) + "\n")
    text = (folder / "config.yaml").read_text().replace("num_languages: 8749", "num_languages: 0")
    (folder / "config.yaml").write_text(text.replace("ctc_vocab_size: 679", "ctc_vocab_size: 300"))


def other_encoder(folder):
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("sanm_shfit: 0", "sanm_shfit: 5"))


def no_tokenizer(folder):
    (folder / "Qwen3-0.6B" / "tokenizer.json").unlink()


def broken_tokenizer(folder):
    (folder / "Qwen3-0.6B" / "tokenizer.json").write_text("{}")


def not_finite(folder):
    state = weights(folder)
    state["audio_encoder.tp_norm.weight"][3] = float("nan")
    save(folder, state)


def other_shape(folder):
    state = weights(folder)
    state["audio_adaptor.linear1.weight"] = torch.zeros(3, 3)
    save(folder, state)


def other_llm(folder):
    path = folder / "Qwen3-0.6B" / "config.json"
    path.write_text(path.read_text().replace('"qwen3"', '"llama"'))


def small_llm(folder):
    path = folder / "Qwen3-0.6B" / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 704', '"vocab_size": 699'))


def no_vocabulary(folder):
    (folder / "multilingual.tiktoken").unlink()


DAMAGES = {
    without_llm: "hold no language model (no llm.* tensors)",
    truncated: "model.pt is damaged",
    hostile: "refusing model.pt: only plain tensors are unpickled",
    other_vocabulary: "take the vocabulary that it was trained with",
    other_encoder: "audio_encoder_conf.sanm_shfit is 5, supported is 0",
    no_tokenizer: "Qwen3-0.6B/ holds no tokenizer.json",
    broken_tokenizer: "tokenizer.json is not a tokenizer",
    not_finite: "audio_encoder.tp_norm.weight holds NaN",
    other_shape: "audio_adaptor.linear1.weight has shape (3, 3)",
    other_llm: "model_type is 'llama', supported is 'qwen3'",
    small_llm: "the tokenizer has 700 tokens, the language model 699",
    no_vocabulary: "has CTC weights but no vocabulary",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_folder_is_told_in_one_line(damage, folder, tmp_path, capsys):
    damage(folder)
    assert funasr2st.main([str(folder), "-o", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith(f"funasr2st: {folder}: ")
    assert DAMAGES[damage] in err and "owned" not in out
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError):
        load_model(folder)


def test_a_part_of_the_ctc_branch_turns_it_off(folder, caplog):
    state = weights(folder)
    del state["ctc.ctc_lo.bias"]
    save(folder, state)
    model = load_model(folder)
    assert model.heads == ("llm",)
    assert "left the CTC branch out: 1 of its" in caplog.text
    assert [m.levelname for m in caplog.records].count("WARNING") == 1
    with pytest.raises(ValueError, match="its checkpoint has no ctc weights"):
        model.head("ctc")
    clip = golden(CASE) / "audio" / "clip_2.wav"
    assert model.transcribe(clip)[0].text == "The child almost hurt the small dog."
    for ask in (lambda: model.transcribe(clip, timestamps=True), lambda: model.align(clip, "a")):
        with pytest.raises(ValueError, match="(?i)ctc weights"):
            ask()


def test_a_front_end_that_funasr_lacks_is_said(folder, tmp_path, capsys):
    model = load_model(folder)
    for edges, rate in (("keep", 16000), ("stretch", 8000)):
        model.with_sample_rate(8000, edges).save(tmp_path / edges)
        assert st2funasr.main([str(tmp_path / edges), "-o", str(tmp_path / f"{edges}_back")]) == 0
        assert ("keeps the filters" in capsys.readouterr().out) == (edges == "keep")
        back = read_checkpoint(tmp_path / f"{edges}_back").config["frontend_conf"]
        assert back["fs"] == rate and "mel_high_hz" not in back


@pytest.mark.parametrize("name", ["st2onnx", "st2hf", "st2mlx"])
def test_there_is_no_export_of_this_kind(name, folder, tmp_path, capsys):
    import importlib

    more = ["--for", "onnx-asr", "--head", "ctc"] if name == "st2onnx" else []
    main = importlib.import_module(f"converters.{name}").main
    assert main([str(folder), "-o", str(tmp_path / "x"), *more]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "is no FastConformer model" in err


def test_neither_kind_goes_through_the_other_s_converter(folder, tmp_path, capsys):
    from converters import st2nemo

    assert st2funasr.main([str(golden("ctc_bpe") / "model.nemo"), "-o", str(tmp_path / "x")]) == 1
    assert "is no Fun-ASR-Nano model; see converters.st2nemo" in capsys.readouterr().err
    assert st2nemo.main([str(folder), "-o", str(tmp_path / "x.nemo")]) == 1
    assert "no model of NeMo's; see converters.st2funasr" in capsys.readouterr().err
    assert st2funasr.main([str(folder), "-o", str(folder)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert not (tmp_path / "x.nemo").exists()


@pytest.mark.parametrize(("downsample", "low"), [(1, "yes"), (1, "no"), (2, "yes")])
def test_a_model_of_other_sizes_is_funasr_s(downsample, low, tmp_path):
    """Random weights; other widths, heads, kernels, stacking, an untied language model, no system
    prompt, no thinking: every tensor and every text."""
    python = os.environ.get("FASTCONFORMER_FUNASR_PYTHON")
    if not python:
        pytest.skip("FASTCONFORMER_FUNASR_PYTHON is not set: the path of a Python with FunASR")
    script, out = Path(__file__).with_name("funasr_other_sizes.py").resolve(), tmp_path / "other"
    command = [python, script, golden(CASE).resolve(), out, str(downsample), low]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    reference = torch.load(out / "reference.pt", weights_only=True)
    model = load_model(out)
    clips = [out / "audio" / f"clip_{i}.wav" for i in range(4)]
    texts = model.transcribe(clips, max_tokens=20, max_repeats=100)
    ctc_texts = model.transcribe(clips, head="ctc")
    for clip, wanted, text, ctc_text in zip(clips, reference, texts, ctc_texts, strict=True):
        samples = torch.from_numpy(soundfile.read(clip, dtype="float32")[0])
        with torch.no_grad():
            features, lengths = model.featurize(samples[None], torch.tensor([len(samples)]))
            encoded, lengths = model.encode(features, lengths)
            adapted, _ = model.adapt(encoded, lengths)
            log_probs = model.ctc_log_probs(encoded, lengths)
        for found, name in ((features[0].T, "features"), (encoded[0], "encoded"),
                            (adapted[0], "adapted"), (log_probs[0], "log_probs")):  # fmt: skip
            torch.testing.assert_close(found, wanted[name], rtol=0, atol=5e-3)
        assert text.text == wanted["text"] and ctc_text.text == wanted["ctc_text"]
