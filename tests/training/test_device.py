"""What a run says of its device before it begins."""

import pytest
import torch
from conftest import golden

from fastconformer import load, load_model
from fastconformer.process_memory import is_out_of_memory
from training.recipe.recipe import load_recipe
from training.setup import device as device_module
from training.setup import prepare
from training.setup.device import choose_device


@pytest.fixture
def two_gpus(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(device_module, "check_usable", lambda device: None)
    return taken


def test_a_gpu_that_is_not_there_is_one_line(two_gpus, monkeypatch):
    assert choose_device("cuda:1") == torch.device("cuda", 1) == two_gpus.pop()
    assert choose_device("auto") == torch.device("cuda")
    with pytest.raises(
        ValueError, match="trainer.device is cuda:2, but this torch sees only cpu, cuda"
    ):
        choose_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "2")  # torchrun with more processes than GPUs
    with pytest.raises(ValueError, match="cuda:2, but this torch sees only cpu, cuda:0, cuda:1$"):
        choose_device("auto")


@pytest.mark.parametrize("name", ["cuda", "cuda:3", "mps", torch.device("xpu")])
def test_python_names_a_device_that_is_not_there(name):
    if torch.accelerator.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=f"^device is {name}, but this torch sees only cpu$"):
        load_model(golden("hybrid_tdt_ctc_bpe") / "model.nemo", device=name)


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:x"])
def test_python_names_no_device(name):
    with pytest.raises(ValueError, match=f"^device is '{name}', expected cpu, cuda, .*cuda:N$"):
        load_model("model.nemo", device=name)


def test_a_gpu_that_computes_nothing_is_one_line(two_gpus, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nCUDA kernel errors might be")

    monkeypatch.setattr(device_module, "check_usable", load.check_usable)
    monkeypatch.setattr(torch, "zeros", fails)
    with pytest.raises(ValueError, match="cuda:1 cannot be used: CUDA error: no .*available$"):
        choose_device("cuda:1")


def test_memory_that_is_over_by_another_library_splits_a_step_too():
    for who in ("CUDA error", "Triton Error [CUDA]"):
        assert is_out_of_memory(RuntimeError(f"{who}: out of memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


def test_cards_without_bfloat16(monkeypatch):
    for card, slow in (((7, 0), True), ((7, 5), True), ((8, 0), False), ((12, 1), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, card=card: card)
        assert load.is_slow_in_bfloat16(torch.device("cuda", 0)) == slow
    assert not load.is_slow_in_bfloat16(torch.device("cpu"))


def test_bfloat16_on_such_a_card_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(load, "is_slow_in_bfloat16", lambda device: True)
    load._say_slow.cache_clear()
    path = golden("hybrid_tdt_ctc_bpe") / "model.nemo"
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.bfloat16):
        load_model(path, dtype=dtype)
    (record,) = caplog.records
    assert "no bfloat16" in record.getMessage() and "float16 or float32" in record.getMessage()


def test_training_in_bfloat16_on_such_a_card_is_said(monkeypatch, caplog, corpus):
    def enough(*_):
        raise ValueError("enough")

    monkeypatch.setattr(prepare, "is_slow_in_bfloat16", lambda device: True)
    monkeypatch.setattr(prepare, "build_model", enough)
    for precision, n in (("fp32", 0), ("bf16", 1), ("bf16_pure", 1)):
        caplog.clear()
        recipe = load_recipe(corpus[0], [f"trainer.precision={precision}"])
        with pytest.raises(ValueError, match="enough"):
            prepare.prepare_run(recipe)
        assert sum("use fp32" in record.getMessage() for record in caplog.records) == n
