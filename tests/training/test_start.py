"""How a model is made ready: recomputation of its layers, and their compilation."""

import shutil

import pytest
import torch
from train_case import Run, changed, recipe_of

from training.setup.start import read_tokenizer


def saved_bytes(run: Run) -> tuple[int, dict]:
    """Bytes that one forward pass keeps for its backward pass, and the losses."""
    sizes = {}

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = run.gradients()
    return sum(size for pointer, size in sizes.items() if pointer not in own), losses


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"dropout": 0.3}},
        {"model": {"dropout": 0.3}, "trainer": {"precision": "bf16"}},
        {"freeze": {"encoder_layers": 1, "batch_norm": "affine"}, "model": {"dropout": 0.3}},
        {"lora": {"rank": 2, "dropout": 0.3}},
    ],
    ids=["dropout", "bf16", "frozen", "lora"],
)
def test_recomputed_layers_give_the_same(sections):
    runs = []
    for on in (False, True):
        trainer = sections.get("trainer", {}) | {"activation_checkpointing": on}
        runs.append(Run(recipe_of(**(sections | {"trainer": trainer}))))
    kept, losses = zip(*(saved_bytes(run) for run in runs), strict=True)
    assert losses[0] == losses[1]
    for (name, one), two in zip(
        runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True
    ):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad), name
    assert kept[1] < 0.8 * kept[0]
    for run in runs:
        run.steps(3)
    # BatchNorm has seen every batch once
    assert not changed(runs[0].state(), runs[1].state())
    assert runs[0].losses == runs[1].losses


def test_nothing_is_recomputed_in_evaluation():
    run = Run(recipe_of(trainer={"activation_checkpointing": True}))
    calls = []
    run.model.encoder.layers[0].register_forward_pre_hook(lambda *a: calls.append(1))
    batch = run.batches[0]
    features = run.model.featurize(batch.audio, batch.audio_lengths)
    with torch.no_grad():
        run.model.eval().encode(*features)
    assert calls == [1]
    run.gradients()
    assert calls == [1, 1, 1]  # forward, and again in backward


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) is here")
def test_compiled_layers_give_the_same():
    plain = Run(recipe_of()).steps(3)
    compiled = Run(recipe_of(trainer={"compile": True})).steps(3)
    assert all(layer._compiled_call_impl is not None for layer in compiled.model.encoder.layers)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_text_file_of_another_encoding_is_named(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes("ä\nö\n".encode("latin-1"))
    with pytest.raises(ValueError, match="labels.txt is not UTF-8"):
        read_tokenizer(str(path))
    path.write_text("ä\nö\n\n", encoding="utf-8-sig")  # as editors on Windows save it
    assert read_tokenizer(str(path))[0].pieces == ["ä", "ö", " "]
