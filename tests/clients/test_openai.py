"""The server under OpenAI's own client."""

import asyncio
import base64
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
from test_serve import BASE, ROOT, Server

from fastconformer import load_model
from fastconformer.audio import load_audio
from fastconformer.formats.subtitles import to_srt, to_vtt

openai = pytest.importorskip("openai", reason="openai is not installed")
JFK = ROOT / "samples" / "jfk.flac"


@pytest.fixture(scope="module")
def server():
    started = Server("--api-key", "secret", "--name", "tiny")
    yield started
    started.stop()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(api_key="secret", base_url=f"{server.url}/v1", max_retries=0)


@pytest.fixture(scope="module")
def transcript():
    return load_model(BASE).transcribe([JFK], timestamps=True)[0]


def test_every_format(client, transcript):
    def ask(**options):
        return client.audio.transcriptions.create(file=JFK, model="whisper-1", **options)

    assert ask().text == transcript.text
    assert ask(response_format="text") == transcript.text + "\n"
    assert ask(response_format="srt") == to_srt(transcript)
    assert ask(response_format="vtt") == to_vtt(transcript)
    found = ask(response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert found.text == transcript.text and found.duration == pytest.approx(11.0)
    assert [(w.word, w.start) for w in found.words] == [
        (w.text, round(w.start, 3)) for w in transcript.words
    ]
    assert [s.text for s in found.segments] == [s.text for s in transcript.segments]


def test_events(client, transcript):
    events = list(client.audio.transcriptions.create(file=JFK, model="tiny", stream=True))
    assert "".join(e.delta for e in events if e.type == "transcript.text.delta") == transcript.text
    assert events[-1].type == "transcript.text.done" and events[-1].text == transcript.text


def test_errors_are_its_own(server, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="cannot be read as audio"):
        client.audio.transcriptions.create(file=("a.wav", b"no audio"), model="tiny")
    with pytest.raises(openai.NotFoundError, match="does not translate"):
        client.audio.translations.create(file=JFK, model="tiny")
    wrong = openai.OpenAI(api_key="wrong", base_url=f"{server.url}/v1", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()


def test_realtime(server):
    clip = load_audio(JFK, 16000)

    async def talk() -> tuple[str, str]:
        client = openai.AsyncOpenAI(
            api_key="secret",
            base_url=f"{server.url}/v1",
            websocket_base_url=server.url.replace("http", "ws") + "/v1",
        )
        async with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
            form = {"type": "audio/pcm", "rate": 16000}
            audio = {"input": {"format": form, "turn_detection": None}}
            await connection.session.update(session={"type": "transcription", "audio": audio})
            pcm = (clip * 32767).astype("<i2")
            for part in np.array_split(pcm, 20):
                encoded = base64.b64encode(part.tobytes()).decode()
                await connection.input_audio_buffer.append(audio=encoded)
            await connection.input_audio_buffer.commit()
            deltas = ""
            async for event in connection:
                if event.type == "conversation.item.input_audio_transcription.delta":
                    deltas += event.delta
                if event.type == "conversation.item.input_audio_transcription.completed":
                    return deltas, event.transcript
                assert event.type != "error", event

    deltas, completed = asyncio.run(talk())
    assert deltas == completed
    stream = load_model(BASE).stream()
    stream.feed((clip * 32767).astype("<i2").astype(np.float32) / 32768)
    assert completed == stream.finish().text
