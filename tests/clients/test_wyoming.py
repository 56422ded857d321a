"""The server under the real Wyoming client, as home assistants use it."""

import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest
import soxr

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
from test_serve import BASE, ROOT, Server, free_port

from fastconformer import load_model
from fastconformer.audio import load_audio

pytest.importorskip("wyoming", reason="wyoming is not installed")
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.error import Error
from wyoming.info import Describe, Info


@pytest.fixture(scope="module")
def port():
    found = free_port()
    languages = ("--wyoming-languages", "en,de")
    server = Server("--name", "tiny", "--wyoming-port", str(found), *languages)
    yield found
    assert server.stop() == 0


@pytest.fixture(scope="module")
def clip():
    return load_audio(ROOT / "samples" / "jfk.flac", 16000)[:80000]


async def say(client, samples, rate: int = 16000, channels: int = 1, width: int = 2):
    """Sends a command, and gives the answer."""
    pcm = np.repeat((samples * 32767).astype("<i2")[:, None], channels, 1).tobytes()
    form = {"rate": rate, "width": width, "channels": channels}
    await client.write_event(Transcribe(language="en").event())
    await client.write_event(AudioStart(**form).event())
    for start in range(0, len(pcm), 4096 * channels):
        await client.write_event(
            AudioChunk(audio=pcm[start : start + 4096 * channels], **form).event()
        )
    await client.write_event(AudioStop().event())
    return await client.read_event()


def test_commands_get_their_text(port, clip):
    heard = (clip * 32767).astype("<i2").astype(np.float32) / 32768
    wanted = load_model(BASE).transcribe([heard])[0].text

    async def talk():
        async with AsyncTcpClient("127.0.0.1", port) as client:
            await client.write_event(Describe().event())
            info = Info.from_event(await client.read_event())
            model = info.asr[0].models[0]
            assert (model.name, model.languages) == ("tiny", ["en", "de"]) and model.installed
            for channels in (1, 2):  # and a second command on the same connection
                answer = await say(client, clip, channels=channels)
                assert Transcript.from_event(answer).text == wanted
            at_48k = soxr.resample(clip, 16000, 48000)
            assert Transcript.from_event(await say(client, at_48k, 48000)).text

    asyncio.run(talk())


def test_what_does_not_fit_is_an_error_and_the_session_goes_on(port, clip):
    async def talk():
        async with AsyncTcpClient("127.0.0.1", port) as client:
            answer = await say(client, clip[:1000], width=4)
            assert "width 4" in Error.from_event(answer).text
            # chunks of that kind, and the stop, have answers of their own
            while not Transcript.is_type(answer.type):
                answer = await client.read_event()
            answer = await say(client, clip)
            while not Transcript.is_type(answer.type) or not answer.data["text"]:
                answer = await client.read_event()

    asyncio.run(talk())


@pytest.mark.parametrize(
    "rubbish",
    [b"\x00\xff\n", b"[]\n", b'{"type": "x", "payload_length": 99999999999}\n', b"x" * 100000, b""],
)
def test_rubbish_ends_the_connection_only(port, rubbish, clip):
    async def talk():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(rubbish)
        if not rubbish:
            writer.close()
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()
        async with AsyncTcpClient("127.0.0.1", port) as client:
            assert Transcript.is_type((await say(client, clip[:16000])).type)

    asyncio.run(talk())


def test_many_at_once(port, clip):
    async def one():
        async with AsyncTcpClient("127.0.0.1", port) as client:
            return Transcript.from_event(await say(client, clip)).text

    async def crowd():
        return await asyncio.gather(*(one() for _ in range(16)))

    assert len(set(asyncio.run(crowd()))) == 1
