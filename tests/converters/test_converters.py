"""The commands nemo2st and st2nemo, as a user runs them."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import golden

import converters.nemo2st
import converters.st2nemo
from fastconformer import load_model
from fastconformer.checkpoint.folder import write_folder
from fastconformer.checkpoint.nemo_archive import read_nemo, write_nemo
from fastconformer.checkpoint.read import read_checkpoint
from fastconformer.config.changes import with_data_sections

ROOT = Path(__file__).parents[2]
CASES = ["ctc_bpe", "rnnt_bpe", "tdt_bpe", "hybrid_tdt_ctc_bpe", "hybrid_rnnt_ctc_bpe"]
HEADS = dict(zip(CASES, ["ctc", "rnnt", "tdt", "tdt ctc", "rnnt ctc"]))


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copy(golden("ctc_bpe") / "model.nemo", tmp_path / "model.nemo"))


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path, capsys):
    model = shutil.copy(golden(case) / "model.nemo", tmp_path / "model.nemo")
    assert converters.nemo2st.main([str(model)]) == 0
    out = capsys.readouterr().out
    assert f"heads {HEADS[case]}, " in out and f"wrote {tmp_path / 'model'}" in out
    assert converters.st2nemo.main([str(tmp_path / "model"), "-o", str(tmp_path / "b.nemo")]) == 0
    first, second = read_nemo(model), read_nemo(tmp_path / "b.nemo")
    assert with_data_sections(first.config) == second.config
    assert first.tokenizer_files == second.tokenizer_files
    assert first.state_dict.keys() == second.state_dict.keys()
    for name, tensor in first.state_dict.items():
        assert tensor.dtype == second.state_dict[name].dtype
        assert torch.equal(tensor, second.state_dict[name]), name


def test_default_names(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert converters.nemo2st.main(["model.nemo"]) == 0
    os.remove("model.nemo")
    assert converters.st2nemo.main(["model/"]) == 0
    os.remove("model.nemo")
    monkeypatch.chdir("model")
    assert converters.st2nemo.main(["."]) == 0
    assert sorted(os.listdir(tmp_path)) == ["model", "model.nemo"]


def test_as_commands(model, tmp_path):
    def command(*words):
        words = [sys.executable, "-m", *map(str, words)]
        return subprocess.run(words, check=False, capture_output=True, text=True, cwd=ROOT)

    for name in ("converters.nemo2st", "converters.st2nemo"):
        done = command(name, "--help")
        assert done.returncode == 0 and f"example: python -m {name}" in done.stdout
        done = command(name)
        assert done.returncode == 2 and done.stdout == ""
    done = command("converters.nemo2st", model, "-o", tmp_path / "f")
    assert done.returncode == 0 and done.stderr == ""
    done = command("converters.st2nemo", tmp_path / "f")
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "f.nemo").exists()
    done = command("converters.nemo2st", tmp_path / "none.nemo")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"nemo2st: {tmp_path / 'none.nemo'}: no such .nemo file or folder\n"


def test_no_default_folder_without_the_suffix(tmp_path, capsys):
    (tmp_path / "model.tar").touch()
    with pytest.raises(SystemExit) as caught:
        converters.nemo2st.main([str(tmp_path / "model.tar")])
    assert caught.value.code == 2 and "-o FOLDER" in capsys.readouterr().err


def fails(main, source, target, message, capsys):
    """Exit code 1, one line on stderr that names the source, nothing written."""
    before = sorted(target.parent.rglob("*"))
    assert main([str(source), "-o", str(target)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured
    assert message in captured.err and str(source) in captured.err
    assert sorted(target.parent.rglob("*")) == before


class _Evil:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def rewritten(model, target, change):
    """The archive's members after change(dict of name -> content)."""
    with tarfile.open(model) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar if m.isreg()}
    change(members)
    with tarfile.open(target, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return target


def test_bad_archives_write_nothing(model, tmp_path, capsys):
    sentinel = tmp_path / "sentinel"

    def weights(change):
        def apply(members):
            state = torch.load(io.BytesIO(members["./model_weights.ckpt"]), weights_only=True)
            change(state)
            buffer = io.BytesIO()
            torch.save(state, buffer)
            members["./model_weights.ckpt"] = buffer.getvalue()

        return apply

    def config(change):
        def apply(members):
            data = yaml.safe_load(members["./model_config.yaml"])
            change(data)
            members["./model_config.yaml"] = yaml.safe_dump(data).encode()

        return apply

    def lose_tokenizer(members):
        del members[next(name for name in members if name.endswith("tokenizer.model"))]

    def spoil_tokenizer(members):
        members[next(name for name in members if name.endswith("tokenizer.model"))] = b"nothing"

    bias = "decoder.decoder_layers.0.bias"
    cases = [
        (weights(lambda s: s.pop(bias)), f"missing {bias}"),
        (weights(lambda s: s.update(extra=torch.ones(1))), "unexpected extra"),
        (weights(lambda s: s.update({bias: torch.ones(3)})), f"{bias} has shape (3,)"),
        (weights(lambda s: s[bias].fill_(float("nan"))), f"tensor {bias} holds NaN"),
        (weights(lambda s: s.update(evil=_Evil(sentinel))), "refusing model_weights.ckpt"),
        (config(lambda c: c["encoder"].update(mystery=1)), "mystery"),
        (config(lambda c: c.update(target="a.B")), "target"),
        (config(lambda c: c["encoder"].update(d_model="${oc.env:X}")), "${oc.env:X}"),
        (lose_tokenizer, "tokenizer.model"),
        (spoil_tokenizer, "tokenizer"),
        (lambda m: m.update({"../evil": b""}), "refusing member '../evil'"),
    ]
    bad, folder = tmp_path / "bad.nemo", tmp_path / "out"
    for change, message in cases:
        rewritten(model, bad, change)
        fails(converters.nemo2st.main, bad, folder, message, capsys)
    bad.write_bytes(model.read_bytes()[:200_000])
    fails(converters.nemo2st.main, bad, folder, "truncated", capsys)
    fails(converters.nemo2st.main, tmp_path, folder, "is a folder", capsys)
    assert not sentinel.exists()


def test_bad_folders_write_nothing(model, tmp_path, capsys):
    target = tmp_path / "out.nemo"
    good = read_checkpoint(model)

    def spoilt(name, change):
        checkpoint = read_checkpoint(model)
        change(checkpoint)
        write_folder(tmp_path / name, checkpoint)
        return tmp_path / name

    missing = next(iter(good.state_dict))
    for name, change, message in (
        ("a", lambda c: c.state_dict.pop(missing), f"missing {missing}"),
        ("b", lambda c: c.config["encoder"].update(mystery=1), "mystery"),
        ("c", lambda c: c.state_dict["decoder.decoder_layers.0.bias"].fill_(-torch.inf), "NaN"),
    ):
        fails(converters.st2nemo.main, spoilt(name, change), target, message, capsys)
    (tmp_path / "empty").mkdir()
    fails(converters.st2nemo.main, tmp_path / "empty", target, "holds no config.json", capsys)
    fails(converters.st2nemo.main, tmp_path / "none", target, "no such", capsys)
    fails(converters.st2nemo.main, model, target, "is a file", capsys)


def test_an_output_that_cannot_be_written(model, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert converters.nemo2st.main([str(model), "-o", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    write_nemo(tmp_path / "b.nemo", read_nemo(model))
    assert converters.nemo2st.main([str(model), "-o", str(tmp_path / "file" / "sub")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_members_that_are_not_kept_are_listed(model, tmp_path, capsys):
    extra = rewritten(model, tmp_path / "x.nemo", lambda m: m.update({"./notes.txt": b"x"}))
    assert converters.nemo2st.main([str(extra)]) == 0
    assert "not kept, the model does not use them: notes.txt" in capsys.readouterr().out


def test_half_halves_the_archive_and_keeps_the_text(tmp_path, capsys):
    """Every matrix is the float16 rounding of the original, everything else is bit-equal, and
    what is loaded is float32 again."""
    model, small = golden("hybrid_tdt_ctc_bpe") / "model.nemo", tmp_path / "small.nemo"
    folder = tmp_path / "folder"
    assert converters.nemo2st.main([str(model), "-o", str(folder)]) == 0
    assert converters.st2nemo.main([str(folder), "-o", str(small), "--half"]) == 0
    assert converters.st2nemo.main([str(folder), "-o", str(tmp_path / "full.nemo")]) == 0
    before, after = read_nemo(model), read_nemo(small)
    assert with_data_sections(before.config) == after.config
    assert before.tokenizer_files == after.tokenizer_files
    loaded = load_model(small).state_dict()
    for name, tensor in before.state_dict.items():
        matrix = tensor.dim() > 1 and not name.startswith("preprocessor.")
        assert after.state_dict[name].dtype == (torch.float16 if matrix else tensor.dtype), name
        expected = tensor.half().to(tensor.dtype) if matrix else tensor
        assert torch.equal(loaded[name], expected) and loaded[name].dtype == tensor.dtype, name
    first = small.read_bytes()
    assert len(first) < 0.6 * (tmp_path / "full.nemo").stat().st_size
    assert converters.st2nemo.main([str(folder), "-o", str(small), "--half"]) == 0
    assert small.read_bytes() == first


def test_half_refuses_what_float16_cannot_hold(model, tmp_path, capsys):
    checkpoint = read_checkpoint(model)
    name = next(k for k, t in checkpoint.state_dict.items() if k.endswith("linear1.weight"))
    checkpoint.state_dict[name][0, 0] = 1e5
    write_folder(tmp_path / "folder", checkpoint)
    arguments = [str(tmp_path / "folder"), "-o", str(tmp_path / "out.nemo"), "--half"]
    assert converters.st2nemo.main(arguments) == 1
    assert f"tensor {name} is beyond float16's range" in capsys.readouterr().err
    assert not (tmp_path / "out.nemo").exists()
