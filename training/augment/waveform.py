"""Augmentation of waveforms, training only: room, noise, voices, hum, level and telephone line.

`WaveAugment` takes a clip and the key of its draw, and gives the clip as that draw hears it. What
it does follows from (seed, epoch, draw) alone, and each lever has a generator of its own: the same
for any number of workers, and switching one lever on does not change what the others do.

Speed is not here but in `change_speed`: it changes the duration, which batches are made by, so the
plan of an epoch decides it. Letters of shapes: L samples.
"""

from collections.abc import Callable

import numpy as np
import soxr

from training.augment.telephone import telephone
from training.recipe.data_sections import AugmentRecipe

HUM_HARMONICS = 12


def change_speed(samples: np.ndarray, factor: float) -> np.ndarray:
    """Faster (above 1) or slower, pitch included: (L,) -> (about L / factor,), by resampling.

    Source: Ko et al. 2015, Audio augmentation for speech recognition; sox's `speed`.
    """
    return samples if factor == 1 else soxr.resample(samples, factor, 1.0, quality="HQ")


def change_gain(samples: np.ndarray, db: float) -> np.ndarray:
    return samples * np.float32(10 ** (db / 20))


def shift(samples: np.ndarray, count: int) -> np.ndarray:
    """Later by `count` samples (earlier if negative), silence behind; the length stays."""
    moved = np.zeros_like(samples)
    if count >= 0:
        moved[count:] = samples[: len(samples) - count]
    else:
        moved[:count] = samples[-count:]
    return moved


def add_at_snr(samples: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """samples + noise, both (L,), with the noise scaled to the ratio of their mean powers."""
    signal, disturbance = power(samples), power(noise)
    if not signal or not disturbance:  # silence has no ratio to anything
        return samples
    scale = np.sqrt(signal / disturbance * 10 ** (-snr_db / 10))
    return samples + np.float32(scale) * noise


def power(samples: np.ndarray) -> float:
    return float(np.mean(np.square(samples, dtype=np.float64))) if len(samples) else 0.0


def section(samples: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """`length` samples from a random place, repeated when there are too few."""
    start = int(rng.integers(len(samples)))
    if len(samples) >= length:
        start = int(rng.integers(len(samples) - length + 1))
        return samples[start : start + length]
    return np.resize(np.roll(samples, -start), length)


def reverberate(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """The clip in a room, (L,) -> (L,): its direct sound stays in place, its power as it was.

    Args:
        response: the room's impulse response, (K,); its highest peak is the direct sound.
    """
    direct = int(np.argmax(np.abs(response)))
    size = 1 << (len(samples) + len(response) - 1).bit_length()
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(response, size), size)
    wet = wet[direct : direct + len(samples)].astype(np.float32)
    before, after = power(samples), power(wet)
    return wet * np.float32(np.sqrt(before / after)) if before and after else samples


def mains_hum(length: int, rate_hz: int, mains_hz: int, rng: np.random.Generator) -> np.ndarray:
    """A mains frequency with its harmonics in random phases and falling strength, (length,)."""
    phases, strengths = rng.uniform(0, 2 * np.pi, HUM_HARMONICS), rng.uniform(0.3, 1, HUM_HARMONICS)
    time_s = np.arange(rate_hz) / rate_hz  # whole Hz: every second is like the first
    second = np.zeros(rate_hz)
    for number in range(1, HUM_HARMONICS + 1):
        if number * mains_hz < rate_hz / 2:
            wave = np.sin(2 * np.pi * number * mains_hz * time_s + phases[number - 1])
            second += strengths[number - 1] / number * wave
    return np.resize(second.astype(np.float32), length)


class WaveAugment:
    """The recipe's levers on one clip.

    Args:
        noises, responses, voices: (number of clips, how to read one: index -> (L,) samples at
            rate_hz, or None when it cannot be read). Voices, for babble, are the training clips.
    """

    def __init__(
        self,
        recipe: AugmentRecipe,
        rate_hz: int,
        seed: int,
        noises: tuple[int, Callable] = (0, None),
        responses: tuple[int, Callable] = (0, None),
        voices: tuple[int, Callable] = (0, None),
    ):
        self.recipe, self.rate_hz, self.seed = recipe, rate_hz, seed
        self.noises, self.responses, self.voices = noises, responses, voices

    def __call__(self, samples: np.ndarray, epoch: int, draw: int) -> np.ndarray:
        """(L,) float32 -> (L,) float32, a function of (seed, epoch, draw) and the clip."""
        recipe = self.recipe
        levers = (
            (self._shift, recipe.shift_s > 0),
            (self._room, recipe.rir.probability),
            (self._noise, recipe.noise.probability),
            (self._babble, recipe.babble.probability),
            (self._white_noise, recipe.white_noise.probability),
            (self._hum, recipe.hum.probability),
            (self._gain, recipe.gain_db is not None),
            (self._telephone, recipe.telephone.probability),
        )
        for number, (lever, probability) in enumerate(levers):
            if probability:
                # Clip and lever: a lever that is switched on does not move the others' dice.
                rng = np.random.default_rng([self.seed, epoch, draw, number])
                if rng.random() < probability:
                    samples = lever(samples, rng)
        return samples

    def _shift(self, samples, rng):
        most = min(round(self.recipe.shift_s * self.rate_hz), len(samples) - 1)
        return shift(samples, int(rng.integers(-most, most + 1)))

    def _room(self, samples, rng):
        response = _any_clip(self.responses, rng)
        return samples if response is None else reverberate(samples, response)

    def _noise(self, samples, rng):
        noise = _any_clip(self.noises, rng)
        if noise is None:
            return samples
        snr_db = rng.uniform(*self.recipe.noise.snr_db)
        return add_at_snr(samples, section(noise, len(samples), rng), snr_db)

    def _babble(self, samples, rng):
        low, high = self.recipe.babble.voices
        babble = np.zeros_like(samples)
        for _ in range(int(rng.integers(low, high + 1))):
            voice = _any_clip(self.voices, rng)
            if voice is not None and power(voice):  # each as loud as the others
                babble += section(voice, len(samples), rng) / np.float32(np.sqrt(power(voice)))
        return add_at_snr(samples, babble, rng.uniform(*self.recipe.babble.snr_db))

    def _white_noise(self, samples, rng):
        level = 10 ** (rng.uniform(*self.recipe.white_noise.level_db) / 20)
        return samples + np.float32(level) * rng.standard_normal(len(samples), dtype=np.float32)

    def _hum(self, samples, rng):
        mains_hz = self.recipe.hum.mains_hz[int(rng.integers(len(self.recipe.hum.mains_hz)))]
        hum = mains_hum(len(samples), self.rate_hz, mains_hz, rng)
        return add_at_snr(samples, hum, rng.uniform(*self.recipe.hum.snr_db))

    def _gain(self, samples, rng):
        return change_gain(samples, rng.uniform(*self.recipe.gain_db))

    def _telephone(self, samples, rng):
        line = self.recipe.telephone
        return telephone(
            samples,
            self.rate_hz,
            rng,
            line.codecs,
            line.band_hz,
            line.packet_loss,
            line.burst_packets,
            line.packet_ms,
        )


def _any_clip(clips: tuple[int, Callable], rng: np.random.Generator) -> np.ndarray | None:
    """A random one that can be read; None when a few tries in a row found none."""
    count, read = clips
    for _ in range(min(8, count)):
        samples = read(int(rng.integers(count)))
        if samples is not None:
            return samples
    return None
