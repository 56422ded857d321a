"""The realtime websocket of a running server."""

import base64
import json

import numpy as np
import pytest
import soxr
from test_serve import ROOT, Server, httpx

from fastconformer import load_model
from fastconformer.audio import load_audio

sync = pytest.importorskip("websockets.sync.client", reason="websockets is not installed")
BASE = ROOT / "models" / "base_tiny.nemo"


@pytest.fixture(scope="module")
def server():
    started = Server("--api-key", "secret", "--max-streams", "3", "--max-duration-s", "30")
    yield started
    started.stop()


@pytest.fixture(scope="module")
def clip():
    return load_audio(ROOT / "samples" / "jfk.flac", 16000)


class Client:
    def __init__(self, server, **options):
        url = server.url.replace("http", "ws") + "/v1/realtime?intent=transcription"
        protocols = ["realtime", "openai-insecure-api-key.secret"]
        self.socket = sync.connect(url, subprotocols=protocols, **options).__enter__()
        assert self.receive()["type"] == "session.created"

    def receive(self) -> dict:
        return json.loads(self.socket.recv(timeout=60))

    def send(self, kind: str, **fields):
        self.socket.send(json.dumps({"type": kind} | fields))

    def update(self, rate: int, *include: str) -> dict:
        form = {"type": "audio/pcm", "rate": rate}
        audio = {"input": {"format": form, "turn_detection": None}}
        session = {"type": "transcription", "audio": audio, "include": list(include)}
        self.send("session.update", session=session)
        return self.receive()

    def append(self, samples: np.ndarray):
        pcm = (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
        self.send("input_audio_buffer.append", audio=base64.b64encode(pcm).decode())

    def until(self, ending: str) -> list[dict]:
        events = [self.receive()]
        while not events[-1]["type"].endswith(ending):
            assert events[-1]["type"] != "error", events[-1]
            events.append(self.receive())
        return events


def as_heard(clip) -> np.ndarray:
    return (clip * 32767).astype("<i2").astype(np.float32) / 32768


def test_deltas_add_up_to_the_streams_text(server, clip):
    client = Client(server)
    assert client.update(16000, "words")["session"]["audio"]["input"]["format"]["rate"] == 16000
    for start in range(0, len(clip), 8000):
        client.append(clip[start : start + 8000])
    client.send("input_audio_buffer.commit")
    events = client.until(".completed")
    deltas = [e["delta"] for e in events if e["type"].endswith(".delta")]
    assert len(deltas) > 2
    stream = load_model(BASE).stream()
    stream.feed(as_heard(clip))
    wanted = stream.finish()
    assert events[-1]["transcript"] == "".join(deltas) == wanted.text
    partials = [e for e in events if e["type"] == "transcript.partial"]
    assert any(e["words"] for e in partials)
    assert all(e["text"].startswith(e["stable_text"]) for e in partials)
    assert len({e["event_id"] for e in events}) == len(events)

    client.append(clip[:32000])  # the next utterance begins anew
    client.send("input_audio_buffer.commit")
    second = client.until(".completed")[-1]
    assert second["item_id"] != events[-1]["item_id"] and second["words"]
    client.socket.close()


def test_what_an_update_does_not_name_stays(server):
    client = Client(server)
    client.update(16000, "words")
    client.send("session.update", session={"type": "transcription"})
    session = client.receive()["session"]
    assert session["include"] == ["words"] and session["audio"]["input"]["format"]["rate"] == 16000
    first = {"input_audio_format": "pcm16", "turn_detection": None, "include": []}
    client.send("transcription_session.update", session=first)
    session = client.receive()["session"]
    assert session["include"] is None and session["audio"]["input"]["format"]["rate"] == 24000
    client.socket.close()


def test_what_changes_nothing_is_named(server):
    client = Client(server)
    transcription = {"model": "any", "prompt": "Kennedy", "language": "en"}
    audio = {"input": {"transcription": transcription, "noise_reduction": {"type": "near_field"}}}
    session = {"type": "transcription", "audio": audio, "include": ["words", {}], "speed": 2}
    client.send("session.update", session=session)
    places = ["noise_reduction", "transcription.language", "transcription.prompt"]
    wanted = ["include", "speed", *(f"audio.input.{place}" for place in places)]
    assert sorted(client.receive()["unused_fields"]) == sorted(wanted)
    before = {"input_audio_transcription": {"model": "any", "prompt": "Kennedy"}}
    client.send("transcription_session.update", session=before)
    assert client.receive()["unused_fields"] == ["audio.input.transcription.prompt"]
    client.send("session.update", session={"audio": {"input": {"transcription": {"prompt": ""}}}})
    assert "unused_fields" not in client.receive()
    client.socket.close()


def test_other_rates_are_resampled(server, clip):
    client = Client(server)
    at_24k = soxr.resample(clip[:64000], 16000, 24000)
    for start in range(0, len(at_24k), 7001):
        client.append(at_24k[start : start + 7001])
    client.send("input_audio_buffer.commit")
    found = client.until(".completed")[-1]
    assert found["usage"]["seconds"] == pytest.approx(4.0, abs=0.01)
    assert found["transcript"]
    client.socket.close()


def test_what_does_not_fit_is_an_error_and_the_session_goes_on(server, clip):
    client = Client(server)
    for message, word in [
        ("rubbish", "JSON"),
        ("[]", "JSON"),
        ('{"type": "response.create"}', "response.create"),
        ('{"type": "input_audio_buffer.append", "audio": "%%"}', "base64"),
        ('{"type": "input_audio_buffer.append", "audio": 7}', "base64"),
        ('{"type": "input_audio_buffer.append", "audio": "AAAA"}', "16-bit"),
        ('{"type": "input_audio_buffer.commit"}', "empty"),
        ('{"type":"session.update","session":{"audio":{"input":{"format":{"rate":1}}}}}', "rate"),
        (
            '{"type":"session.update","session":{"audio":{"input":{"turn_detection":{"a":1}}}}}',
            "turn_detection",
        ),
        ('{"type":"session.update","session":7}', "session is 7"),
        ('{"type":"session.update","session":{"audio":"x"}}', "audio is 'x'"),
        ('{"type":"session.update","session":{"audio":{"input":{"format":"pcm16"}}}}', "format is"),
        ('{"type":"session.update","session":{"include":7}}', "include is 7"),
        # the protocol's first version
        (
            '{"type":"transcription_session.update","session":{"input_audio_format":"g711_ulaw"}}',
            "g711_ulaw",
        ),
        (
            '{"type":"transcription_session.update","session":{"turn_detection":{"type":"server_vad"}}}',
            "server_vad",
        ),
    ]:
        client.socket.send(message)
        answer = client.receive()
        assert answer["type"] == "error" and word in answer["error"]["message"], answer
    client.append(clip[:16000])
    form = {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16000}}}}
    client.send("session.update", session=form)  # amid an utterance
    assert "rate" in client.until("error")[-1]["error"]["message"]
    client.send("input_audio_buffer.clear")
    assert client.until("cleared")
    client.append(np.zeros(24000 * 31, np.float32))
    assert "30 s" in client.receive()["error"]["message"]
    client.socket.close()


def test_only_who_may_comes_in(server):
    url = server.url.replace("http", "ws") + "/v1/realtime"
    for path, status in (("health", 200), ("", 200), ("metrics", 401), ("v1/models", 401)):
        assert httpx.get(f"{server.url}/{path}").status_code == status, path
    key = {"additional_headers": {"Authorization": "Bearer secret"}}
    for options in ({}, {"additional_headers": {"Authorization": "Bearer no"}}):
        with pytest.raises(sync.InvalidStatus):
            sync.connect(url, **options).__enter__()
    with pytest.raises(sync.InvalidStatus):  # a page of another site
        sync.connect(url, origin="http://example.org", **key).__enter__()
    open_ones = [sync.connect(url, **key).__enter__() for _ in range(3)]
    with pytest.raises(sync.InvalidStatus):  # no more than --max-streams
        sync.connect(url, **key).__enter__()
    for one in open_ones:
        one.close()


def test_streams_at_once_hear_what_each_says(server, clip):
    clients = [Client(server) for _ in range(3)]
    parts = [clip[:48000], clip[48000:96000], clip[96000:144000]]
    for client in clients:
        client.update(16000)
    for start in range(0, 48000, 6000):
        for client, part in zip(clients, parts, strict=True):
            client.append(part[start : start + 6000])
    model, texts = load_model(BASE), []
    for client, part in zip(clients, parts, strict=True):
        client.send("input_audio_buffer.commit")
        texts.append(client.until(".completed")[-1]["transcript"])
        stream = model.stream()
        stream.feed(as_heard(part))
        assert texts[-1] == stream.finish().text
        client.socket.close()
    assert len(set(texts)) == 3
