"""What libsndfile does not read, or reads short: containers, MP3 without a length, chained Ogg."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import SAMPLES

from fastconformer.audio import containers
from fastconformer.audio.files import audio_duration, load_audio, read_audio
from fastconformer.audio.streams import find_frames, ogg_links, with_length

av = pytest.importorskip("av", reason="PyAV makes the files (the extra media)")
RATE = 16000
CONTAINERS = [  # suffix, container, codec
    ("m4a", "ipod", "aac"),
    ("mp4", "mp4", "aac"),
    ("mov", "mov", "alac"),
    ("mkv", "matroska", "flac"),
    ("webm", "webm", "libopus"),
    ("aac", "adts", "aac"),
    ("wma", "asf", "wmav2"),
    ("avi", "avi", "pcm_s16le"),
    ("mp2", "mp2", "mp2"),
    ("ac3", "ac3", "ac3"),
    ("wv", "wv", "wavpack"),
    ("ts", "mpegts", "mp2"),
    ("flv", "flv", "aac"),
]


@pytest.fixture(scope="module")
def sound():
    """Three seconds of speech, (L,) float32 at 48 kHz: what every codec takes."""
    samples = load_audio(SAMPLES / "jfk.flac", 48000)[: 3 * 48000]
    return samples / np.abs(samples).max() * 0.5


def encode(path, samples, container, codec, rate=48000, **options):
    """Writes (L,) or (C, L) samples; `path` is a path or a file that cannot seek."""
    with av.open(path, "w", format=container) as out:
        samples = np.atleast_2d(samples)
        layout = "mono" if len(samples) == 1 else "stereo"
        stream = out.add_stream(codec, rate=rate, layout=layout, options=options)
        if codec == "wmav2":
            stream.bit_rate = 96000
        frame = av.AudioFrame.from_ndarray(samples.astype(np.float32), "fltp", layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format.name, layout, rate)
        fifo = av.AudioFifo()
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            part.pts = None
            fifo.write(part)
        size = stream.codec_context.frame_size or 1024
        while (piece := fifo.read(size, partial=True)) is not None:
            out.mux(stream.encode(piece))
        out.mux(stream.encode(None))
    return path


class Pipe(io.RawIOBase):
    """A file that is written from front to back: its headers tell no length."""

    def __init__(self):
        self.data = b""

    def writable(self):
        return True

    def write(self, data):
        self.data += bytes(data)
        return len(data)


def ends_together(found, sound):
    """The last tenth of a second that was loud is there, and where it was."""
    wanted = soundfile_resample(sound)
    assert abs(len(found) - len(wanted)) < 0.1 * RATE
    n = min(len(found), len(wanted))
    window = 1600
    energies = [np.square(x[: n // window * window]).reshape(-1, window).mean(1) for x in
                (found, wanted)]  # fmt: skip
    assert np.corrcoef(*energies)[0, 1] > 0.8


def soundfile_resample(sound):
    import soxr

    return soxr.resample(sound, 48000, RATE)


@pytest.mark.parametrize(("suffix", "container", "codec"), CONTAINERS)
def test_containers_are_heard_to_their_end(tmp_path, sound, suffix, container, codec):
    path = encode(str(tmp_path / f"a.{suffix}"), sound, container, codec)
    audio = read_audio(path, RATE)
    ends_together(audio.samples, sound)
    assert audio.notes == [] and audio.damage == ""
    assert abs(audio_duration(path) - 3) < 0.1
    part = load_audio(path, RATE, 1.5, 0.5)
    assert len(part) == 8000
    lags = range(-40, 41)  # containers count in milliseconds
    places = [audio.samples[24000 + k :][:8000] for k in lags]
    best = min(np.abs(place - part)[200:-200].max() for place in places)
    assert best < 0.3 * np.abs(part).max()
    if suffix in ("m4a", "mp4", "mov", "avi"):
        np.testing.assert_allclose(part[200:-200], audio.samples[24200:31800], atol=2e-3)


@pytest.mark.parametrize("given", ["bytes", "file", "BytesIO"])
def test_contents_of_a_container(tmp_path, sound, given):
    path = encode(str(tmp_path / "a.m4a"), sound, "ipod", "aac")
    wanted, content = load_audio(path, RATE), Path(path).read_bytes()
    with open(path, "rb") as file:
        source = {"bytes": content, "file": file, "BytesIO": io.BytesIO(content)}[given]
        np.testing.assert_array_equal(load_audio(source, RATE), wanted)


def test_a_track_of_a_video(tmp_path, sound):
    path = str(tmp_path / "a.mkv")
    with av.open(path, "w") as out:
        picture = out.add_stream("mpeg4", rate=1)
        picture.width = picture.height = 16
        picture.pix_fmt = "yuv420p"
        tracks = [out.add_stream("pcm_s16le", rate=48000, layout="mono") for _ in range(2)]
        image = av.VideoFrame(16, 16, "yuv420p")
        image.pts = 0
        out.mux(picture.encode(image))
        for stream, gain in zip(tracks, (1.0, 0.5), strict=True):
            whole = (sound[None] * gain * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(whole, "s16", "mono")
            frame.sample_rate = 48000
            out.mux(stream.encode(frame))
    first, second = (read_audio(path, RATE, track=k).samples for k in (0, 1))
    np.testing.assert_allclose(second, first / 2, atol=1e-4)
    with pytest.raises(ValueError, match="holds 2 audio tracks, not track 2"):
        read_audio(path, RATE, track=2)


def test_a_wrong_suffix(tmp_path, sound, capfd):
    encode(str(tmp_path / "a.m4a"), sound, "ipod", "aac")
    path = tmp_path / "really_mp4.mp3"
    path.write_bytes((tmp_path / "a.m4a").read_bytes())
    ends_together(load_audio(path, RATE), sound)
    assert capfd.readouterr().err == ""  # of C libraries


def mp3(sound, **options):
    return Path(encode(options.pop("path"), sound, "mp3", "libmp3lame", **options)).read_bytes()


@pytest.fixture(scope="module")
def mp3s(sound, tmp_path_factory):
    """{name: (content, seconds)}: variable rate with and without its length, joined, rubbish."""
    path = str(tmp_path_factory.mktemp("mp3") / "a.mp3")
    whole = mp3(sound, path=path, compression_level="5")
    frames = find_frames(whole)
    assert frames.is_regular
    bare = b"".join(whole[at : at + size] for at, size in frames.places)
    tag = b"ID3\4\0\0\0\0\0\x0a" + bytes(10)
    return {
        "whole": (whole, 3.0),
        "bare": (bare, 3.0),
        "tagged": (tag + whole + b"TAG" + bytes(125), 3.0),
        "joined": (whole + tag + whole, 6.0),
        "rubbish": (whole[: frames.places[40][0]] + b"\xff\xfb" * 99 + bare, 4.0),
    }


@pytest.mark.parametrize("name", ["whole", "bare", "tagged", "joined", "rubbish"])
@pytest.mark.parametrize("with_av", [True, False])
def test_an_mp3_is_heard_to_its_end(mp3s, name, with_av, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(containers, "is_installed", lambda: with_av)
    content, seconds = mp3s[name]
    path = tmp_path / "a.mp3"
    path.write_bytes(content)
    samples = load_audio(path, RATE)
    assert abs(len(samples) / RATE - seconds) < 0.1
    assert abs(audio_duration(path) - seconds) < 0.1
    if name in ("whole", "bare", "tagged"):
        assert read_audio(path, RATE).notes == []  # the encoder's padding is no missing sound
    assert abs(len(load_audio(path, RATE, seconds - 0.5)) / RATE - 0.5) < 0.1
    assert capfd.readouterr().err == ""


def test_an_mp3_that_promises_another_length_says_so(mp3s, tmp_path):
    (tmp_path / "a.mp3").write_bytes(mp3s["joined"][0])
    audio = read_audio(tmp_path / "a.mp3", RATE)
    assert len(audio.notes) == 1 and "its header says 3.0" in audio.notes[0]
    assert audio.damage == "" and len(load_audio(tmp_path / "a.mp3", RATE)) > 5.9 * RATE


def test_frames_in_front_of_a_length(mp3s):
    content, _ = mp3s["bare"]
    frames = find_frames(content)
    again = find_frames(with_length(content, frames).getvalue())
    assert again.is_regular and len(again.places) == len(frames.places)
    assert find_frames(bytes(5000)) is None and find_frames(b"\xff\xfb") is None


@pytest.mark.parametrize("codec", ["OPUS", "VORBIS"])
def test_a_chained_ogg(tmp_path, sound, codec):
    one = io.BytesIO()
    soundfile.write(one, sound, 48000, format="OGG", subtype=codec)
    path = tmp_path / "chain.ogg"
    path.write_bytes(one.getvalue() * 3)
    assert [len(link) for link in ogg_links(path.read_bytes())] == [len(one.getvalue())] * 3
    samples = load_audio(path, RATE)
    alone = load_audio(one.getvalue(), RATE)
    assert abs(len(samples) - 9 * RATE) < 100 and abs(audio_duration(path) - 9) < 0.01
    for k in range(3):
        part = load_audio(path, RATE, 3.0 * k + 1, 1.0)
        np.testing.assert_allclose(part[200:-200], alone[16200:31800], atol=1e-3)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_a_wav_without_a_size(tmp_path, sound, size):
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, 48000, format="WAV", subtype="PCM_16")
    content = bytearray(buffer.getvalue())
    at = content.index(b"data") + 4
    content[at : at + 4] = size.to_bytes(4, "little")
    content[4:8] = size.to_bytes(4, "little")
    ends_together(load_audio(bytes(content), RATE), sound)


def test_a_flac_and_a_matroska_from_a_pipe(sound):
    for container, codec in (("flac", "flac"), ("matroska", "aac")):
        pipe = Pipe()
        encode(pipe, sound, container, codec)
        ends_together(load_audio(pipe.data, RATE), sound)
        assert abs(audio_duration(pipe.data) - 3) < 0.1


def test_what_is_cut_is_said(tmp_path, sound):
    """Transcribed as far as it goes; what trains refuses it."""
    path = tmp_path / "a.flac"
    soundfile.write(path, sound, 48000)
    path.write_bytes(path.read_bytes()[:-30000])
    audio = read_audio(path, RATE)
    assert 1 < len(audio.samples) / RATE < 2.9
    assert len(audio.notes) == 1 and audio.notes[0].startswith("its header says 3.00 s, ")
    with pytest.raises(ValueError, match="is damaged or not audio"):
        load_audio(path, RATE)


@pytest.mark.parametrize(
    "kind, coded",
    [
        *(("WAV", coded) for coded in ("PCM_16", "PCM_24", "FLOAT", "ULAW", "MS_ADPCM")),
        *((kind, "PCM_16") for kind in ("AIFF", "AU", "W64", "RF64", "CAF", "NIST", "VOC")),
        ("VOC", "ULAW"),
        *(("OGG", coded) for coded in ("VORBIS", "OPUS", "flac")),
    ],
)
def test_what_libsndfile_reads_short_is_said(sound, kind, coded):
    whole = io.BytesIO()
    if coded == "flac":
        encode(whole, sound, "ogg", coded)
    else:
        soundfile.write(whole, sound, 48000, format=kind, subtype=coded)
    content = whole.getvalue()
    assert read_audio(content, RATE).notes == [] and read_audio(content + b"\0", RATE).notes == []
    audio = read_audio(content[: len(content) * 6 // 10], RATE)
    assert 0.9 < len(audio.samples) / RATE < 2
    is_marked = kind in ("OGG", "CAF", "NIST", "VOC")
    told = "the file ends before its stream" if is_marked else "its header says "
    assert len(audio.notes) == 1 and audio.notes[0].startswith(told) and audio.damage == ""


def test_without_the_extra_it_says_what_to_install(tmp_path, sound, monkeypatch):
    path = encode(str(tmp_path / "a.m4a"), sound, "ipod", "aac")
    monkeypatch.setattr(containers, "is_installed", lambda: False)
    with pytest.raises(ValueError, match=r'a.m4a .* pip install "fastconformer\[media\]"'):
        load_audio(path, RATE)


def test_a_playlist_opens_nothing(tmp_path):
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "a.txt").write_text("ffconcat version 1.0\nfile secret.wav\n")
    for name in ("a.m3u8", "a.txt"):
        with pytest.raises(ValueError, match="damaged or not audio"):
            load_audio(tmp_path / name, RATE)


def test_channels(tmp_path, sound):
    left, right = sound, np.roll(sound, 20000) * 0.5
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([left, right], 1), 48000, subtype="FLOAT")
    apart = read_audio(path, RATE, apart=True).samples
    assert apart.shape == (2, 3 * RATE)
    np.testing.assert_allclose(apart.mean(0), load_audio(path, RATE), atol=1e-4)
    for k in (0, 1):
        np.testing.assert_array_equal(load_audio(path, RATE, channel=(k,)), apart[k])
    np.testing.assert_allclose(load_audio(path, RATE, channel=(0, 1)), apart.mean(0), atol=1e-4)
    with pytest.raises(ValueError, match="has channels 0 to 1, not 2"):
        load_audio(path, RATE, channel=(2,))
    soundfile.write(path, np.stack([left, -left], 1), 48000, subtype="FLOAT")
    assert "channels cancel" in read_audio(path, RATE).notes[0]
    assert read_audio(path, RATE, channel=(1,)).notes == []


def test_nothing_of_this_is_loaded_for_a_plain_file():
    code = "import sys; from fastconformer.audio.files import load_audio; "
    code += f"load_audio({str(SAMPLES / 'jfk.flac')!r}, 16000); sys.exit('av' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    )
