"""How long a file really is: MP3 frames, Ogg links, what libsndfile cuts; and streams that say so.

MP3: encoders that write to a pipe leave no length, joined files have the first part's, and
libsndfile believes either: it stops before the end, or promises more than there is. Reading the
frame headers tells the length; an Info frame with it, put in front, tells libsndfile. Ogg: of links
in a chain libsndfile reads the first. WAV, AIFF, AU, W64 cut short: it reads what is there, and
only its log tells the difference. WAV, RF64, W64 from a pipe: their header gets the length.
Source: ISO/IEC 11172-3, 2.4.2.3; the Info frame as LAME and mpg123 describe it; RFC 3533.
"""

import io
import re
from typing import NamedTuple

# kbit/s of bitrate indices 1 to 14, by (version is 1, layer)
BITRATES = {
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
BITRATES[(False, 3)] = BITRATES[(False, 2)]
RATES_HZ = (44100, 48000, 32000)
UNKNOWN_BYTES = 0x7FFF0000  # of sound, and more: what is written to a pipe has some such length
UNKNOWN_LONG = 1 << 62  # the same, of sizes in 64 bits
VERSIONS = {3: 1, 2: 2, 0: 4}  # two bits of the header -> divisor of the rate


class Header(NamedTuple):
    layer: int
    rate_hz: int
    mono: bool
    version_1: bool
    size: int  # bytes, this header included
    samples: int

    @property
    def is_like(self) -> tuple:
        """What all frames of a stream share."""
        return self.layer, self.rate_hz, self.version_1


class Frames(NamedTuple):
    """Frames with sound of a file: (start, size) of each, how many an Info or Xing frame promises
    (None: it does not say), and how many samples at both ends it calls the encoder's padding."""

    header: Header
    places: list[tuple[int, int]]
    promised: int | None
    padding: int = 0

    @property
    def samples(self) -> int:
        return len(self.places) * self.header.samples - self.padding * self.is_regular

    @property
    def is_regular(self) -> bool:
        return self.promised == len(self.places)


def parse_header(data: bytes, at: int) -> Header | None:
    """The frame header at a place, None where there is none (or of free format)."""
    if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] & 0xE0 != 0xE0:
        return None
    version, layer = data[at + 1] >> 3 & 3, 4 - (data[at + 1] >> 1 & 3)
    bitrate, rate = data[at + 2] >> 4, data[at + 2] >> 2 & 3
    if version == 1 or layer == 4 or not 1 <= bitrate <= 14 or rate == 3:
        return None
    version_1, padding = version == 3, data[at + 2] >> 1 & 1
    rate_hz = RATES_HZ[rate] // VERSIONS[version]
    bits = BITRATES[(version_1, layer)][bitrate - 1] * 1000
    samples = 384 if layer == 1 else 1152 if layer == 2 or version_1 else 576
    if layer == 1:
        size = (12 * bits // rate_hz + padding) * 4
    else:
        size = samples // 8 * bits // rate_hz + padding
    return Header(layer, rate_hz, data[at + 3] >> 6 == 3, version_1, size, samples)


def find_frames(data: bytes) -> Frames | None:
    """The frames of an MPEG audio file; tags and rubbish between them are passed over. None: the
    first few thousand bytes after a tag hold no two frames in a row."""
    at = _past_tag(data, 0)
    first = _next_frame(data, at, None, at + (1 << 16))
    if first is None:
        return None
    at, header = first
    places, promised, padding = [], None, 0
    while at < len(data):
        found = parse_header(data, at)
        if found is None or found.is_like != header.is_like:
            later = _next_frame(data, max(_past_tag(data, at), at + 1), header, len(data))
            if later is None:
                break
            at, found = later
        if _is_info(data, at, found):
            if not places:
                promised, padding = _read_info(data, at, found)
        elif at + found.size <= len(data):  # else it is cut, and no sound
            places.append((at, found.size))
        at += found.size
    return Frames(header, places, promised, padding) if places else None


def with_length(data: bytes, frames: Frames) -> io.BytesIO:
    """The frames alone, behind an Info frame that tells how many there are."""
    header = frames.header
    first = bytearray(data[frames.places[0][0] :][:4])
    first[1] |= 1  # no checksum
    kbit = BITRATES[(header.version_1, 3)]
    first[2] = (first[2] & 0x0C) | (kbit.index(128) + 1) << 4
    size = parse_header(bytes(first), 0).size
    info = bytearray(size)
    info[:4] = first
    at = 4 + _side_bytes(header)
    info[at : at + 12] = b"Info" + (1).to_bytes(4, "big") + len(frames.places).to_bytes(4, "big")
    return io.BytesIO(bytes(info) + b"".join(data[at : at + n] for at, n in frames.places))


def _next_frame(data: bytes, at: int, like: Header | None, end: int):
    """(place, header) of the next frame that another follows, or the file's end."""
    while (at := data.find(b"\xff", at, end)) >= 0:
        found = parse_header(data, at)
        if found is not None and (like is None or found.is_like == like.is_like):
            following = parse_header(data, at + found.size)
            if following is not None and following.is_like == found.is_like:
                return at, found
            if at + found.size == len(data) or data[at + found.size :][:3] in (b"TAG", b"ID3"):
                return at, found
        at += 1
    return None


def _past_tag(data: bytes, at: int) -> int:
    while data[at : at + 3] == b"ID3" and at + 10 <= len(data):
        sizes = data[at + 6 : at + 10]
        at += 10 + (sizes[0] << 21 | sizes[1] << 14 | sizes[2] << 7 | sizes[3])
    return at


def _side_bytes(header: Header) -> int:
    """Between the header and what an Info frame says."""
    if header.version_1:
        return 17 if header.mono else 32
    return 9 if header.mono else 17


def _is_info(data: bytes, at: int, header: Header) -> bool:
    """Whether a frame holds no sound but says how much there is."""
    tag = at + 4 + _side_bytes(header)
    is_xing = header.layer == 3 and data[tag : tag + 4] in (b"Xing", b"Info")
    return is_xing or data[at + 36 : at + 40] == b"VBRI"


def _read_info(data: bytes, at: int, header: Header) -> tuple[int | None, int]:
    """(frames that it promises, samples of the encoder's padding at both ends)."""
    tag = at + 4 + _side_bytes(header)
    if data[tag : tag + 4] not in (b"Xing", b"Info") or not data[tag + 7] & 1:
        return None, 0
    padding = 0
    if data[tag + 7] == 15 and data[tag + 120 : tag + 124] in (b"LAME", b"Lavc", b"Lavf"):
        both = int.from_bytes(data[tag + 141 : tag + 144], "big")
        padding = (both >> 12) + (both & 0xFFF)
    return int.from_bytes(data[tag + 8 : tag + 12], "big"), padding


def promised_share(log: str) -> float:
    """How much of a file's sound its header promises, by libsndfile's log of opening it: 1.0 times
    what is there, more where it was cut short."""
    found = re.search(
        r"^ *(?:data|SSND|Data [Ss]ize) *: (\d+)(?: \(should be (\d+)\))?$", log, re.M
    )
    if found is None or int(found[1]) >= UNKNOWN_BYTES:
        return 1.0
    there = int(found[2] or re.search(r"^Length : (\d+)$", log, re.M)[1])
    return max(1.0, int(found[1]) / max(1, there))


def sized_header(head: bytes, size: int) -> bytes | None:
    """The first bytes of a WAV, RF64 or W64 file of so many bytes, with the length that its sound
    has: what writes to a pipe cannot go back and leaves 0 or the largest number. None: its header
    tells a length, or is none of these, or is longer than `head`.

    Source: EBU Tech 3306 (RF64); Sony's W64 as libsndfile and FFmpeg read it.
    """
    found, whole = bytearray(head), head[8:12] == b"WAVE"
    if head[:4] == b"RIFF" and whole:
        at = _chunk(head, b"data", 12)
        if at is None or head[at + 4 : at + 8] != bytes(4) or _only_chunks(head, at + 8, size):
            return None
        for place, length in ((4, size - 8), (at + 4, size - at - 8)):
            found[place : place + 4] = min(length, 0xFFFFFFFF).to_bytes(4, "little")
        return bytes(found)
    if head[:4] in (b"RF64", b"BW64") and whole and head[12:16] == b"ds64":
        at, told = _chunk(head, b"data", 12), int.from_bytes(head[28:36], "little")
        if at is None or 0 < told < UNKNOWN_LONG:
            return None
        for place, length in ((20, size - 8), (28, size - at - 8)):
            found[place : place + 8] = length.to_bytes(8, "little")
        return bytes(found)
    if head[:4] == b"riff" and head[24:28] == b"wave":
        at = _chunk(head, b"data", 40, id_bytes=16, size_bytes=8)
        told = None if at is None else int.from_bytes(head[at + 16 : at + 24], "little")
        if told is None or 24 < told < UNKNOWN_LONG:
            return None
        for place, length in ((16, size), (at + 16, size - at)):
            found[place : place + 8] = length.to_bytes(8, "little")
        return bytes(found)
    return None


def _chunk(head: bytes, name: bytes, at: int, id_bytes: int = 4, size_bytes: int = 4) -> int | None:
    """Where the first chunk of this name begins, of those from a place on; None: not in `head`. In
    W64 a size counts the chunk's header, and chunks begin at multiples of 8."""
    in_w64 = size_bytes == 8
    while at + id_bytes + size_bytes <= len(head):
        if head[at : at + 4] == name:
            return at
        length = int.from_bytes(head[at + id_bytes :][:size_bytes], "little")
        if in_w64 and length < 24:
            return None
        at += (length + 7) // 8 * 8 if in_w64 else 8 + length + length % 2
    return None


def _only_chunks(head: bytes, at: int, size: int) -> bool:
    """Whether chunks follow one another to the file's end: the sound before them is empty."""
    while at + 8 <= len(head) and head[at : at + 4].isascii() and head[at : at + 4].strip(b"\0"):
        at += 8 + int.from_bytes(head[at + 4 : at + 8], "little")
        at += at % 2
    return size <= at <= size + 1


def is_cut(head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file of so many bytes ends before its sound does: an Ogg's last page is not marked
    as that, or the header of a CAF, NIST SPHERE or VOC file tells of more. (libsndfile's log tells
    it of others, see `promised_share`.) `head`: its first bytes, `tail`: an Ogg's last ones."""
    if head[:4] == b"OggS":
        at = tail.rfind(b"OggS")
        return at >= 0 and not (at + 27 <= len(tail) and tail[at + 5] & 4)
    end = 0
    if head[:4] == b"caff":
        at, length = 8, 0
        while at + 12 <= len(head) and head[at : at + 4] != b"data" and length >= 0:
            length = int.from_bytes(head[at + 4 : at + 12], "big", signed=True)
            at += 12 + length
        end = at + 12 + int.from_bytes(head[at + 4 : at + 12], "big", signed=True)  # a pipe's: -1
    elif head[:8] == b"NIST_1A\n":
        said = dict(re.findall(rb"^(\w+) -\w+ (\S+)$", head[:4096], re.M))
        names = (b"sample_count", b"channel_count", b"sample_n_bytes")
        is_plain = said.get(b"sample_coding", b"pcm") in (b"pcm", b"ulaw", b"alaw")
        if is_plain and all(said.get(name, b"").isdigit() for name in names):
            count, channels, n_bytes = (int(said[name]) for name in names)
            end = int(re.match(rb"\s*(\d*)", head[8:16])[1] or 0) + count * channels * n_bytes
    elif head[:19] == b"Creative Voice File":
        end = int.from_bytes(head[20:22], "little")
        while end + 4 <= len(head) and head[end]:  # blocks: a kind, a size; kind 0 is the end
            end += 4 + int.from_bytes(head[end + 1 : end + 4], "little")
    return end > size


def ogg_links(data: bytes) -> list[bytes]:
    """The links of a chained Ogg file, each a file of its own; one where it is no chain."""
    starts, at, in_header = [0], 0, True
    while (at := data.find(b"OggS", at)) >= 0 and at + 27 <= len(data):
        begins = bool(data[at + 5] & 2)
        if begins and not in_header:
            starts.append(at)
        in_header = begins
        n_segments = data[at + 26]
        at += 27 + n_segments + sum(data[at + 27 : at + 27 + n_segments])
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)])]
