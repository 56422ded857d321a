"""`fastconformer listen`: lines of text from a file, a pipe and a microphone that is made here."""

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from fastconformer import listen, load_model
from fastconformer.audio import load_audio

ROOT = Path(__file__).parent.parent
BASE = ROOT / "models" / "base_tiny.nemo"
JFK = ROOT / "samples" / "jfk.flac"


@pytest.fixture(scope="module")
def wanted():
    stream = load_model(BASE).stream()
    stream.feed(load_audio(JFK, 16000))
    return stream.finish().text


def test_a_file_becomes_a_line(wanted, capsys):
    long = ["--pause-s", "60"]
    assert listen.main(["--model", str(BASE), "--input", str(JFK), *long]) == 0
    assert capsys.readouterr().out == wanted + "\n"


def test_a_pipe_becomes_a_line_as_it_comes():
    samples = (load_audio(JFK, 16000) * 32768).round().clip(-32768, 32767).astype("<i2")
    pcm = samples.tobytes()
    stream = load_model(BASE).stream()
    stream.feed(samples.astype(np.float32) / 32768)
    wanted = stream.finish().text
    command = [sys.executable, "-m", "fastconformer.listen", "--model", str(BASE), "--input", "-"]
    done = subprocess.Popen(
        [*command, "--pause-s", "60"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    done.stdin.write(pcm[:200001])  # in the middle of a sample
    done.stdin.flush()
    early = done.stdout.read(10).decode()
    assert early and wanted.startswith(early)  # before the rest is there
    rest, _ = done.communicate(pcm[200001:])
    assert early + rest.decode() == wanted + "\n" and done.returncode == 0


def test_a_pause_ends_a_line(capsys):
    clip = load_audio(JFK, 16000)[:64000]
    model = load_model(BASE)
    blocks = np.split(np.concatenate([clip, np.zeros(80000, np.float32), clip]), 26)
    listen.write_lines(iter(blocks), model.stream, 2.0, 16000)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(lines)


def test_a_microphone_of_another_rate(monkeypatch, capsys):
    spoken = load_audio(JFK, 48000)[: 48000 * 4]

    class InputStream:
        def __init__(self, rate, size, device, channels, dtype, callback):
            assert (rate, channels, dtype) == (48000, 1, "float32")
            self.size, self.callback = size, callback

        def __enter__(self):
            for start in range(0, len(spoken), self.size):
                self.callback(spoken[start : start + self.size, None], self.size, None, None)

        def __exit__(self, *error):
            pass

    devices = {"name": "Test", "default_samplerate": 48000.0}
    fake = types.SimpleNamespace(
        InputStream=InputStream, query_devices=lambda *_: devices, PortAudioError=OSError
    )
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    blocks = listen._microphone(None, 16000)
    samples = next(blocks)
    blocks.close()
    assert 0.95 * 64000 < len(samples) <= 64000
    assert "Test" in capsys.readouterr().err


def test_what_does_not_fit_is_said(capsys, monkeypatch):
    model = ["--model", str(BASE)]
    for arguments, status, word in [
        (["--input", "nothing.wav"], 1, "nothing.wav"),
        (["--input", "x.wav", "--rate", "16000"], 2, "--rate"),
        (["--pause-s", "0"], 2, "--pause-s"),
        (["--input", str(JFK), "--microphone", "1"], 2, "--microphone"),
    ]:
        assert listen.main(model + arguments) == status
        assert word in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert listen.main(model) == 1
    assert "fastconformer[listen]" in capsys.readouterr().err
