"""The step of few kernels in Triton's interpreter, against the plain one."""

import pytest
import torch
from conftest import load_case

pytest.importorskip("triton", reason="triton is not installed")

import fastconformer
from fastconformer.decoding import fused_step, triton_step
from fastconformer.decoding.label_loop import LabelLoop

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it compiled")


@interpreted
@pytest.mark.parametrize(
    ("name", "max_symbols", "biased"),
    [("hybrid_tdt_ctc_bpe", 2, True), ("hybrid_rnnt_ctc_bpe", None, False)],
)
@torch.no_grad()
def test_steps_equal_the_plain_ones(name, max_symbols, biased, monkeypatch):
    case = load_case(name)
    model = fastconformer.load_model(case.folder / "model.nemo")
    encoded = case.tensors["encoded"][:2, :16].contiguous()
    lengths = torch.tensor([16, 5])
    bias = None
    if biased:
        bias = torch.randn(model.blank_id + 1, generator=torch.Generator().manual_seed(0))
        bias[::3] = float("-inf")  # tokens that are not allowed
        bias[-1] = -4.0  # less blank
    durations = model.config.loss.durations
    found = []
    for fused in (False, True):
        monkeypatch.setattr(fused_step, "usable", lambda loop, fused=fused: fused)
        options = model.decoder, model.joint, model.blank_id, durations, max_symbols, bias, None
        loop = LabelLoop(*options, 2, 3, n_steps=7)
        loop.projected = model.joint.enc(encoded).flatten(0, 1)
        loop.starts.copy_(loop.rows * encoded.shape[1])
        loop.begin(lengths)
        for i in range(7):
            loop.step(i)
        found.append((loop.int_records, loop.float_records[:, 0], loop.state()))
    spoken = found[0][0][:, 0] >= 0
    assert spoken.sum() >= 3 and not spoken.all()
    for actual, expected in zip(found[1][2], found[0][2], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1][spoken], found[0][1][spoken], rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("n_durations", [0, 3, 4])
def test_logits_that_are_no_numbers_name_tokens_and_durations_that_exist(n_durations):
    """Or memory behind the durations would move a clip to a frame anywhere."""
    logits = torch.full((2, 9 + n_durations), torch.nan)
    tokens, classes, _ = triton_step.read_logits(logits, None, 9)
    assert tokens.min() >= 0 and tokens.max() < 9
    assert classes.min() >= 0 and classes.max() < max(1, n_durations)
