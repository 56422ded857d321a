"""Each waveform lever does what it says, and follows from (seed, epoch, draw)."""

import dataclasses

import numpy as np
import pytest
from conftest import SAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from fastconformer.audio.files import load_audio
from training.augment.waveform import (
    WaveAugment,
    add_at_snr,
    change_gain,
    change_speed,
    mains_hum,
    power,
    reverberate,
    section,
    shift,
)
from training.recipe.data_sections import AugmentRecipe
from training.recipe.recipe import recipe_from_dict

RATE = 16000


def tone(hz=440.0, seconds=1.0):
    return (0.2 * np.sin(2 * np.pi * hz * np.arange(int(RATE * seconds)) / RATE)).astype(np.float32)


def recipe(**augment) -> AugmentRecipe:
    tree = {"output": "a", "model": {"init_from": "m"}, "data": {"train": ["t"]}}
    return recipe_from_dict(tree | {"trainer": {"max_steps": 1}, "augment": augment}).augment


def pitch_hz(samples):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.argmax(spectrum) * RATE / len(samples)


@pytest.mark.parametrize("factor", [0.9, 1.1, 1.25])
def test_speed_moves_length_and_pitch(factor):
    fast = change_speed(tone(seconds=2.0), factor)
    assert len(fast) == pytest.approx(2 * RATE / factor, abs=2)
    assert pitch_hz(fast) == pytest.approx(440 * factor, abs=1)
    assert change_speed(tone(), 1.0) is not None and len(change_speed(tone(), 1.0)) == RATE


def test_gain_and_shift():
    clip = tone()
    assert power(change_gain(clip, 6.0)) / power(clip) == pytest.approx(10**0.6, rel=1e-4)
    assert np.array_equal(shift(clip, 100)[100:], clip[:-100]) and not shift(clip, 100)[:100].any()
    assert (
        np.array_equal(shift(clip, -100)[:-100], clip[100:]) and not shift(clip, -100)[-100:].any()
    )
    assert np.array_equal(shift(clip, 0), clip)


@settings(max_examples=25, deadline=None)
@given(snr_db=st.floats(-5, 40), level=st.floats(0.001, 1.0))
def test_noise_has_the_ratio_asked_for(snr_db, level):
    clip, noise = tone(), level * tone(1234.0)
    added = add_at_snr(clip, noise, snr_db) - clip
    assert 10 * np.log10(power(clip) / power(added)) == pytest.approx(snr_db, abs=0.05)
    assert np.array_equal(add_at_snr(clip, 0 * noise, snr_db), clip)  # silence on either side
    assert not add_at_snr(0 * clip, noise, snr_db).any()


def test_sections_come_from_all_over_and_repeat_when_short():
    rng = np.random.default_rng(0)
    numbers = np.arange(1000, dtype=np.float32)
    starts = [int(section(numbers, 100, rng)[0]) for _ in range(2000)]
    assert min(starts) < 20 and max(starts) > 880
    short = section(numbers[:30], 100, rng)
    assert len(short) == 100 and set(short.tolist()) == set(range(30))
    assert (np.diff(short) % 30 == 1).all()  # one after the other, round and round


def test_a_room_keeps_place_and_power():
    clip = tone(seconds=0.5)
    clip[:4000] = 0
    echo = np.zeros(3000, np.float32)
    echo[200], echo[1200] = 0.9, 0.45  # the direct sound after 200 samples, an echo 1000 later
    wet = reverberate(clip, echo)
    assert len(wet) == len(clip) and power(wet) == pytest.approx(power(clip), rel=1e-3)
    expected = clip + 0.5 * np.concatenate([np.zeros(1000, np.float32), clip[:-1000]])
    assert np.allclose(wet, expected * np.sqrt(power(clip) / power(expected)), atol=1e-4)
    alone = np.zeros(50, np.float32)
    alone[7] = -0.3
    assert np.allclose(reverberate(clip, alone), -clip, atol=1e-5)


def test_hum_is_a_mains_frequency_and_its_harmonics():
    hum = mains_hum(4 * RATE, RATE, 50, np.random.default_rng(0))
    spectrum = np.abs(np.fft.rfft(hum)) ** 2
    harmonics = [50 * 4 * n for n in range(1, 13)]
    assert spectrum[harmonics].sum() > 0.999 * spectrum.sum() and spectrum[200] == spectrum.max()


LEVERS = {
    "gain_db": [3, 9],
    "shift_s": 0.2,
    "white_noise": {"probability": 1.0, "level_db": [-40, -30]},
    "noise": {"manifests": ["n"], "probability": 1.0, "snr_db": [5, 10]},
    "rir": {"manifests": ["r"], "probability": 1.0},
    "babble": {"probability": 1.0, "voices": [2, 3], "snr_db": [5, 10]},
    "hum": {"probability": 1.0, "snr_db": [5, 10]},
    "telephone": {"probability": 1.0},
}


def augment_with(seed=0, **levers):
    rng = np.random.default_rng(5)
    bank = [rng.standard_normal(RATE).astype(np.float32) for _ in range(4)]
    rooms = [np.exp(-np.arange(800) / 100).astype(np.float32) * b[:800] for b in bank]
    return WaveAugment(
        recipe(**levers), RATE, seed, (4, bank.__getitem__), (4, rooms.__getitem__),
        (4, lambda i: tone(100 * i + 150) if i else None),  # one voice cannot be read
    )  # fmt: skip


@pytest.mark.parametrize("name", LEVERS)
def test_each_lever_changes_the_clip_and_repeats(name):
    clip, lever = tone(), {name: LEVERS[name]}
    augment = augment_with(**lever)
    first = augment(clip, 0, 5)
    assert first.shape == clip.shape and first.dtype == np.float32
    assert not np.allclose(first, clip, atol=1e-3)
    assert np.array_equal(clip, tone())  # the store's own samples stay
    assert np.array_equal(first, augment_with(**lever)(clip, 0, 5))
    others = [augment(clip, 0, 6), augment(clip, 1, 5), augment_with(seed=1, **lever)(clip, 0, 5)]
    if name != "telephone":  # its two codecs are all that a line without losses can vary
        assert all(not np.array_equal(first, other) for other in others)
    assert np.array_equal(augment_with()(clip, 0, 5), clip)


def test_a_lever_does_not_move_the_others_dice():
    clip = tone()
    alone = augment_with(gain_db=[3, 9])(clip, 2, 7)
    both = augment_with(gain_db=[3, 9], shift_s=0.2)(clip, 2, 7)
    assert both.max() == pytest.approx(alone.max(), rel=1e-3)


@pytest.mark.parametrize("name", ["white_noise", "noise", "rir", "babble", "hum", "telephone"])
def test_probabilities(name):
    augment = augment_with(**{name: LEVERS[name] | {"probability": 0.3}})
    clip = tone(seconds=0.1)
    changed = [not np.array_equal(augment(clip, 0, draw), clip) for draw in range(400)]
    assert 0.2 < np.mean(changed) < 0.4


def test_levels_are_those_of_the_recipe():
    clip = tone()
    for name, low, high in (("noise", 5, 10), ("hum", 5, 10), ("babble", 5, 10)):
        augment = augment_with(**{name: LEVERS[name]})
        found = [
            10 * np.log10(power(clip) / power(augment(clip, 0, draw) - clip)) for draw in range(40)
        ]
        assert low - 0.1 <= min(found) < low + 1 and high - 1 < max(found) <= high + 0.1, name
    augment = augment_with(white_noise=LEVERS["white_noise"])
    found = [10 * np.log10(power(augment(clip, 0, draw) - clip)) for draw in range(40)]
    assert -40.2 <= min(found) < -38 and -32 < max(found) <= -29.8
    augment = augment_with(gain_db=[3, 9])
    found = [10 * np.log10(power(augment(clip, 0, draw)) / power(clip)) for draw in range(40)]
    assert 3 <= min(found) < 4 and 8 < max(found) <= 9


def test_real_noise_and_rooms_from_their_manifests(tmp_path):
    import json

    from conftest import golden

    from fastconformer import load_model
    from training.data.sources import load_data

    clip = SAMPLES / "digits_8k" / "0_george_0.flac"
    line = {"audio_filepath": str(clip), "duration": 0.298, "text": "good"}
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    tree = {
        "output": "a",
        "model": {"init_from": "m"},
        "data": {"train": [str(tmp_path / "train.jsonl")]},
        "trainer": {"max_steps": 1},
    }
    model = load_model(golden("train_parity") / "model.nemo")
    sounds = []
    for kind in ({}, {"noise": "noise.jsonl"}, {"rir": "rir.jsonl"}):
        levers = {k: {"manifests": [str(SAMPLES / v)], "probability": 1.0} for k, v in kind.items()}
        full = recipe_from_dict(tree | {"augment": levers})
        train, _ = load_data(full.data, full.augment, 1234, model, ("ctc",))
        sounds.append(train.store.augment(train.store.samples(0), 0, 0))
    assert np.array_equal(sounds[0], train.store.samples(0))
    assert np.allclose(sounds[0], load_audio(clip, RATE), atol=1e-4)
    assert not np.allclose(sounds[1], sounds[0], atol=1e-4)
    assert not np.allclose(sounds[2], sounds[0], atol=1e-4)
    assert power(sounds[2]) == pytest.approx(power(sounds[0]), rel=1e-3)


@pytest.mark.parametrize(
    ("levers", "expected"),
    [
        ({"noise": {"probability": 0.5}}, "augment.noise needs manifests and a probability"),
        ({"rir": {"manifests": ["x"]}}, "augment.rir needs manifests and a probability"),
        ({"gain_db": [5, -5]}, "augment.gain_db is [5.0, -5.0], expected [low, high]"),
        ({"speeds": [1.0, 9.0]}, "augment.speeds is [1.0, 9.0]"),
        ({"telephone": {"codecs": ["mp3"]}}, "expected mulaw or alaw"),
        ({"telephone": {"probabilty": 1}}, "did you mean augment.telephone.probability"),
        ({"babble": {"probability": 2.0}}, "augment.babble.probability is 2.0, expected 0 to 1"),
    ],
)
def test_wrong_levers_are_named(levers, expected):
    with pytest.raises(ValueError) as error:
        recipe(**levers)
    assert expected in str(error.value)
    assert dataclasses.is_dataclass(recipe())
