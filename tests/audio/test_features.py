"""Log-mel features of every option set against NeMo 3.0.0 and, with reflection padding, 2.4.1."""

import pytest
import torch
from conftest import load_case

import fastconformer
from fastconformer.audio.fbank import Fbank
from fastconformer.audio.features import Preprocessor
from fastconformer.config import PreprocessorConfig
from fastconformer.config.preprocessor import FbankConfig


def build(config, stft_pad="zeros"):
    return Preprocessor(PreprocessorConfig(**config), stft_pad).eval()


def largest_difference(actual, expected, n):
    """Over the first n frames of (M, T) features; 0 where there is no frame."""
    return float((actual[:, :n] - expected[:, :n]).abs().max()) if n else 0.0


def ill_conditioned(config, clip):
    """Silence: the deviation is 0 + 1e-5, which amplifies rounding 100,000 times."""
    return not clip.any() and config["normalize"] in ("per_feature", "all_features")


@pytest.mark.parametrize(
    "version, stft_pad", [("preprocessor", "zeros"), ("nemo-2.4.1/preprocessor", "reflect")]
)
def test_against_nemo(version, stft_pad):
    case = load_case(version)
    limit = case.expected["suggested_tolerance"]["features_abs"]
    checked = 0
    for name, entry in case.expected["configs"].items():
        config = entry["config"]
        audio = case.tensors[f"audio_{config['sample_rate']}"]
        lengths = case.tensors[f"audio_len_{config['sample_rate']}"]
        preprocessor = build(config, stft_pad)
        for i, length in enumerate(lengths.tolist()):
            single, clip = case.tensors.get(f"{name}/single_{i}"), audio[i : i + 1, :length]
            if single is None or ill_conditioned(config, clip):
                continue
            if stft_pad == "reflect" and length <= preprocessor.featurizer.config.fft_size // 2:
                continue  # NeMo 2.4 could not do it either
            features, frames = preprocessor(clip, lengths[i : i + 1])
            assert features[0].shape == single.shape, (name, i)  # `pad_to` too
            assert largest_difference(features[0], single, int(frames)) <= limit, (name, i)
            checked += 1
        if stft_pad == "reflect":  # 2.4 gave a clip other features in a batch than alone:
            longest = int(lengths.argmax())  # only the longest one is comparable
            audio, lengths = audio[longest : longest + 1], lengths[longest : longest + 1]
            expected = case.tensors[f"{name}/features"][longest : longest + 1]
        else:
            expected = case.tensors[f"{name}/features"]
        features, frames = preprocessor(audio, lengths)
        assert features.shape == expected.shape, name
        for i, n in enumerate(frames.tolist()):
            if not ill_conditioned(config, audio[i]):
                assert largest_difference(features[i], expected[i], n) <= limit, (name, i)
                checked += 1
        if stft_pad == "zeros":
            assert frames.tolist() == entry["features_len"], name
    assert checked > (90 if stft_pad == "zeros" else 30)


@pytest.mark.parametrize("stft_pad", ["zeros", "reflect"])
def test_a_clip_alone_equals_the_clip_in_a_batch(stft_pad):
    torch.manual_seed(0)
    lengths = torch.tensor([8000, 5003, 700])
    audio = torch.randn(3, 8000) * 0.1
    audio *= torch.arange(8000) < lengths[:, None]
    preprocessor = build({"normalize": "per_feature", "features": 40, "pad_to": 0}, stft_pad)
    together, frames = preprocessor(audio, lengths)
    for i, length in enumerate(lengths.tolist()):
        alone, n = preprocessor(audio[i : i + 1, :length], lengths[i : i + 1])
        assert int(n) == int(frames[i])
        assert torch.allclose(alone[0, :, : int(n)], together[i, :, : int(n)], atol=1e-4)


def test_transcribing_adds_no_padding():
    """As NeMo's transcribe(). A group norm sees all of time, so that padding would change it."""
    case = load_case("striding4_ctc_char")
    model = fastconformer.load_model(case.folder / "model.nemo")
    samples = case.tensors["audio"][0]
    [without] = model.transcribe(samples)
    object.__setattr__(model.config.preprocessor, "pad_to", 512)
    assert model.featurize(samples[None], case.tensors["audio_len"][:1])[0].shape[2] == 512
    [still_without] = model.transcribe(samples)
    assert still_without.score == without.score and still_without.tokens == without.tokens


@pytest.mark.parametrize("normalize", ["all_features", "per_feature"])
def test_digital_silence_is_zero_in_any_batch(normalize):
    """Its deviation is 0, so that a rounding of the mean would be blown up by the guard, 1e-5."""
    preprocessor = build({"normalize": normalize, "features": 80, "pad_to": 0, "dither": 0.0})
    for length in (8000, 16000, 33333):
        audio = torch.zeros(2, 48000)
        audio[1] = torch.randn(48000, generator=torch.Generator().manual_seed(0)) * 0.1
        alone, n = preprocessor(audio[:1, :length], torch.tensor([length]))
        together, _ = preprocessor(audio, torch.tensor([length, 48000]))
        assert not alone[0, :, : int(n)].any() and not together[0, :, : int(n)].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_features_what_they_are(dtype):
    """A spectrum's power loses digits in such a type, and float16 ends at 65504."""
    audio = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    front_ends = Preprocessor(PreprocessorConfig(dither=0.0)), Fbank(FbankConfig(dither=0.0))
    for front_end in front_ends:
        expected, _ = front_end(audio, torch.tensor([8000]))
        with torch.autocast("cpu", dtype=dtype):
            actual, _ = front_end(audio, torch.tensor([8000]))
        assert torch.equal(actual, expected)
