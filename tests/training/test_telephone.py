"""G.711 against its tables, and the line's band and losses."""

import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from training.augment.telephone import (
    alaw_decode,
    alaw_encode,
    band_pass,
    conceal,
    lost_packets,
    mulaw_decode,
    mulaw_encode,
    telephone,
)

PCM = np.arange(-32768, 32768, dtype=np.int64).astype(np.int16)
CODES = np.arange(256, dtype=np.uint8)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        import audioop
    except ImportError:  # gone from Python 3.13
        audioop = None


def test_every_sample_and_code_as_pythons_audioop():
    if audioop is None:
        pytest.skip("this Python has no audioop")
    for encode, decode, lin2, to_lin in (
        (mulaw_encode, mulaw_decode, audioop.lin2ulaw, audioop.ulaw2lin),
        (alaw_encode, alaw_decode, audioop.lin2alaw, audioop.alaw2lin),
    ):
        assert np.array_equal(encode(PCM), np.frombuffer(lin2(PCM.tobytes(), 2), np.uint8))
        assert np.array_equal(decode(CODES), np.frombuffer(to_lin(CODES.tobytes(), 2), np.int16))


# ITU-T G.711, tables 2a (mu-law, in the 14 bits of the table) and 1a (A-law, 13 bits): at the
# segments' first decision values, the code above them, and the value it is decoded to.
MU_TABLE = {
    0: (0b11111111, 0),
    1: (0b11111110, 2),
    31: (0b11101111, 33),
    95: (0b11011111, 99),
    223: (0b11001111, 231),
    479: (0b10111111, 495),
    991: (0b10101111, 1023),
    2015: (0b10011111, 2079),
    4063: (0b10001111, 4191),
    7903: (0b10000000, 8031),
}
A_TABLE = {
    0: (0b10000000, 1),
    32: (0b10010000, 33),
    64: (0b10100000, 66),
    128: (0b10110000, 132),
    256: (0b11000000, 264),
    512: (0b11010000, 528),
    1024: (0b11100000, 1056),
    2048: (0b11110000, 2112),
    3968: (0b11111111, 4032),
}


def test_the_standards_tables():
    for decision, (code, value) in MU_TABLE.items():
        assert mulaw_encode(np.int16([decision * 4]))[0] == code
        assert mulaw_decode(np.uint8([code]))[0] == value * 4
        if decision:  # just below it, the code before; codes go down as samples go up
            assert mulaw_encode(np.int16([decision * 4 - 1]))[0] == code + 1
        assert mulaw_encode(np.int16([-decision * 4]))[0] in (code & 0x7F, code | 0x80)
        assert mulaw_decode(np.uint8([code & 0x7F]))[0] == -value * 4
    for decision, (table_code, value) in A_TABLE.items():
        code = table_code ^ 0x55  # the line carries every second bit inverted
        assert alaw_encode(np.int16([decision * 8]))[0] == code
        assert alaw_decode(np.uint8([code]))[0] == value * 8
        assert alaw_decode(np.uint8([code ^ 0x80]))[0] == -value * 8
        assert alaw_encode(np.int16([-decision * 8 - 1]))[0] == code ^ 0x80
    assert mulaw_encode(np.int16([32767, -32768])).tolist() == [0x80, 0x00]
    assert alaw_encode(np.int16([32767, -32768])).tolist() == [0xAA, 0x2A]


@pytest.mark.parametrize(
    ("encode", "decode"), [(mulaw_encode, mulaw_decode), (alaw_encode, alaw_decode)]
)
def test_codes_survive_and_errors_are_within_half_a_step(encode, decode):
    again = encode(decode(CODES))
    assert np.array_equal(decode(again), decode(CODES))
    heard = decode(encode(PCM)).astype(np.int64)
    assert (np.diff(heard) >= 0).all()  # monotone
    error, size = np.abs(heard - PCM), np.abs(PCM.astype(np.int64))
    inside = size < 32124
    assert (error <= np.maximum(size / 16, 16))[inside].all()
    with pytest.raises(ValueError, match="int16"):
        encode(np.zeros(3, np.float32))


def tone(hz, rate=8000, seconds=1.0):
    return (0.25 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(
        np.float32
    )


@pytest.mark.parametrize(
    ("hz", "low_db", "high_db"),
    [(50, -200, -50), (150, -200, -50), (320, -0.2, 0.2), (1000, -0.1, 0.1), (3380, -0.2, 0.2),
     (3600, -200, -50)],
)  # fmt: skip
def test_the_band(hz, low_db, high_db):
    through = band_pass(tone(hz), 8000, 300.0, 3400.0)[1000:-1000]
    level = 10 * np.log10(np.mean(through**2) / np.mean(tone(hz)[1000:-1000] ** 2) + 1e-12)
    assert low_db <= level <= high_db


def test_a_clip_keeps_its_length_and_place_and_loses_what_the_line_cuts():
    rng = np.random.default_rng(0)
    for rate in (8000, 16000, 22050):
        clip = tone(1000, rate, 0.537)
        heard = telephone(clip, rate, rng)
        assert heard.shape == clip.shape and heard.dtype == np.float32
        inside = slice(rate // 20, -rate // 20)
        assert np.corrcoef(heard[inside], clip[inside])[0, 1] > 0.995
        assert np.mean(telephone(tone(100, rate), rate, rng) ** 2) < 1e-4
    fine = tone(6000, 16000)
    assert np.mean(telephone(fine, 16000, rng) ** 2) < 1e-5 < np.mean(fine**2)


def test_the_codecs_noise_is_there():
    clip = tone(1000)
    for codec in ("mulaw", "alaw"):
        heard = telephone(clip, 8000, np.random.default_rng(0), codecs=(codec,))
        snr = 10 * np.log10(np.mean(clip**2) / np.mean((heard - clip)[500:-500] ** 2))
        assert 30 < snr < 45  # what G.711 gives a loud sine
    pair = [telephone(clip, 8000, np.random.default_rng(0), codecs=(c,)) for c in ("mulaw", "alaw")]
    assert not np.array_equal(*pair)


@pytest.mark.parametrize(("share", "burst"), [(0.05, 1.5), (0.1, 3.0), (0.3, 8.0)])
def test_losses_come_in_bursts(share, burst):
    lost = lost_packets(200_000, share, burst, np.random.default_rng(1))
    assert lost.mean() == pytest.approx(share, rel=0.06)
    starts = np.count_nonzero(np.diff(lost.astype(int)) == 1) + lost[0]
    assert lost.sum() / starts == pytest.approx(burst, rel=0.05)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 60), share=st.floats(0, 0.99), burst=st.floats(1, 20), seed=st.integers(0, 9)
)
@example(n=60, share=5e-324, burst=2.0, seed=0)
def test_any_line_is_defined(n, share, burst, seed):
    assert lost_packets(n, share, burst, np.random.default_rng(seed)).shape == (n,)


def test_lost_packets_are_silent_or_repeat_and_fade():
    samples = np.arange(1, 61, dtype=np.float32)  # six packets of ten
    lost = np.array([True, False, True, True, True, True])
    silent = conceal(samples, lost, 10, repeat=False)
    assert not silent[:10].any() and not silent[20:].any()
    assert np.array_equal(silent[10:20], samples[10:20])
    again = conceal(samples, lost, 10, repeat=True)
    assert not again[:10].any()  # nothing came before
    assert again[20] == samples[10] and 0 < again[35] < again[25] < samples[15]
    assert not again[50:].any()  # after three it has faded
    clean = telephone(tone(1000), 8000, np.random.default_rng(3))
    broken = telephone(tone(1000), 8000, np.random.default_rng(3), packet_loss=0.5)
    changed = np.abs(clean - broken).reshape(-1, 160).max(1) > 0
    assert 0.02 < changed.mean() < 0.6  # whole packets of 20 ms, and only some of them
