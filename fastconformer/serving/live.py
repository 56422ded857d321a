"""Live transcription over a websocket, by OpenAI's realtime protocol (intent=transcription).

The client sends `input_audio_buffer.append` with base64 of 16-bit PCM and hears
`...transcription.delta` as text becomes stable; `input_audio_buffer.commit` ends an utterance with
`...transcription.completed`. With `turn_detection: {"type": "semantic_vad"}` a model that tells
where utterances end (`<EOU>`) commits them itself. A session that asks for `include: ["words"]`
also hears, after every append, what may still change and the times of words (`transcript.partial`,
ours).

Source: the OpenAI API reference, Realtime, and the `openai` client 3.57.
"""

import asyncio
import base64
import binascii
import itertools
import json

import numpy as np
import soxr
from starlette.websockets import WebSocket, WebSocketDisconnect

from .batcher import Batcher, Full
from .openai import spoken_in, timed_word

LARGEST_EVENT = 16 << 20  # bytes, as OpenAI's
DEFAULT_RATE_HZ = 24000
ITEM = "conversation.item.input_audio_transcription"


class Refused(ValueError):
    """An event that cannot be served; `param` names the field."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class Session:
    """One websocket: its settings, and the stream of the utterance that is being said."""

    def __init__(self, socket: WebSocket, batcher: Batcher, head: str | None, longest_s: float):
        self.socket, self.batcher, self.head, self.longest_s = socket, batcher, head, longest_s
        self.rate_hz, self.wants_words = DEFAULT_RATE_HZ, False
        self.commits_itself = False  # where the model tells an utterance's end
        self.slots: dict = {}  # of the head's prompt
        self._numbers = itertools.count(1)
        self._items = itertools.count(1)
        self.previous = None  # the item before
        self._begin()

    def _begin(self) -> None:
        self.item = f"item_{next(self._items)}"
        self.stream = self.batcher.model.stream(self.head, **self.slots)
        self.resampler, self.sent, self.heard_s = None, "", 0.0
        self.n_settled = 0  # words that were told and stay

    async def send(self, kind: str, **fields) -> None:
        event = {"type": kind, "event_id": f"event_{next(self._numbers)}"} | fields
        await self.socket.send_text(json.dumps(event, ensure_ascii=False))

    def described(self) -> dict:
        """The session as events show it."""
        audio = {"format": {"type": "audio/pcm", "rate": self.rate_hz}}
        audio["turn_detection"] = {"type": "semantic_vad"} if self.commits_itself else None
        return {
            "type": "transcription",
            "object": "realtime.transcription_session",
            "audio": {"input": audio},
            "include": ["words"] if self.wants_words else None,
        }

    def update(self, session: dict) -> None:
        """Takes a `session.update`; what it does not name stays. Refused: what this server has not,
        and then nothing of it is taken."""
        audio = _part(_part(session, "audio"), "input")
        form, include = _part(audio, "format"), session.get("include")
        if form.get("type", "audio/pcm") != "audio/pcm":
            raise Refused(f"the format is {form['type']!r}, expected audio/pcm", "session.audio")
        rate = form.get("rate", self.rate_hz)
        if not isinstance(rate, int) or not 8000 <= rate <= 96000:
            raise Refused(f"the rate is {rate!r}, expected 8000 to 96000", "session.audio")
        if rate != self.rate_hz and self.heard_s:
            raise Refused("the rate stays the same within an utterance; commit it", "session.audio")
        if not isinstance(include, list | None):
            raise Refused(f"include is {include!r}, expected a list", "session.include")
        turns = audio.get("turn_detection")
        tells = bool(self.stream.head.tokenizer.utterance_ends)
        by_model = isinstance(turns, dict) and turns.get("type") == "semantic_vad"
        if turns is not None and not (tells and by_model):
            raise Refused(
                f"turn_detection is {turns!r}; set it to null and commit each utterance"
                + (", or its type to semantic_vad" if tells else ""),
                "session.audio.input.turn_detection",
            )
        language = _part(audio, "transcription").get("language")
        if language is not None:
            self._speak(str(language))
        self.rate_hz = rate
        if "turn_detection" in audio:
            self.commits_itself = turns is not None
        if "include" in session:
            self.wants_words = "words" in (include or ())

    def _speak(self, language: str) -> None:
        """Takes a language where the model is told one, from the next utterance on."""
        before = self.slots
        self.slots = spoken_in(language, self.batcher.model.head(self.head).slots)
        if self.slots != before and not self.heard_s:
            try:
                self.stream = self.batcher.model.stream(self.head, **self.slots)
            except ValueError as error:
                self.slots = before
                raise Refused(str(error), "session.audio.input.transcription.language") from None

    async def append(self, audio) -> None:
        """Takes samples into the utterance, and tells what is new."""
        try:
            data = base64.b64decode(audio, validate=True)
        except (TypeError, ValueError, binascii.Error):
            raise Refused("audio is not base64", "audio") from None
        if len(data) % 2:
            raise Refused(f"audio has {len(data)} bytes, expected 16-bit samples", "audio")
        samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768
        if self.heard_s + len(samples) / self.rate_hz > self.longest_s:
            raise Refused(f"an utterance is at most {self.longest_s:g} s long; commit it", "audio")
        for start in range(0, len(samples), self.rate_hz):  # others may speak in between
            part = samples[start : start + self.rate_hz]
            self.heard_s += len(part) / self.rate_hz
            partial = await self._hear(part, last=False)
            await self._tell(partial)
            if self.commits_itself and partial.ended_s is not None:
                await self.commit()

    async def _hear(self, samples: np.ndarray, last: bool):
        model_hz = self.batcher.model.sample_rate
        if self.rate_hz != model_hz:
            if self.resampler is None:
                self.resampler = soxr.ResampleStream(self.rate_hz, model_hz, 1, dtype="float32")
            samples = self.resampler.resample_chunk(samples, last=last).reshape(-1)
        return await asyncio.wrap_future(self.batcher.feed(self.stream, samples))

    async def _tell(self, partial) -> None:
        text, stable = partial.text, partial.stable_text
        if stable.startswith(self.sent) and len(stable) > len(self.sent):
            delta, self.sent = stable[len(self.sent) :], stable
            await self.send(f"{ITEM}.delta", item_id=self.item, content_index=0, delta=delta)
        if self.wants_words:
            words = [timed_word(word) for word in partial.words_from(self.n_settled)]
            fields = {"text": text, "stable_text": stable, "words": words}
            fields["first_word"], self.n_settled = self.n_settled, partial.n_settled
            await self.send("transcript.partial", item_id=self.item, **fields)

    async def commit(self) -> None:
        """Ends the utterance, tells the rest of it, and begins the next."""
        if not self.heard_s:
            raise Refused("the input audio buffer is empty")
        item, previous = self.item, self.previous
        await self.send("input_audio_buffer.committed", item_id=item, previous_item_id=previous)
        if self.resampler is not None:
            await self._hear(np.zeros(0, np.float32), last=True)
        found = await asyncio.wrap_future(self.batcher.feed(self.stream, None))
        rest = found.text[len(self.sent) :] if found.text.startswith(self.sent) else ""
        if rest:
            await self.send(f"{ITEM}.delta", item_id=item, content_index=0, delta=rest)
        fields = {"words": [timed_word(w) for w in found.words]} if self.wants_words else {}
        await self.send(
            f"{ITEM}.completed",
            item_id=item,
            content_index=0,
            transcript=found.text,
            usage={"type": "duration", "seconds": round(found.duration, 3)},
            **fields,
        )
        self.previous = item
        self._begin()

    async def take(self, message: str) -> None:
        """One event of the client's."""
        try:
            event = json.loads(message)
            kind = event["type"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Refused("an event is a JSON object with a type") from None
        if kind in ("session.update", "transcription_session.update"):
            session = _part(event, "session")
            session = session if kind == "session.update" else _of_before(session)
            self.update(session)
            unused = _unused(session, self.batcher.model.head(self.head).slots)
            told = {"unused_fields": unused} if unused else {}
            await self.send("session.updated", session=self.described(), **told)
        elif kind == "input_audio_buffer.append":
            await self.append(event.get("audio"))
        elif kind == "input_audio_buffer.commit":
            await self.commit()
        elif kind == "input_audio_buffer.clear":
            self._begin()
            await self.send("input_audio_buffer.cleared")
        else:
            raise Refused(f"there is no event {kind!r} here", "type")


def _part(of: dict, name: str) -> dict:
    """An object within an object; none: an empty one."""
    value = of.get(name)
    if not isinstance(value, dict | None):
        raise Refused(f"{name} is {value!r}, expected an object", "session")
    return value or {}


def _unused(session: dict, slots) -> list[str]:
    """Fields of an update that change nothing here, by their dotted names: a `prompt`, since no
    stream is decoded with phrases, or a language where the model takes none."""
    audio = _part(session, "audio")
    heard = _part(audio, "input")
    read = {  # the model may be any word
        "": (session, {"type", "object", "audio", "include"}),
        "audio.": (audio, {"input"}),
        "audio.input.": (heard, {"format", "transcription", "turn_detection"}),
        "audio.input.format.": (_part(heard, "format"), {"type", "rate"}),
        "audio.input.transcription.": (
            _part(heard, "transcription"),
            {"model", "language"} if spoken_in("", slots) else {"model"},
        ),
    }
    found = [
        prefix + name
        for prefix, (part, known) in read.items()
        for name, value in part.items()
        if value and name not in known
    ]
    others = any(name != "words" for name in session.get("include") or ())
    return found + ["include"] * others


def _of_before(session: dict) -> dict:
    """A session as the protocol's first version wrote it, as clients still do."""
    audio: dict = {"transcription": _part(session, "input_audio_transcription")}
    if "input_audio_format" in session:
        form = session["input_audio_format"]
        if form != "pcm16":
            raise Refused(f"the format is {form!r}, expected pcm16", "session.input_audio_format")
        audio["format"] = {"type": "audio/pcm", "rate": DEFAULT_RATE_HZ}
    if "turn_detection" in session:
        audio["turn_detection"] = session["turn_detection"]
    known = ("input_audio_transcription", "input_audio_format", "turn_detection")
    rest = {name: value for name, value in session.items() if name not in known}
    return rest | {"audio": {"input": audio}}


async def serve_session(
    socket: WebSocket, batcher: Batcher, head: str | None, longest_s: float, idle_s: float
) -> None:
    """Talks to one client until it leaves, or says nothing for `idle_s`."""
    protocols = socket.scope.get("subprotocols") or ()
    await socket.accept("realtime" if "realtime" in protocols else None)
    try:
        session = Session(socket, batcher, head, longest_s)
        await session.send("session.created", session=session.described())
        while True:
            message = await asyncio.wait_for(socket.receive_text(), idle_s)
            try:
                await session.take(message)
            except (Refused, Full) as error:
                fields = {"type": "invalid_request_error", "message": str(error), "code": None}
                if isinstance(error, Full):
                    fields["type"] = "server_error"
                fields["param"] = getattr(error, "param", None)
                await session.send("error", error=fields)
    except WebSocketDisconnect:
        return
    except asyncio.TimeoutError:
        await socket.close(1001, "nothing was said")
    except (KeyError, ValueError) as error:  # a binary message, or a model that cannot be streamed
        await socket.close(1003, " ".join(str(error).split())[:100])
