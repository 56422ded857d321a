"""Memory while a checkpoint is loaded in half precision."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.random_model import TOKENIZER, parakeet
from fastconformer import ASRModel, ModelConfig
from fastconformer.checkpoint import Checkpoint, write_folder
from fastconformer.checkpoint.files import give_back
from fastconformer.checkpoint.nemo_archive import write_nemo
from fastconformer.text.tokenizer import load_tokenizer

MEASURE = """
import sys, torch, fastconformer
def memory(key):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(key)).split()[1]) << 10
torch.set_num_threads(1)
fastconformer.load_model(sys.argv[2], dtype=torch.bfloat16)  # what loading itself needs
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
before = memory("VmRSS")
model = fastconformer.load_model(sys.argv[1], dtype=torch.bfloat16)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_bfloat16_takes_little_more_than_the_checkpoint(tmp_path):
    config, files = parakeet(TOKENIZER, 2, 512, 80, 1)
    model = ASRModel(ModelConfig.from_nemo(config), load_tokenizer(config, files), files)
    state = model.state_dict()
    size = sum(tensor.nbytes for tensor in state.values())
    checkpoint = Checkpoint(config, state, files)
    del model, state
    write_nemo(tmp_path / "big.nemo", checkpoint)
    write_folder(tmp_path / "big", checkpoint)
    for name in ("big.nemo", "big"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, tmp_path / name, TOKENIZER],
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(done.stdout) < 1.1 * size, f"{name}: {int(done.stdout) / size:.2f} of its size"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's advice")
def test_what_is_given_back_is_not_lost(tmp_path):
    path = tmp_path / "numbers"
    expected = torch.randn(1 << 20)
    path.write_bytes(expected.numpy().tobytes())
    mapped = torch.from_file(str(path), size=1 << 20, dtype=torch.float32)
    mapped[5] = 7.0  # in memory alone: the mapping is private
    expected[5] = 7.0
    alone = expected.clone()
    for tensor in (mapped, alone, mapped[::2], mapped[:3]):
        give_back(tensor)
    assert torch.equal(mapped, expected) and torch.equal(alone, expected)
    assert os.path.getsize(path) == expected.nbytes
