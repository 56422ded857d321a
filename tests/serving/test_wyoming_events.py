"""Wyoming's events without a client: what a session answers to wrong types."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from fastconformer.serving.wyoming import Card, Session


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
        model = SimpleNamespace(head=lambda name: SimpleNamespace(slots=()), sample_rate=16000)
        card = Card("tiny", ("en",))
        await Session(writer, SimpleNamespace(model=model), card, None).talk(reader, 5.0)
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
