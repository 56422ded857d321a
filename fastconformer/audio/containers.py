"""What libsndfile does not read, by PyAV (the extra `media`): mp4, m4a, webm, mkv, wma, amr, video.

FFmpeg's decoders lie in PyAV's wheels. Only files that hold their own data are opened: no playlist,
no address, nothing else that a file may name.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

FORMATS = (
    "aac,ac3,aea,aiff,alac,amr,amrnb,amrwb,ape,asf,asf_o,au,avi,caf,dts,dtshd,eac3,flac,flv,gsm,"
    "loas,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpc,mpc8,mpeg,mpegts,mpegvideo,ogg,qcp,rm,tak,"
    "truehd,tta,voc,w64,wav,wv,xwma"
)
# Their headers tell a true length; those of the others are guessed from a bitrate.
WITH_LENGTH = frozenset([
    "asf", "avi", "caf", "flac", "flv", "matroska", "mov", "mp4", "tta", "w64", "wav", "webm", "wv",
])  # fmt: skip
SEEKABLE = WITH_LENGTH | {"mp3"}
PREROLL_S = 1.0  # decoded before a section: lossy codecs need some of what was before
INSTALL = 'pip install "fastconformer[media]"'


class Track(NamedTuple):
    """An opened track: rate, seconds that the header promises (None: it does not say), and blocks
    (n, C) float32; `problems` fills while they are taken."""

    rate_hz: int
    promised_s: float | None
    blocks: Iterator[np.ndarray]
    problems: list[str]
    close: Callable[[], None]


def is_installed() -> bool:
    return importlib.util.find_spec("av") is not None


def open_track(file: BinaryIO, name: str, number: int = 0, offset_s: float = 0.0) -> Track:
    """An audio track of a file, decoded from `offset_s` on. ValueError: no such track, or nothing
    that FFmpeg reads."""
    import av

    def close() -> None:
        container.close()
        file.close()

    try:
        container = av.open(file, options={"format_whitelist": FORMATS}, metadata_errors="ignore")
    except av.error.FFmpegError as error:
        file.close()
        raise ValueError(f"{name} is damaged or not audio: {error.strerror}") from None
    tracks = container.streams.audio
    if not 0 <= number < len(tracks):
        close()
        held = f"{len(tracks)} audio tracks" if tracks else "no audio"
        raise ValueError(f"{name} holds {held}" + (f", not track {number}" if tracks else ""))
    stream, problems = tracks[number], []
    frames = _frames(container, stream, problems)
    first = next(frames, None)
    timed = offset_s > PREROLL_S and first is not None and first.pts is not None
    timed = timed and bool(SEEKABLE.intersection(container.format.name.split(",")))
    start_s = float(first.pts * first.time_base) if timed else 0.0
    if timed:
        to = int((start_s + offset_s - PREROLL_S) / stream.time_base)
        try:
            container.seek(to, stream=stream)
            frames = _frames(container, stream, problems)
            first = next(frames, None)
        except av.error.FFmpegError:
            timed = False  # decoded from the start
    if first is None:
        close()
        raise ValueError(f"{name} is damaged: no samples could be decoded")
    skip_s = offset_s
    if timed and first.pts is not None:
        skip_s = max(0.0, offset_s - (float(first.pts * first.time_base) - start_s))
    skip = round(skip_s * first.sample_rate)
    blocks = _blocks(itertools.chain([first], frames), first, skip)
    return Track(first.sample_rate, _promised_s(container, stream), blocks, problems, close)


def _has_length(container) -> bool:
    return bool(WITH_LENGTH.intersection(container.format.name.split(",")))


def _promised_s(container, stream) -> float | None:
    if not _has_length(container):
        return None
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / 1e6
    return None


def _frames(container, stream, problems: list[str]) -> Iterator:
    import av

    n_bad, packets = 0, container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError as error:
            problems.append(f"reading stopped: {error.strerror}")
            break
        if packet is None:
            break
        try:
            yield from packet.decode()
        except av.error.FFmpegError:
            n_bad += 1
    if n_bad:
        problems.append(f"{n_bad} packets could not be decoded")


def _blocks(frames: Iterator, first, skip: int) -> Iterator[np.ndarray]:
    """Samples of frames in the first one's rate and channels, without the first `skip`."""
    import av

    resampler, of = None, None
    for frame in frames:
        if of != (frame.format.name, frame.layout.name, frame.sample_rate):
            of = frame.format.name, frame.layout.name, frame.sample_rate
            resampler = av.AudioResampler("fltp", first.layout, first.sample_rate)
        frame.pts = None  # gaps in the times are no samples
        for part in resampler.resample(frame):
            block = part.to_ndarray().T
            if skip < len(block):
                yield block[skip:]
            skip = max(0, skip - len(block))
