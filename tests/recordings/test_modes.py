"""A model in training mode transcribes as one in eval mode, and is left as it was."""

import numpy as np
import pytest
import torch
from conftest import golden

import fastconformer


@pytest.fixture
def model():
    return fastconformer.load_model(golden("hybrid_tdt_ctc_bpe") / "model.nemo")


@pytest.fixture
def clip():
    noise = np.random.default_rng(1).standard_normal(48000)
    return (0.1 * noise * np.sin(np.arange(48000) / 2000)).astype(np.float32)


@pytest.mark.parametrize("long", ["local", "full", "chunks"])
def test_no_dropout_while_transcribing(model, clip, long):
    joint_dropout = [m for m in model.joint.modules() if isinstance(m, torch.nn.Dropout)]
    assert joint_dropout  # or nothing here could differ
    for dropout in joint_dropout:
        dropout.p = 0.5
    expected = [model.transcribe(clip, head=head, long=long)[0] for head in model.heads]
    model.train()
    model.encoder.layers[0].eval()  # a frozen part
    modes = {name: module.training for name, module in model.named_modules()}
    for _ in range(3):
        found = [model.transcribe(clip, head=head, long=long)[0] for head in model.heads]
        assert [t.score for t in found] == [t.score for t in expected]
        assert [t.tokens for t in found] == [t.tokens for t in expected]
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_alignment_leaves_the_mode_too(model, clip):
    text = model.tokenizer.decode([5, 9, 20])
    expected = model.align(clip, text)
    model.train()
    model.encoder.layers[1].eval()
    assert model.align(clip, text) == expected
    assert model.training and not model.encoder.layers[1].training
