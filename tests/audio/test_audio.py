"""Audio reading: formats, rates, sections, bad files."""

import io
import os

import numpy as np
import pytest
import soundfile
from conftest import SAMPLES

from fastconformer.audio import containers
from fastconformer.audio.files import audio_duration, load_audio, read_audio
from fastconformer.recordings.samples import read_samples


def tone(seconds=0.5, rate=16000, hz=440.0):
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def write(path, samples, rate=16000, **options):
    soundfile.write(path, samples, rate, **options)
    return path


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_sixteen_bit_samples_are_exact(tmp_path, suffix):
    samples = np.random.default_rng(0).integers(-32768, 32768, 5000, dtype=np.int16)
    path = write(tmp_path / f"a.{suffix}", samples)
    for given in (path, str(path)):
        audio = load_audio(given, 16000)
        assert audio.dtype == np.float32 and audio.flags.c_contiguous and audio.flags.writeable
        np.testing.assert_array_equal(audio, samples.astype(np.float32) / 32768)
    assert audio_duration(path) == 5000 / 16000


def test_float_samples_are_not_clipped(tmp_path):
    samples = np.array([0.0, 1.5, -3.0, 1e-7], dtype=np.float32)
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(path, 16000), samples)
    path = write(tmp_path / "b.wav", samples.astype(np.float64), subtype="DOUBLE")
    np.testing.assert_array_equal(load_audio(path, 16000), samples)


def test_channels_are_averaged(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, (999, 3), dtype=np.int16)
    audio = load_audio(write(tmp_path / "a.wav", samples), 16000)
    np.testing.assert_allclose(audio, samples.mean(axis=1) / 32768, atol=1e-7)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_a_tone_survives_format_and_rate(tmp_path, suffix, rate):
    path = write(tmp_path / f"a.{suffix}", tone(rate=rate), rate)
    assert abs(audio_duration(path) - 0.5) < 0.001
    audio = load_audio(path, 16000)
    assert abs(len(audio) - 8000) <= 1
    middle = slice(1000, 7000)  # lossy codecs and filters ring at the edges
    limit = 3e-4 if suffix in ("wav", "flac") else 0.05
    assert np.abs(audio[: len(tone())] - tone()[: len(audio)])[middle].max() < limit


def test_what_the_target_rate_cannot_hold_is_filtered(tmp_path):
    path = write(tmp_path / "a.wav", tone(rate=44100, hz=12000.0), 44100)
    assert np.abs(load_audio(path, 16000)[1000:-1000]).max() < 1e-3


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_a_section_is_that_part_of_the_whole(tmp_path, suffix):
    samples = 0.1 * np.random.default_rng(0).standard_normal(16000)
    path = write(tmp_path / f"a.{suffix}", samples)
    whole = load_audio(path, 16000)
    for offset_s, duration_s in ((0.0, 0.25), (0.25, 0.5), (0.25, None), (0.9, 5.0), (0.1, 2.3e-5)):
        start = round(offset_s * 16000)
        end = len(whole) if duration_s is None else start + max(1, round(duration_s * 16000))
        part = load_audio(path, 16000, offset_s, duration_s)
        np.testing.assert_array_equal(part, whole[start:end])


def test_a_section_is_resampled(tmp_path):
    path = write(tmp_path / "a.wav", tone(1.0, 8000), 8000)
    part = load_audio(path, 16000, 0.5, 0.25)
    assert len(part) == 4000
    assert np.abs(part - tone(1.0)[8000:12000])[300:-300].max() < 1e-3


def test_a_long_file_is_read_whole(tmp_path):
    samples = np.tile(np.arange(-1000, 1000, dtype=np.int16), 2200)  # more than one block
    audio = load_audio(write(tmp_path / "a.wav", samples), 16000)
    np.testing.assert_array_equal(audio * 32768, samples)


def test_a_length_that_the_file_does_not_have_takes_no_memory(tmp_path):
    path = write(tmp_path / "a.flac", tone())
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F
    content[22:26] = b"\xff" * 4  # 2**36 samples, 256 GiB
    path.write_bytes(content)
    try:
        assert len(load_audio(path, 16000)) == 8000
    except ValueError as error:
        assert str(path) in str(error)


def refused(path, message, error=ValueError, **section):
    with pytest.raises(error, match=message) as caught:
        load_audio(path, 16000, **section)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    if not section and "NaN" not in message:
        with pytest.raises(error, match=message):
            audio_duration(path)


def test_a_flac_without_a_length_is_named(tmp_path, monkeypatch):
    """As encoders leave it when they write to a pipe: 36 bits of sample count are zero."""
    monkeypatch.setattr("fastconformer.audio.containers.is_installed", lambda: False)
    path = write(tmp_path / "a.flac", tone())
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    refused(path, "does not tell its length")


def test_bad_files_are_named(tmp_path):
    refused(tmp_path / "none.wav", "no such audio file", FileNotFoundError)
    refused(tmp_path / ("long" * 100), "no such audio file", FileNotFoundError)
    refused(tmp_path, "is not a file")
    (tmp_path / "empty.wav").touch()
    refused(tmp_path / "empty.wav", "is empty")
    refused(write(tmp_path / "zero.wav", np.zeros(0)), "holds no samples")
    for index, content in enumerate((b"RIFF", b"hello" * 99, b"fLaC" + bytes(99), b"OggS" * 99)):
        path = tmp_path / f"{index}.wav"
        path.write_bytes(content)
        refused(path, "damaged or not audio")


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    refused(tmp_path / "pipe.wav", "is not a file")


def as_from_a_pipe(kind: str, samples: np.ndarray) -> bytes:
    """A file whose writer could not go back to tell its length, as FFmpeg and GStreamer write."""
    data = io.BytesIO()
    soundfile.write(data, samples, 16000, format=kind, subtype="PCM_16")
    found = bytearray(data.getvalue())
    if kind == "W64":
        at = found.index(b"data") + 16
        found[16:24], found[at : at + 8] = b"\xff" * 8, b"\xff" * 7 + b"\x7f"
    elif kind == "RF64":
        found[20:44] = bytes(24)
    else:
        at = found.index(b"data") + 4
        found[4:8] = found[at : at + 4] = bytes(4)
    return bytes(found)


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64"])
@pytest.mark.parametrize("has_media", [True, False])
def test_a_header_without_a_length_is_read_to_the_end(tmp_path, monkeypatch, kind, has_media):
    if not has_media:
        monkeypatch.setattr(containers, "is_installed", lambda: False)
    samples = tone()
    content = as_from_a_pipe(kind, samples)
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    for source in (content, path):
        audio = read_audio(source, 16000)
        assert np.abs(audio.samples - samples).max() < 1e-4 and not audio.notes
        assert audio_duration(source) == 0.5
    path.write_bytes(as_from_a_pipe(kind, np.zeros(0)))
    refused(path, "holds no samples" if has_media else "holds no samples|damaged")
    cut = io.BytesIO()  # a length that is told stays what is promised
    soundfile.write(cut, samples, 16000, format=kind, subtype="PCM_16")
    [note] = read_audio(cut.getvalue()[:-8000], 16000).notes
    assert note.startswith("its header says 0.") and note.endswith("0.25 s were read")


def test_an_empty_wav_is_not_what_follows_its_sound(monkeypatch):
    monkeypatch.setattr(containers, "is_installed", lambda: False)
    content = as_from_a_pipe("WAV", np.zeros(0)) + b"LIST" + (1000).to_bytes(4, "little")
    with pytest.raises(ValueError, match="holds no samples"):
        load_audio(content + b"INFO" * 250, 16000)


def test_a_truncated_flac_is_named(tmp_path):
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000)
    path = write(tmp_path / "a.flac", noise)
    path.write_bytes(path.read_bytes()[:-999])
    with pytest.raises(ValueError, match="damaged or not audio") as caught:
        load_audio(path, 16000)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_named(tmp_path, value):
    samples = tone()
    samples[77] = value
    refused(write(tmp_path / "a.wav", samples, subtype="FLOAT"), "NaN or infinite samples")


def test_samples_that_are_no_sound_are_named(tmp_path):
    samples = tone()
    samples[77] = -1e30
    with pytest.raises(ValueError, match="a.wav holds samples of up to 1e"):
        load_audio(write(tmp_path / "a.wav", samples, subtype="FLOAT"), 16000)
    with pytest.raises(ValueError, match="an audio array holds samples of up to 1e"):
        read_samples(samples, 16000)
    assert len(read_samples(samples.clip(-1) * 40000, 16000)) == len(samples)  # as 16 bits count


def test_an_impossible_rate_is_named(tmp_path):
    path = write(tmp_path / "a.wav", tone())
    content = bytearray(path.read_bytes())
    for rate in (0, 1, 2**31 - 1):
        content[24:28] = rate.to_bytes(4, "little")
        path.write_bytes(content)
        refused(path, "damaged")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"offset_s": -0.1}, "offset is -0.1 s"),
        ({"offset_s": float("nan")}, "offset is nan s"),
        ({"offset_s": 0.5}, "offset 0.5 s is past the end, the file has 0.500 s"),
        ({"offset_s": 1e300}, "past the end"),
        ({"duration_s": 0.0}, "duration is 0.0 s"),
        ({"duration_s": -1.0}, "duration is -1.0 s"),
        ({"duration_s": float("inf")}, "duration is inf s"),
    ],
)
def test_impossible_sections_are_named(tmp_path, section, message):
    refused(write(tmp_path / "a.wav", tone()), message, **section)


def test_shorter_than_a_sample_after_resampling(tmp_path):
    path = write(tmp_path / "a.wav", np.array([0.1]), 192000)
    try:
        assert len(load_audio(path, 8000)) == 1
    except ValueError as error:
        assert "shorter than one sample" in str(error)


REAL = [
    "sentence.wav",
    "jfk.flac",
    "talk.ogg",
    "prompts/ru_conf-full.ogg",
    "digits_8k/0_theo_0.flac",
]


@pytest.mark.parametrize("name", REAL)
def test_real_recordings(name):
    audio = load_audio(SAMPLES / name, 16000)
    assert 0.001 < np.abs(audio).max() <= 1.1  # a lossy codec may overshoot
    assert abs(len(audio) / 16000 - audio_duration(SAMPLES / name)) < 1e-3
