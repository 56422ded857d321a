"""A front end of another sample rate on the same weights: 8 kHz audio into a 16 kHz model.

A model of 16 kHz that is given 8 kHz audio resampled to 16 kHz sees nothing above 4 kHz but the
resampler's leftovers, which `normalize: per_feature` blows up to full size. With a front end of
8 kHz, the spectrum has the same bins below 4 kHz and none above, and mel filters keep the edges
that they had: those above 4 kHz are empty and give a constant, which the normalisation turns into
zeros. Frames, encoder and vocabulary stay as they were.
"""

import copy
import math

import torch

from ..audio.features import Preprocessor
from ..config import ModelConfig, PreprocessorConfig


def with_sample_rate(model, rate_hz: int):
    """A model with a front end of a lower rate over the same tensors; the given one at its own.

    What changes in its config is NeMo's own: `sample_rate`, `preprocessor.sample_rate`, `n_fft` and
    the window's and hop's samples in proportion; `highfreq` stays where it was, above half of the
    new rate, so that the filters that are made from the config have the old edges too;
    `log_zero_guard_value` grows by about 1 %, as `_exact_guard` says. The stored
    filters `preprocessor.featurizer.fb` are those times the power that the new rate changes: the
    window has fewer samples, and pre-emphasis of neighbouring samples has another slope. They are
    part of the checkpoint; NeMo, like us, loads them over those that it makes from the config.

    Raises:
        ValueError: the rate is above the model's, or does not divide its window evenly.
    """
    old = model.config.preprocessor
    if rate_hz == old.sample_rate:
        return model
    if rate_hz > old.sample_rate:
        raise ValueError(
            f"model.sample_rate is {rate_hz}, above the model's {old.sample_rate}; leave it "
            "out, data of a higher rate is resampled to the model's"
        )
    config = copy.deepcopy(model.config.nemo)
    section = config["preprocessor"]
    samples = {
        "n_fft": old.fft_size,
        "n_window_size": old.window_samples,
        "n_window_stride": old.hop_samples,
    }
    for key, count in samples.items():
        if count * rate_hz % old.sample_rate:
            raise ValueError(
                f"model.sample_rate is {rate_hz}: {key} of {count} samples at {old.sample_rate} Hz "
                "is no whole number of them; take a half or a quarter of the model's rate"
            )
        scaled = count * rate_hz // old.sample_rate
        if key == "n_fft" or section.get(key):  # NeMo takes seconds or samples, not both
            section[key] = scaled
    section["sample_rate"] = rate_hz
    section["log_zero_guard_value"] = _exact_guard(old.log_zero_guard_value)
    section["highfreq"] = old.highfreq or old.sample_rate / 2
    for holder in (config, *(config.get(f"{part}_ds") for part in ("train", "validation", "test"))):
        if isinstance(holder, dict) and holder.get("sample_rate") is not None:
            holder["sample_rate"] = rate_hz
    config = ModelConfig.from_nemo(config)
    filters, new = model.preprocessor.featurizer.fb, config.preprocessor
    preprocessor = Preprocessor(new, model.preprocessor.featurizer.stft_pad)
    bins = new.fft_size // 2 + 1
    gain = _power_response(old, bins) / _power_response(new, bins)
    mapped = (filters[:, :, :bins].double() * gain).to(filters.dtype)
    preprocessor.featurizer.fb.copy_(mapped)
    state = preprocessor.state_dict().items()
    return model.changed(config, {f"preprocessor.{name}": tensor for name, tensor in state})


def _exact_guard(guard: float | str) -> float:
    """The next number up whose logarithm is a multiple of 1/8.

    The logarithm of the guard is what an empty filter gives in every frame. Its mean over the
    frames must come out exact in float32, or the normalisation divides the rounding error by the
    1e-5 that stands for a deviation of zero, and the constant differs from clip to clip.
    """
    if isinstance(guard, str):
        guard = getattr(torch.finfo(torch.float32), guard)
    return math.exp(math.ceil(math.log(guard) * 8) / 8)


def _power_response(config: PreprocessorConfig, bins: int) -> torch.Tensor:
    """What pre-emphasis and window do to the power of a sine, at each of the first bins, (F,)."""
    hz = torch.arange(bins, dtype=torch.float64) * config.sample_rate / config.fft_size
    angle = 2 * torch.pi * hz / config.sample_rate
    weight = config.preemph or 0.0
    emphasis = 1 + weight**2 - 2 * weight * torch.cos(angle)
    return (emphasis * config.window_samples**2) ** (config.mag_power / 2)
