"""The 8 kHz front end on 16 kHz weights."""

import numpy as np
import pytest
import soxr
import torch
from conftest import golden

from fastconformer import load_model
from fastconformer.checkpoint.nemo_archive import write_nemo
from fastconformer.checkpoint.read import read_checkpoint
from fastconformer.surgery.sample_rate import with_sample_rate
from training.recipe.sections import LossRecipe, ModelRecipe
from training.setup.start import build_model


@pytest.fixture(params=["hybrid_tdt_ctc_bpe", "tdt_bpe"])
def pair(request):
    """(a golden model of 16 kHz, the same with a front end of 8 kHz)."""
    path = golden(request.param) / "model.nemo"
    narrow = with_sample_rate(load_model(path), 8000)
    return load_model(path), narrow


def speech(seconds=3.0):
    """Something with energy up to 3.4 kHz and none above, at 16 kHz."""
    rng = np.random.default_rng(0)
    noise = soxr.resample(rng.standard_normal(int(seconds * 6800)), 6800, 16000)
    envelope = 0.05 + np.abs(np.sin(np.arange(len(noise)) * 2 * np.pi * 3 / 16000))
    return (0.1 * noise * envelope).astype(np.float32)


def features(model, samples):
    found, lengths = model.featurize(torch.tensor(samples)[None], torch.tensor([len(samples)]))
    return found[0], int(lengths[0])


def test_features_below_4_khz_are_the_same_and_above_are_nothing(pair):
    wide, narrow = pair
    assert (wide.sample_rate, narrow.sample_rate) == (16000, 8000)
    samples = speech()
    expected, frames = features(wide, samples)
    found, narrow_frames = features(narrow, soxr.resample(samples, 16000, 8000))
    assert found.shape == expected.shape and frames == narrow_frames
    config = wide.config.preprocessor
    edges = np.linspace(0, 8000, wide.preprocessor.featurizer.fb.shape[2])
    filters = wide.preprocessor.featurizer.fb[0].numpy()
    top_hz = np.array([edges[np.flatnonzero(row)].max() for row in filters])
    bottom_hz = np.array([edges[np.flatnonzero(row)].min() for row in filters])
    heard, unheard = top_hz < 3300, bottom_hz > 4000
    assert heard.sum() > config.features / 2 and unheard.sum() > config.features / 10
    # equal but for what the window cuts off differently
    assert (found[heard] - expected[heard]).abs().mean() < 0.05
    assert torch.equal(found[unheard], torch.zeros_like(found[unheard]))
    # with 16 kHz the same bins hold the resampler's leftovers at full size
    assert expected[unheard].std() > 0.5


def test_levels_match_too(pair):
    """Without the normalisation, which would hide a wrong scale."""
    wide, narrow = pair
    for model in pair:
        object.__setattr__(model.preprocessor.featurizer.config, "normalize", None)
    samples = speech()
    expected, _ = features(wide, samples)
    found, _ = features(narrow, soxr.resample(samples, 16000, 8000))
    low = slice(2, wide.config.preprocessor.features // 2)
    difference = (found[low] - expected[low])[:, 5:-5]
    assert difference.mean().abs() < 0.05 and difference.abs().mean() < 0.1


def test_it_saves_and_loads_and_nothing_else_moved(pair, tmp_path):
    wide, narrow = pair
    narrow.save(tmp_path / "folder")
    write_nemo(tmp_path / "model.nemo", read_checkpoint(tmp_path / "folder"))
    samples = soxr.resample(speech(), 16000, 8000)
    expected, _ = features(narrow, samples)
    for path in (tmp_path / "folder", tmp_path / "model.nemo"):
        again = load_model(path)
        assert again.sample_rate == 8000
        assert again.config.preprocessor.fft_size == wide.config.preprocessor.fft_size // 2
        assert torch.equal(features(again, samples)[0], expected)
        assert again.config.frame_seconds == wide.config.frame_seconds
        before, after = wide.state_dict(), again.state_dict()
        assert before.keys() == after.keys()
        front = {k for k in before if before[k].shape != after[k].shape}
        assert front == {"preprocessor.featurizer.fb", "preprocessor.featurizer.window"}
        assert all(torch.equal(before[k], after[k]) for k in before.keys() - front)
    # filters that are made from the config alone have the same edges: only their gain differs
    made = type(narrow.preprocessor)(narrow.config.preprocessor).featurizer.fb
    kept = wide.preprocessor.featurizer.fb[:, :, : made.shape[2]]
    assert torch.equal(made > 0, kept > 0)
    torch.testing.assert_close(made, kept)


def test_the_recipe_key():
    path = str(golden("hybrid_tdt_ctc_bpe") / "model.nemo")
    model = build_model(ModelRecipe(init_from=path, sample_rate=8000), LossRecipe(), seed=0)
    assert model.sample_rate == 8000 and model.config.nemo["sample_rate"] == 8000
    text = model.transcribe([soxr.resample(speech(), 16000, 8000)])[0]
    assert text.duration == pytest.approx(3.0, abs=0.01)
    for rate, expected in ((32000, "above the model's 16000"), (11025, "no whole number")):
        with pytest.raises(ValueError, match=expected):
            build_model(ModelRecipe(init_from=path, sample_rate=rate), LossRecipe(), seed=0)
