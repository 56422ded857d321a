"""torch's default device and dtype, which other code of a process may set: no number moves."""

import numpy as np
import pytest
import torch
from conftest import golden

import fastconformer

CASES = ["hybrid_tdt_ctc_bpe", "stream_ctc", "canary_flash_agg", "birwkv7_encoder"]


@pytest.mark.parametrize("case", CASES)
def test_torchs_defaults_change_nothing(case):
    """A device that holds no numbers stands for any other."""
    clip = np.random.default_rng(0).standard_normal(24000).astype(np.float32) / 9
    expected = _texts(case, clip)
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            assert _texts(case, clip) == expected
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("meta")
        assert _texts(case, clip) == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("case", ["hybrid_tdt_ctc_bpe/model.nemo", "fun_asr_nano_tiny"])
def test_a_cast_model_keeps_its_front_end(case):
    """As `load_model(dtype=...)` does: float16's window and filters would make other features."""
    model = fastconformer.load_model(golden(case.split("/")[0]) / case.partition("/")[2])
    audio, lengths = torch.randn(1, 16000) / 9, torch.tensor([16000])
    expected = model.featurize(audio, lengths)[0]
    for cast in (model.half, model.bfloat16, model.float, lambda: model.to("cpu", torch.float16)):
        assert torch.equal(cast().featurize(audio, lengths)[0], expected)
    assert model.to_empty(device="meta") is model


def _texts(case: str, clip: np.ndarray) -> list:
    model, found = fastconformer.load_model(golden(case) / "model.nemo"), []
    for head in model.heads:
        options = {"head": head, "timestamps": head != "aed"}
        found += model.transcribe([clip, clip[:9000]], **options)
        found += model.transcribe([clip], beam=2, **options)
    if case == "stream_ctc":
        stream = model.stream()
        stream.feed(clip[:9000])
        stream.feed(clip[9000:])
        found.append(stream.finish())
    return [(transcript.text, transcript.tokens, transcript.words) for transcript in found]
