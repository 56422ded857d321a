"""The telephone line: its band, the G.711 codec, and bursts of lost packets.

A clip goes through a line as samples -> 8 kHz -> 300-3400 Hz -> 8-bit codes in packets -> samples.
All randomness comes from the generator that is passed in.
"""

import functools

import numpy as np
import soxr

LINE_HZ = 8000
EDGE_HZ = 100.0  # the band falls from full to nothing within this
MU_BIAS, MU_CLIP = 33, 8159  # in the 14 bits that mu-law sees
A_CLIP = 4095  # in the 13 bits that A-law sees


def mulaw_encode(pcm: np.ndarray) -> np.ndarray:
    """int16 samples -> 8-bit mu-law codes (uint8). Source: ITU-T G.711, tables 2a and 2b."""
    return _encoder("mulaw")[_as_int16(pcm).view(np.uint16)]


def alaw_encode(pcm: np.ndarray) -> np.ndarray:
    """int16 samples -> 8-bit A-law codes (uint8). Source: ITU-T G.711, tables 1a and 1b."""
    return _encoder("alaw")[_as_int16(pcm).view(np.uint16)]


def mulaw_decode(codes: np.ndarray) -> np.ndarray:
    """8-bit mu-law codes -> int16 samples: the middle of each code's interval."""
    return _decoder("mulaw")[np.asarray(codes, dtype=np.uint8)]


def alaw_decode(codes: np.ndarray) -> np.ndarray:
    """8-bit A-law codes -> int16 samples: the middle of each code's interval."""
    return _decoder("alaw")[np.asarray(codes, dtype=np.uint8)]


CODECS = {"mulaw": (mulaw_encode, mulaw_decode), "alaw": (alaw_encode, alaw_decode)}


def _as_int16(pcm: np.ndarray) -> np.ndarray:
    pcm = np.asarray(pcm)
    if pcm.dtype != np.int16:
        raise ValueError(f"G.711 codes int16 samples, got {pcm.dtype}; scale by 32768 and round")
    return np.ascontiguousarray(pcm)


@functools.cache
def _encoder(law: str) -> np.ndarray:
    """Codes of all 65,536 samples, by their bits taken as an unsigned number."""
    pcm = np.arange(1 << 16, dtype=np.uint16).view(np.int16).astype(np.int32)
    negative = pcm < 0
    if law == "mulaw":
        # A right shift rounds towards minus infinity: the sign is taken off after it, so that
        # every 16-bit sample gets the code that the common implementations give it.
        fourteen = pcm >> 2
        magnitude = np.minimum(np.abs(fourteen), MU_CLIP) + MU_BIAS  # 33..8192
        segment = np.minimum(np.frexp(magnitude)[1] - 6, 8)  # 32..63 is the first, of eight
        step = (magnitude >> (segment + 1)) & 0xF
        code = np.where(segment < 8, (segment << 4) | step, 0x7F)
        return (code ^ np.where(negative, 0x7F, 0xFF)).astype(np.uint8)
    thirteen = pcm >> 3
    magnitude = np.minimum(np.where(negative, -thirteen - 1, thirteen), A_CLIP)
    segment = np.maximum(np.frexp(magnitude)[1] - 5, 0)  # 0..31 is the first, of eight
    code = (segment << 4) | ((magnitude >> np.maximum(segment, 1)) & 0xF)
    return (code ^ np.where(negative, 0x55, 0xD5)).astype(np.uint8)


@functools.cache
def _decoder(law: str) -> np.ndarray:
    codes = np.arange(256)
    bits = codes ^ (0xFF if law == "mulaw" else 0x55)
    segment, step = (bits >> 4) & 7, bits & 0xF
    if law == "mulaw":
        value = (((2 * step + MU_BIAS) << segment) - MU_BIAS) << 2
        negative = (bits & 0x80) > 0
    else:
        value = np.where(segment == 0, 2 * step + 1, (2 * step + 33) << np.maximum(segment - 1, 0))
        value = value << 3
        negative = (bits & 0x80) == 0
    return np.where(negative, -value, value).astype(np.int16)


def band_pass(samples: np.ndarray, rate_hz: int, low_hz: float, high_hz: float) -> np.ndarray:
    """Only low_hz..high_hz of a clip, (L,) -> (L,), without delay.

    The edges fall as half a cosine over 100 Hz outside of the band, which keeps the ringing short.
    """
    padded = len(samples) + rate_hz // 10  # the ringing at one end must not come round to the other
    size = 1 << (padded - 1).bit_length()
    hz = np.fft.rfftfreq(size, 1 / rate_hz)
    outside = np.maximum(low_hz - hz, hz - high_hz)
    gain = 0.5 + 0.5 * np.cos(np.pi * np.clip(outside / EDGE_HZ, 0, 1))
    return np.fft.irfft(np.fft.rfft(samples, size) * gain, size)[: len(samples)].astype(np.float32)


def lost_packets(
    n_packets: int, share: float, burst_packets: float, rng: np.random.Generator
) -> np.ndarray:
    """Which packets are lost, (n_packets,) bool, in bursts.

    Gilbert-Elliott channel that loses every packet in its bad state and none in its good one:
    runs of bad have a mean of `burst_packets`, and `share` of all packets are bad in the long run.
    Source: Gilbert 1960, Elliott 1963.

    Raises:
        ValueError: share is not in 0..1, or a burst is shorter than one packet.
    """
    if not 0 <= share < 1 or burst_packets < 1:
        raise ValueError(
            f"packet loss is {share} in bursts of {burst_packets}; expected a share below 1 and "
            "bursts of at least 1 packet"
        )
    lost = np.zeros(n_packets, dtype=bool)
    leave_bad = 1 / burst_packets
    # At most 1: packets so often lost cannot come in bursts so short.
    leave_good = min(1.0, leave_bad * share / (1 - share))
    if leave_good == 0:  # no loss, or one too rare for a float
        return lost
    position, is_bad = 0, bool(rng.random() < share)
    while position < n_packets:
        run = int(rng.geometric(leave_bad if is_bad else leave_good))
        if is_bad:
            lost[position : position + run] = True
        position, is_bad = position + run, not is_bad
    return lost


def conceal(samples: np.ndarray, lost: np.ndarray, packet: int, repeat: bool) -> np.ndarray:
    """What is heard where packets of `packet` samples were lost: silence, or the packet before
    them again, fading over three packets, in the manner of G.711 Appendix I."""
    heard = samples.copy()
    age = 0  # packets since the last good one
    for number in np.flatnonzero(lost):
        age = age + 1 if number and lost[number - 1] else 1
        begin = number * packet
        end = min(begin + packet, len(samples))
        source = begin - age * packet
        if not repeat or source < 0 or age > 3:
            heard[begin:end] = 0
            continue
        fade = 1 - (age - 1 + np.arange(end - begin) / packet) / 3
        heard[begin:end] = samples[source : source + end - begin] * fade
    return heard


def telephone(
    samples: np.ndarray,
    rate_hz: int,
    rng: np.random.Generator,
    codecs: tuple[str, ...] = ("mulaw", "alaw"),
    band_hz: tuple[float, float] = (300.0, 3400.0),
    packet_loss: float = 0.0,
    burst_packets: float = 3.0,
    packet_ms: float = 20.0,
) -> np.ndarray:
    """A clip as it comes out of a telephone, (L,) float32 -> (L,) float32 at the same rate.

    Args:
        codecs: one is taken at random: "mulaw" (North America, Japan) or "alaw" (elsewhere).
        packet_loss: the largest share of packets that are lost; each call draws its own below it.
        burst_packets: mean length of a burst of lost packets.
    """
    narrow = samples if rate_hz == LINE_HZ else soxr.resample(samples, rate_hz, LINE_HZ)
    narrow = band_pass(narrow, LINE_HZ, *band_hz)
    encode, decode = CODECS[codecs[int(rng.integers(len(codecs)))]]
    pcm = np.clip(np.rint(narrow * 32768.0), -32768, 32767).astype(np.int16)
    heard = decode(encode(pcm)).astype(np.float32) / 32768.0
    share, repeat = packet_loss * rng.random(), bool(rng.random() < 0.5)
    packet = max(1, round(LINE_HZ * packet_ms / 1000))
    lost = lost_packets(-(-len(heard) // packet), share, burst_packets, rng)
    if lost.any():
        heard = conceal(heard, lost, packet, repeat)
    if rate_hz == LINE_HZ:
        return heard
    wide = soxr.resample(heard, LINE_HZ, rate_hz)
    return np.pad(wide, (0, max(0, len(samples) - len(wide))))[: len(samples)]
