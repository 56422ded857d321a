"""Archives that we wrote, restored by real NeMo, compute what the originals compute.

Needs an environment with NeMo beside ours; FASTCONFORMER_NEMO_PYTHON names its Python:

    FASTCONFORMER_NEMO_PYTHON=nemo-venv/bin/python pytest tests/checkpoint/test_nemo_roundtrip.py
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import golden

from converters import nemo2st, st2nemo
from fastconformer.checkpoint.nemo_archive import read_nemo
from fastconformer.config.changes import with_data_sections
from training.recipe.sections import LossRecipe, ModelRecipe
from training.setup.start import build_model

ROOT = Path(__file__).parents[2]
BASE = ROOT / "models/base_tiny.nemo"

CASES = [
    "ctc_bpe",
    "rnnt_bpe",
    "tdt_bpe",
    "hybrid_tdt_ctc_bpe",
    "hybrid_rnnt_ctc_bpe",
    "local_attn_g0",
    "local_attn_g1",
    "stream_chunked_hybrid_rnnt",
    "striding4_ctc_char",
    "hybrid_tdt_char",
    "reduction_striding",
    "canary_flash_agg",
    "canary_v2_unified",
    "canary_v1_agg",
]


def there_and_back(archive: Path, folder: Path) -> Path:
    """archive -> converted folder -> archive, by the two commands."""
    converted, back = folder / archive.parent.name, folder / f"{archive.parent.name}.nemo"
    assert nemo2st.main([str(archive), "-o", str(converted)]) == 0
    assert st2nemo.main([str(converted), "-o", str(back)]) == 0
    return back


@pytest.mark.parametrize("case", CASES)
def test_tensors_config_and_tokenizer_survive(case, tmp_path):
    archive = golden(case) / "model.nemo"
    before, after = read_nemo(archive), read_nemo(there_and_back(archive, tmp_path))
    assert after.config == with_data_sections(before.config)
    assert after.tokenizer_files == before.tokenizer_files
    assert after.state_dict.keys() == before.state_dict.keys()
    for name, tensor in before.state_dict.items():
        assert tensor.dtype == after.state_dict[name].dtype, name
        assert torch.equal(tensor, after.state_dict[name]), name


def test_the_base_has_what_nemo_reads_to_transcribe_paths():
    config = read_nemo(BASE).config
    assert config == with_data_sections(config)


def from_scratch(folder: Path) -> Path:
    """An archive of a model that never was NeMo's."""
    files = read_nemo(BASE).tokenizer_files
    (folder / "tokenizer.model").write_bytes(files["tokenizer.model"])
    recipe = ModelRecipe(
        config=str(ROOT / "recipes/base_tiny_model.yaml"), tokenizer=str(folder / "tokenizer.model")
    )
    build_model(recipe, LossRecipe(), seed=1).save(folder / "saved")
    assert st2nemo.main([str(folder / "saved"), "-o", str(folder / "model.nemo")]) == 0
    return folder / "model.nemo"


@pytest.fixture(scope="module")
def nemo_verdicts(tmp_path_factory):
    """{case: differences} from one NeMo process, whose import alone takes many seconds."""
    python = os.environ.get("FASTCONFORMER_NEMO_PYTHON")
    if not python:
        pytest.skip("FASTCONFORMER_NEMO_PYTHON is not set: the path of a Python that has NeMo")
    folder, paths = tmp_path_factory.mktemp("roundtrip"), {str(BASE): str(BASE)}
    (folder / "scratch").mkdir()
    scratch = str(from_scratch(folder / "scratch"))
    paths[scratch] = scratch
    for case in CASES:
        try:
            archive = golden(case) / "model.nemo"
        except pytest.skip.Exception:
            continue
        paths[str(archive)] = str(there_and_back(archive, folder))
    script = Path(__file__).with_name("nemo_restore.py")
    pairs = [path for pair in paths.items() for path in pair]
    done = subprocess.run(
        [python, script, *pairs], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {Path(line["original"]).parent.name: line["differences"] for line in lines}


@pytest.mark.parametrize("case", [*CASES, "models", "scratch"])
def test_nemo_restores_ours(case, nemo_verdicts):
    if case in CASES:
        golden(case)
    assert nemo_verdicts[case] == []
