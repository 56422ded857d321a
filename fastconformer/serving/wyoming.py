"""The Wyoming protocol over TCP, by which home assistants ask for the text of a spoken command.

An event is a line of JSON, then `data_length` bytes of more JSON and `payload_length` bytes of
audio. `describe` is answered with `info`; `audio-start`, any number of `audio-chunk` and
`audio-stop` with the `transcript`, or an `error`. The protocol has no keys. Source: the `wyoming`
package 1.10.
"""

import asyncio
import contextlib
import json
import socket
from dataclasses import dataclass

import numpy as np
import soxr

from .. import __version__
from .batcher import Batcher, Full
from .openai import spoken_in

LARGEST_LINE, LARGEST_DATA, LARGEST_PAYLOAD = 1 << 16, 1 << 18, 1 << 22  # bytes
LONGEST_S = 600.0  # of a command


@dataclass(frozen=True)
class Card:
    """What a home assistant is told of the model: its name, and the languages it speaks."""

    name: str
    languages: tuple[str, ...]


class Unusable(ValueError):
    """An event that cannot be served; the session goes on."""


@contextlib.asynccontextmanager
async def serving(
    listener: socket.socket,
    batcher: Batcher,
    card: Card,
    head: str | None,
    idle_s: float,
    most: int,
):
    """Serves the clients of a listening socket inside; at its end, what was asked is answered.
    At most `most` clients at a time, each for `idle_s` of silence at most."""
    sessions: dict[asyncio.Task, Session] = {}

    async def talk(reader, writer):
        task = asyncio.current_task()
        try:
            if len(sessions) < most:
                sessions[task] = Session(writer, batcher, card, head)
                await sessions[task].talk(reader, idle_s)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            pass  # the client is gone, or says nothing
        except asyncio.CancelledError:
            pass  # the server ends; Python 3.11 would print where
        finally:
            sessions.pop(task, None)
            writer.close()

    server = await asyncio.start_server(talk, sock=listener, limit=LARGEST_LINE)
    try:
        yield
    finally:
        server.close()
        while any(session.is_answering for session in sessions.values()):
            await asyncio.sleep(0.05)
        for task in list(sessions):
            task.cancel()


class Session:
    """One client: what it asked for, and the audio of the command that is being said."""

    def __init__(
        self, writer: asyncio.StreamWriter, batcher: Batcher, card: Card, head: str | None
    ):
        self.writer, self.batcher, self.card, self.head = writer, batcher, card, head
        self.options: dict = {}
        self.is_answering = False
        self._begin(None)

    def _begin(self, form: tuple[int, int] | None) -> None:
        self.form, self.chunks, self.seconds = form, [], 0.0

    async def talk(self, reader: asyncio.StreamReader, idle_s: float) -> None:
        """Answers events until the client leaves or sends what is none."""
        while True:
            event = await asyncio.wait_for(read_event(reader), idle_s)
            if event is None:
                return
            kind, data, payload = event
            try:
                await self.take(kind, data, payload)
            except (Unusable, Full) as error:
                self._begin(None)
                await self.send("error", {"text": str(error), "code": type(error).__name__})

    async def send(self, kind: str, data: dict) -> None:
        line = json.dumps({"type": kind, "version": __version__, "data": data}, ensure_ascii=False)
        self.writer.write(line.encode() + b"\n")
        await self.writer.drain()

    async def take(self, kind: str, data: dict, payload: bytes) -> None:
        """One event. Events of kinds that are not known are passed over, as the protocol wants."""
        if kind == "describe":
            await self.send("info", self.described())
        elif kind == "ping":
            await self.send("pong", {"text": data.get("text")})
        elif kind == "transcribe":
            self.options = self.asked(data)
        elif kind == "audio-start":
            self._begin(_form(data))
        elif kind == "audio-chunk":
            self.hear(data, payload)
        elif kind == "audio-stop":
            self.is_answering = True
            try:
                await self.answer()
            finally:
                self.is_answering = False

    def described(self) -> dict:
        """What Wyoming's `info` tells of the model."""
        origin = {"name": "fastconformer", "url": "https://arxiv.org/abs/2305.05084"}
        common = {"attribution": origin, "installed": True, "version": __version__}
        name = {"name": self.card.name, "description": self.card.name}
        model = common | name | {"languages": list(self.card.languages)}
        program = common | {
            "name": "fastconformer",
            "description": "FastConformer speech recognition",
            "models": [model],
            "supports_transcript_streaming": False,
        }
        others = {kind: [] for kind in ("tts", "handle", "intent", "wake", "mic", "snd")}
        return {"asr": [program]} | others

    def asked(self, data: dict) -> dict:
        """Options of `transcribe` from a `transcribe` event. Unusable: other than its types."""
        options: dict = {}
        language = data.get("language")
        if not isinstance(language, str | None):
            raise Unusable(f"language is {language!r}, expected a string")
        if language:
            options |= spoken_in(language, self.batcher.model.head(self.head).slots)
        phrases = []
        for name in ("transcript_names", "transcript_terms"):
            terms = data.get(name) or []
            if not isinstance(terms, list) or not all(isinstance(term, str) for term in terms):
                raise Unusable(f"{name} is {terms!r}, expected a list of strings")
            phrases += [term for term in terms if term.strip()]
        return options | ({"boost": phrases} if phrases else {})

    def hear(self, data: dict, payload: bytes) -> None:
        """Takes a chunk of the command, mixed to one channel. Unusable: not 16-bit audio."""
        if self.form is None:
            self._begin(_form(data))
        rate, channels = self.form
        if len(payload) % (2 * channels):
            raise Unusable(f"a chunk has {len(payload)} bytes, expected whole 16-bit samples")
        samples = np.frombuffer(payload, "<i2").reshape(-1, channels)
        self.seconds += len(samples) / rate
        if self.seconds > LONGEST_S:
            raise Unusable(f"a command is at most {LONGEST_S:g} s long")
        self.chunks.append(samples.mean(1).astype(np.float32) / 32768)

    async def answer(self) -> None:
        """The text of the command, from the same line as every other request."""
        text, model_hz = "", self.batcher.model.sample_rate
        if self.seconds:
            samples = np.concatenate(self.chunks)
            if self.form[0] != model_hz:
                samples = soxr.resample(samples, self.form[0], model_hz)
            options = {"head": self.head} | self.options
            try:
                done = await asyncio.wrap_future(self.batcher.submit(samples, options))
            except ValueError as error:
                raise Unusable(" ".join(str(error).split())) from None
            text = done.text
        self._begin(None)
        await self.send("transcript", {"text": text})


async def read_event(reader: asyncio.StreamReader) -> tuple[str, dict, bytes] | None:
    """The next event: kind, data, audio. None: the client left, or what came is no event."""
    try:
        line = await reader.readline()
        if not line:
            return None
        event = json.loads(line)
        data, kind = event.get("data") or {}, event["type"]
        sizes = [event.get(name) or 0 for name in ("data_length", "payload_length")]
        if not (0 <= sizes[0] <= LARGEST_DATA and 0 <= sizes[1] <= LARGEST_PAYLOAD):
            return None
        if sizes[0]:
            data |= json.loads(await reader.readexactly(sizes[0]))
        payload = await reader.readexactly(sizes[1])
        return str(kind), dict(data), payload
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _form(data: dict) -> tuple[int, int]:
    """(rate in Hz, channels) of audio. Unusable: other than 16-bit samples of a usual rate."""
    rate, width, channels = (data.get(name) for name in ("rate", "width", "channels"))
    if width != 2 or not isinstance(rate, int) or not 8000 <= rate <= 96000:
        raise Unusable(f"the audio has width {width} and rate {rate}, expected 2 and 8000 to 96000")
    if type(channels) is not int or not 1 <= channels <= 8:  # True is one, and no number
        raise Unusable(f"the audio has {channels} channels, expected 1 to 8")
    return rate, channels
