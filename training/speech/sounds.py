"""What a microphone somewhere makes of a clip: a room, colour, a band, noise, a level.

Letters of shapes: L samples.
"""

import numpy as np

SAMPLE_RATE_HZ = 16000


def trim(samples: np.ndarray, threshold=1e-3) -> np.ndarray:
    """Cuts leading and trailing samples below `threshold`; all of a silent clip."""
    loud = np.flatnonzero(np.abs(samples) > threshold)
    return samples[loud[0] : loud[-1] + 1] if loud.size else samples[:0]


def shaped_noise(rng, n_samples: int, slope_db: float) -> np.ndarray:
    """Gaussian noise of unit power whose spectrum changes by `slope_db` an octave (pink: -3)."""
    spectrum = np.fft.rfft(rng.standard_normal(n_samples))
    bins = np.arange(len(spectrum))
    bins[0] = 1
    spectrum *= bins ** (slope_db / 6.02)
    noise = np.fft.irfft(spectrum, n_samples)
    return (noise / (noise.std() + 1e-12)).astype(np.float32)


def room(rng, decay_s: float, direct_to_reverberant_db: float) -> np.ndarray:
    """Impulse response: the direct sound, then noise that falls by 60 dB in `decay_s` seconds."""
    n_samples = int(decay_s * SAMPLE_RATE_HZ)
    tail = rng.standard_normal(n_samples) * 10 ** (-3 * np.arange(n_samples) / n_samples)
    tail[: int(0.002 * SAMPLE_RATE_HZ)] = 0
    tail *= 10 ** (-direct_to_reverberant_db / 20) / np.sqrt(np.sum(tail**2) + 1e-12)
    tail[0] = 1
    return tail


def record(rng, samples: np.ndarray) -> np.ndarray:
    """The clip as some microphone somewhere hears it: silence, room, colour, band, noise, level."""
    lead, trail = (rng.uniform(0.03, 0.5, 2) * SAMPLE_RATE_HZ).astype(int)
    samples = np.pad(samples, (lead, trail))
    response = np.ones(1)
    if rng.random() < 0.3:
        response = room(rng, rng.uniform(0.1, 0.6), rng.uniform(0, 15))
    size = 1 << (len(samples) + len(response) - 1).bit_length()
    spectrum = np.fft.rfft(samples, size) * np.fft.rfft(response, size)
    frequency = np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE_HZ), 50)
    if rng.random() < 0.7:  # spectral tilt around 1 kHz
        spectrum *= 10 ** (rng.uniform(-4, 4) * np.log2(frequency / 1000) / 20)
    band = rng.random()
    if band < 0.2:  # telephone
        spectrum /= np.sqrt(1 + (rng.uniform(80, 300) / frequency) ** 6)
        spectrum /= np.sqrt(1 + (frequency / rng.uniform(3200, 3800)) ** 20)
    elif band < 0.4:  # one-pole lowpass
        spectrum /= np.sqrt(1 + (frequency / rng.uniform(1500, 6000)) ** 2)
    samples = np.fft.irfft(spectrum, size)[: len(samples)]
    if rng.random() < 0.7:
        level = np.sqrt(np.mean(samples**2)) * 10 ** (-rng.uniform(12, 45) / 20)
        samples = samples + level * shaped_noise(rng, len(samples), rng.choice([0, -3, -6]))
    peak = 10 ** (-rng.uniform(0.5, 22) / 20)
    return (samples * (peak / (np.abs(samples).max() + 1e-9))).astype(np.float32)
