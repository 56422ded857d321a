"""Kaldi features with stacked frames, against FunASR's WavFrontend and against float64."""

import math

import numpy as np
import pytest
import soundfile
import torch
from conftest import golden, load_case

from fastconformer.audio.fbank import FLOOR, WINDOWS, Fbank, kaldi_filters
from fastconformer.config.preprocessor import FBANK_WINDOWS, FbankConfig

RATES = {"": 16000, "_8k": 8000}


def front_end(rate, **options):
    return Fbank(FbankConfig(sample_rate=rate, dither=0.0, **options)).eval()


def clips(suffix, numbers):
    folder = golden("fun_asr_nano_tiny") / "audio"
    found = [soundfile.read(folder / f"clip_{i}{suffix}.wav", dtype="float32")[0] for i in numbers]
    lengths = torch.tensor([len(clip) for clip in found])
    audio = torch.zeros(len(found), int(lengths.max()))
    for row, clip in zip(audio, found, strict=True):
        row[: len(clip)] = torch.from_numpy(clip)
    return audio, lengths


@pytest.mark.parametrize(("suffix", "numbers"), [("", range(4)), ("_8k", range(2, 4))])
def test_features_are_the_reference_s_at_both_rates(suffix, numbers):
    case = load_case("fun_asr_nano_tiny")
    features, lengths = front_end(RATES[suffix])(*clips(suffix, numbers))
    expected = case.tensors[f"features{suffix}"].transpose(1, 2)
    assert lengths.tolist() == case.tensors[f"features_len{suffix}"].tolist()
    # half of what the reference's own two backends differ by, times ten: logs of near-empty bins
    atol = case.expected["suggested_tolerance"]["features"] / 2
    for row, wanted, length in zip(features, expected, lengths.tolist(), strict=True):
        torch.testing.assert_close(row[:, :length], wanted[:, :length], rtol=0, atol=atol)
        assert not row[:, length:].any()


@pytest.mark.parametrize("n_samples", [400, 480, 1000])
def test_short_clips(n_samples):
    case = load_case("fun_asr_nano_tiny")
    samples = clips("", [0])[0][0, 8000 : 8000 + n_samples]
    features, _ = front_end(16000)(samples[None], torch.tensor([n_samples]))
    wanted = case.tensors[f"features_short_{n_samples}"].T
    torch.testing.assert_close(features[0], wanted, rtol=0, atol=1e-3)


def test_rows_hold_the_frames_that_the_reference_stacks():
    fbank = front_end(16000)
    for count, rows in load_case("fun_asr_nano_tiny").expected["lfr_indices_by_frames"].items():
        numbers = torch.arange(float(count)).expand(1, 80, -1)
        stacked, lengths = fbank.stack(numbers, torch.tensor([int(count)]))
        assert lengths.tolist() == [len(rows)]
        assert stacked[0].reshape(7, 80, -1)[:, 0].T.tolist() == rows


def test_a_clip_alone_equals_the_clip_in_a_batch():
    fbank = front_end(16000)
    audio, lengths = clips("", range(4))
    together, rows = fbank(audio + torch.where(audio == 0, 0.1, 0.0), lengths)  # padding with noise
    for i, length in enumerate(lengths.tolist()):
        alone, n_rows = fbank((audio + torch.where(audio == 0, 0.1, 0.0))[i : i + 1, :length],
                              lengths[i : i + 1])  # fmt: skip
        assert n_rows[0] == rows[i]
        assert torch.equal(alone[0], together[i, :, : n_rows[0]])


def test_a_frame_in_float64_by_hand():
    rate, size = 16000, 512
    generator = np.random.default_rng(0)
    samples = generator.normal(size=400) * 0.1
    x = samples * 32768
    x = x - x.mean()
    x = np.concatenate(([x[0] - 0.97 * x[0]], x[1:] - 0.97 * x[:-1]))
    x = x * (0.54 - 0.46 * np.cos(2 * np.pi * np.arange(400) / 399))
    power = np.abs(np.fft.rfft(x, size)) ** 2
    mel = 1127 * np.log(1 + np.arange(257) * rate / size / 700)
    low, high = 1127 * math.log(1 + 20 / 700), 1127 * math.log(1 + 8000 / 700)
    edges = np.linspace(low, high, 82)
    wanted = []
    for left, center, right in zip(edges, edges[1:], edges[2:], strict=False):
        weight = np.minimum((mel - left) / (center - left), (right - mel) / (right - center))
        wanted.append(math.log((np.maximum(weight, 0) * power)[:256].sum()))
    found, _ = front_end(rate).frames(torch.tensor(samples[None]), torch.tensor([400]))
    np.testing.assert_allclose(found[0, :, 0].numpy(), wanted, atol=2e-4)


def test_silence_is_the_floor_and_shorter_than_a_window_is_one_frame():
    fbank = front_end(16000)
    features, lengths = fbank(torch.zeros(3, 100), torch.tensor([0, 1, 100]))
    assert lengths.tolist() == [0, 1, 1]
    assert torch.allclose(features[1:], torch.tensor(math.log(FLOOR)))


def test_kept_filters_hear_a_tone_as_at_16_khz():
    kept, wide = front_end(8000, high_hz=8000.0), front_end(16000)
    seconds = torch.arange(16000) / 16000
    for hz in (200.0, 1000.0, 3000.0):
        tone = 0.3 * torch.sin(2 * math.pi * hz * seconds)[None]
        of_wide, _ = wide.frames(tone, torch.tensor([16000]))
        narrow = 0.3 * torch.sin(2 * math.pi * hz * torch.arange(8000) / 8000)[None]
        of_kept, _ = kept.frames(narrow, torch.tensor([8000]))
        loud = of_wide[0, :, 50].argmax()
        assert of_kept[0, :, 50].argmax() == loud
        assert abs(of_kept[0, loud, 50] - of_wide[0, loud, 50]) < 0.05
    top = kaldi_filters(16000, 512, 80, 20.0, 8000.0)[:, :129].sum(1) == 0
    assert torch.equal(kept.filters.sum(1) == 0, top)  # those above 4 kHz, and no other
    assert 0 < int(top.sum()) < 40


def test_dither_is_for_training_alone():
    fbank = Fbank(FbankConfig(dither=1.0))
    audio, lengths = torch.zeros(1, 1600), torch.tensor([1600])
    assert not torch.equal(*(fbank.train()(audio, lengths)[0] for _ in range(2)))
    assert torch.equal(*(fbank.eval()(audio, lengths)[0] for _ in range(2)))


@pytest.mark.parametrize(
    "options",
    [
        {"window": "kaiser"},
        {"sample_rate": 0},
        {"hop_s": 0.0},
        {"high_hz": 9000.0},
        {"n_mels": 0},
    ],
)
def test_a_front_end_that_makes_no_sense_is_refused(options):
    with pytest.raises(ValueError):
        FbankConfig(**options)


def test_every_window_that_a_config_may_name_is_there():
    assert tuple(WINDOWS) == FBANK_WINDOWS
