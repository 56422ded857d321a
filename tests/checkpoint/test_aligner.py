"""The second model that some archives hold for words' times: kept, and checked like the first."""

import io
import tarfile

import pytest
import torch
from conftest import golden

from converters import nemo2st, st2nemo
from fastconformer import load_model
from fastconformer.checkpoint import read_checkpoint
from fastconformer.config.changes import with_data_sections


def archive_with(tmp_path, change):
    """The golden archive, each member through `change(name, content)`; None leaves it out."""
    path = tmp_path / "changed.nemo"
    with (
        tarfile.open(golden("canary_v2_unified") / "model.nemo") as tar,
        tarfile.open(path, "w") as out,
    ):
        for member in tar:
            if member.isreg():
                content = change(member.name, tar.extractfile(member).read())
                if content is not None:
                    info = tarfile.TarInfo(member.name)
                    info.size = len(content)
                    out.addfile(info, io.BytesIO(content))
    return path


def same(a, b):
    assert a.config == b.config and a.tokenizer_files == b.tokenizer_files
    assert a.state_dict.keys() == b.state_dict.keys()
    assert all(torch.equal(a.state_dict[name], b.state_dict[name]) for name in a.state_dict)
    assert not a.dropped and not b.dropped
    if a.aligner or b.aligner:
        same(a.aligner, b.aligner)


def test_it_goes_there_and_back(tmp_path):
    archive = golden("canary_v2_unified") / "model.nemo"
    before = read_checkpoint(archive)
    assert before.aligner.config["target"].endswith("EncDecCTCModelBPE")
    assert nemo2st.main([str(archive), "-o", str(tmp_path / "folder")]) == 0
    assert (tmp_path / "folder" / "timestamps_asr_model" / "config.json").is_file()
    assert st2nemo.main([str(tmp_path / "folder"), "-o", str(tmp_path / "back.nemo")]) == 0
    before.config = with_data_sections(before.config)
    same(before, read_checkpoint(tmp_path / "back.nemo"))
    model = load_model(tmp_path / "back.nemo")
    assert model.aligner.heads == ("ctc",)
    assert not any(name.startswith("aligner") for name in model.state_dict())
    model.save(tmp_path / "saved")
    model.save(tmp_path / "saved")  # over itself
    same(before, read_checkpoint(tmp_path / "saved"))


def test_a_folder_without_one_takes_none_of_another(tmp_path):
    load_model(golden("canary_v2_unified") / "model.nemo").save(tmp_path / "model")
    load_model(golden("canary_flash_agg") / "model.nemo").save(tmp_path / "model")
    assert load_model(tmp_path / "model").aligner is None


def test_damage_is_named(tmp_path, capsys):
    def cut(name, content):
        return content[:2000] if name.endswith("asr_model_weights.ckpt") else content

    def without(name, content):
        return None if name.endswith("asr_model_weights.ckpt") else content

    def another(name, content):
        member = name.endswith("asr_model_config.yaml")
        return content.replace(b"d_model: 32", b"d_model: 64") if member else content

    for change, reason in (
        (cut, "the CTC model for times: timestamps_asr_model_weights.ckpt is damaged"),
        (without, "the CTC model for times: no timestamps_asr_model_weights.ckpt"),
        (another, "the CTC model for times: the checkpoint does not fit its config"),
    ):
        path = archive_with(tmp_path, change)
        with pytest.raises(ValueError, match=reason):
            load_model(path)
        assert nemo2st.main([str(path), "-o", str(tmp_path / "folder")]) == 1
        said = capsys.readouterr().err
        assert reason in said and said.count("\n") == 1
        assert not (tmp_path / "folder").exists()
