"""Wyoming's events without a client: what a session answers to wrong types."""

import asyncio
import json
import socket
from types import SimpleNamespace

import pytest

from fastconformer.serving.wyoming import Card, Session, serving

MODEL = SimpleNamespace(head=lambda name: SimpleNamespace(slots=()), sample_rate=16000)
BATCHER, CARD = SimpleNamespace(model=MODEL), Card("tiny", ("en",))


class Writer:
    """Keeps the events that are written."""

    def __init__(self):
        self.events = []

    def write(self, line: bytes) -> None:
        self.events.append(json.loads(line))

    async def drain(self) -> None:
        pass


def answers(*events: dict) -> list[dict]:
    async def talk() -> list[dict]:
        reader, writer = asyncio.StreamReader(), Writer()
        reader.feed_data(b"".join(json.dumps(event).encode() + b"\n" for event in events))
        reader.feed_eof()
        await Session(writer, BATCHER, CARD, None).talk(reader, 5.0)
        return writer.events

    return asyncio.run(talk())


@pytest.mark.parametrize("name", ["transcript_names", "transcript_terms"])
@pytest.mark.parametrize("value", [5, "Anna", {"Anna": 1}, ["Anna", 5]])
def test_phrases_that_are_none_are_an_error_and_the_session_goes_on(name, value):
    wrong = {"type": "transcribe", "data": {"language": "en", name: value}}
    error, pong = answers(wrong, {"type": "ping", "data": {"text": "still"}})
    assert error["type"] == "error" and f"{name} is {value!r}" in error["data"]["text"]
    assert pong == {"type": "pong", "version": pong["version"], "data": {"text": "still"}}


def test_a_language_that_is_none_is_an_error():
    [error] = answers({"type": "transcribe", "data": {"language": 5}})
    assert "language is 5" in error["data"]["text"]
    assert not answers({"type": "transcribe", "data": {"language": "en", "transcript_names": []}})


@pytest.mark.parametrize("field", ["rate", "width", "channels"])
@pytest.mark.parametrize("value", [None, True, 1.0, "1", [1]])
def test_audio_of_no_form_is_an_error(field, value):
    start = {
        "type": "audio-start",
        "data": {"rate": 16000, "width": 2, "channels": 1, field: value},
    }
    error, pong = answers(start, {"type": "ping"})
    assert error["type"] == "error" and "the audio has" in error["data"]["text"]
    assert pong["type"] == "pong"


def test_an_open_connection_ends_with_the_server_and_without_a_word():
    async def end() -> list[dict]:
        said: list[dict] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, fault: said.append(fault))
        listener = socket.create_server(("127.0.0.1", 0))
        place = listener.getsockname()
        async with serving(listener, BATCHER, CARD, None, 60.0, 4):
            reader, writer = await asyncio.open_connection(*place)
            writer.write(b'{"type": "ping"}\n')
            assert await reader.readline()
        assert await reader.read() == b""
        writer.close()
        await asyncio.sleep(0.05)
        return said

    assert not asyncio.run(end())
