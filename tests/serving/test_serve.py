"""A running server, asked over HTTP: answers, errors, limits, keys, batches, draining."""

import concurrent.futures
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fastconformer import load_model
from fastconformer.audio import load_audio
from fastconformer.formats.subtitles import to_srt, to_vtt
from fastconformer.recordings.transcript import Transcript
from fastconformer.serve import main
from fastconformer.serving.batcher import Batcher

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("starlette", reason="the extra serve is not installed")

ROOT = Path(__file__).parents[2]
BASE = ROOT / "models" / "base_tiny.nemo"
PATH = "/v1/audio/transcriptions"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """`python -m fastconformer.serve` in a process of its own; `before` is run there first."""

    def __init__(self, *options: str, before: str = "", **environment: str):
        port = self.port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        code = f"import sys; {before}; from fastconformer.serve import main; sys.exit(main())"
        start = ["-c", code] if before else ["-m", "fastconformer.serve"]
        command = [sys.executable, *start, "--model", str(BASE)]
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *options],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(600):
            try:
                httpx.get(f"{self.url}/health")
                return
            except httpx.TransportError:
                assert self.process.poll() is None, self.process.stderr.read()
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def post(self, audio: bytes, headers=None, path=PATH, name="clip.wav", **fields):
        return httpx.post(
            self.url + path,
            files={"file": (name, audio)},
            data=fields,
            headers=headers,
            timeout=120,
        )

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def server():
    started = Server("--max-upload-mb", "3", "--name", "tiny")
    yield started
    started.stop()


@pytest.fixture(scope="module")
def clips():
    """(bytes of a file, its samples) of three recordings of different length."""
    rows = (ROOT / "samples" / "english.jsonl").read_text().splitlines()[:3]
    paths = [ROOT / "samples" / json.loads(row)["audio_filepath"] for row in rows]
    return [(path.read_bytes(), load_audio(path, 16000)) for path in paths]


@pytest.fixture(scope="module")
def transcripts(clips):
    return load_model(BASE).transcribe([samples for _, samples in clips], timestamps=True)


def test_every_format_equals_transcribe(server, clips, transcripts):
    (audio, _), transcript = clips[0], transcripts[0]
    assert server.post(audio, model="whisper-1").json()["text"] == transcript.text
    assert server.post(audio, response_format="text").text == transcript.text + "\n"
    assert server.post(audio, response_format="srt").text == to_srt(transcript)
    assert server.post(audio, response_format="vtt").text == to_vtt(transcript)
    found = server.post(
        audio,
        response_format="verbose_json",
        **{"timestamp_granularities[]": ["word", "segment"]},
    ).json()
    assert found["text"] == transcript.text
    assert found["duration"] == pytest.approx(transcript.duration, abs=1e-3)
    words = [(w["word"], w["start"], w["end"]) for w in found["words"]]
    assert words == [(w.text, round(w.start, 3), round(w.end, 3)) for w in transcript.words]
    assert [s["text"] for s in found["segments"]] == [s.text for s in transcript.segments]


def test_a_stream_of_events_ends_with_the_text(server, clips, transcripts):
    answer = server.post(clips[1][0], stream="true")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line]
    assert events[-1] == {"type": "transcript.text.done", "text": transcripts[1].text}
    deltas = [e["delta"] for e in events if e["type"] == "transcript.text.delta"]
    assert "".join(deltas) == transcripts[1].text and deltas


SLOW_WINDOWS = (  # of 3 s, half a second each
    "import time, fastconformer.recordings.longform as l; l.WINDOW_S, l.CONTEXT_S = 3.0, 0.5; "
    "f = l.encoded_windows; slow = lambda x: time.sleep(0.5) or x; "
    "l.encoded_windows = lambda *a, **k: map(slow, f(*a, **k))"
)


def test_events_come_as_windows_are_done():
    clip = load_audio(ROOT / "samples" / "jfk.flac", 16000)
    server = Server(before=SLOW_WINDOWS)
    try:
        events, times = [], []

        def ask(client, **options):
            sent = {"files": {"file": flac(clip)}, "data": {"stream": "true"}}
            return client.stream("POST", server.url + PATH, **sent, **options)

        with httpx.Client(timeout=60) as client, ask(client) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in filter(None, answer.iter_lines()):
                events.append(json.loads(line.removeprefix("data: ")))
                times.append(time.monotonic())
        assert times[-1] - times[0] > 0.9 and len(events) > 3
        assert [e["type"] for e in events[:-1]] == ["transcript.text.delta"] * (len(events) - 1)
        (wanted,) = load_model(BASE).transcribe([clip], long="chunks", window_s=3.0, retry=False)
        assert "".join(e["delta"] for e in events[:-1]) == events[-1]["text"] == wanted.text
        # a client that goes away between two windows frees its place
        with httpx.Client(timeout=60) as client, ask(client) as answer:
            next(answer.iter_lines())
        began = time.monotonic()
        assert server.post(flac(clip[:16000])).status_code == 200
        assert time.monotonic() - began < 60
        for _ in range(50):
            if "fastconformer_uploads 0" in httpx.get(f"{server.url}/metrics").text:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("its place stays taken")
        assert server.stop() == 0
    finally:
        server.process.kill()


def test_many_at_once_get_the_texts_of_one(server, clips, transcripts):
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda i: server.post(clips[i % 3][0]), range(32)))
    assert [a.json()["text"] for a in answers] == [transcripts[i % 3].text for i in range(32)]
    metrics = httpx.get(f"{server.url}/metrics").text
    passes = float(re.search(r"^fastconformer_batches_total (\S+)$", metrics, re.M)[1])
    served = sum(map(int, re.findall(r'requests_total\{path="/v1[^}]*"200"\} (\d+)', metrics)))
    assert passes < served  # some went together


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"response_format": "mp3"}, "response_format"),
        ({"timestamp_granularities[]": "page"}, "granularities"),
        ({"stream": "perhaps"}, "stream"),
        ({"stream": "true", "response_format": "srt"}, "stream"),
        ({"colour": "red"}, "colour"),
        ({"languages[]": "klingon"}, "klingon"),
    ],
)
def test_a_field_that_does_not_fit_is_named(server, clips, fields, word):
    answer = server.post(clips[0][0], **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert word in error["message"] and error["param"] in [name.rstrip("[]") for name in fields]


def test_bad_audio_is_the_clients_fault(server):
    for content in (b"", b"no audio at all" * 100, b"RIFF" + bytes(2000)):
        answer = server.post(content, name="../../etc/passwd\x1b[2J")
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"
    missing = httpx.post(server.url + PATH, data={"model": "x"})
    assert missing.status_code == 400 and "file" in missing.json()["error"]["message"]
    garbage = httpx.post(
        server.url + PATH,
        content=b"--x\r\nrubbish",
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    assert garbage.status_code == 400, garbage.text


def test_an_upload_is_cut_off_at_its_limit(server):
    answer = server.post(bytes(4 << 20))
    assert answer.status_code == 413 and "3 MiB" in answer.json()["error"]["message"]

    def endless():  # no length is announced: what arrives is counted
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(64):
            yield bytes(1 << 16)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = httpx.post(server.url + PATH, content=endless(), headers=headers)
    assert answer.status_code == 413


def test_what_is_not_there(server, clips):
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{server.url}/page/../serve.py").status_code == 404
    assert httpx.get(f"{server.url}/page/..%2f..%2fserve.py").status_code == 404
    translated = server.post(clips[0][0], path="/v1/audio/translations")
    assert translated.status_code == 404 and "translate" in translated.json()["error"]["message"]
    listed = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["tiny"]


def test_what_changes_nothing_is_said(server, clips):
    fields = {"temperature": "0.2", "language": "en", "timestamp_granularities[]": "word"}
    fields |= {"keywords[]": "漢字", "prompt": "three\nДом", "include[]": "logprobs"}
    answer = server.post(clips[0][0], **fields)
    unused = {"temperature", "language", "timestamp_granularities", "keywords", "include"}
    assert set(answer.headers["x-unused-fields"].split(", ")) == unused


def test_what_is_no_http_is_told_in_the_same_form(server):
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n")
        head, _, body = b"".join(iter(lambda: raw.recv(4096), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"application/json" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_place_where_nobody_can_listen_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, status, word in (
            (["--port", str(port)], 1, f"cannot listen at 127.0.0.1:{port}: Address already"),
            (["--wyoming-port", str(port), "--port", "0"], 1, "cannot listen"),
            (["--host", "no.such.host.invalid"], 1, "cannot listen at no.such.host.invalid:8000"),
            (["--port", "99999"], 2, "the port is 99999, expected 0 to 65535"),
        ):
            assert main(["--model", "gone.nemo", *options]) == status
            err = capsys.readouterr().err
            assert word in err and err.count("\n") == 1, err


def test_a_client_that_goes_away_frees_its_place(server, clips):
    long = np.tile(clips[2][1], 40)
    sent = {"file": ("a.flac", flac(long))}
    for _ in range(4):
        with pytest.raises(httpx.TimeoutException):
            httpx.post(server.url + PATH, files=sent, timeout=httpx.Timeout(60, read=0.05))
    for _ in range(100):
        if httpx.get(f"{server.url}/health").json()["waiting"] == 0:
            break
        time.sleep(0.2)
    else:
        raise AssertionError("places stay taken")
    assert server.post(clips[0][0]).status_code == 200


def flac(samples: np.ndarray) -> bytes:
    import io

    out = io.BytesIO()
    soundfile.write(out, samples, 16000, format="FLAC")
    return out.getvalue()


def test_a_text_that_is_told_goes_alone(clips, transcripts):
    batcher, told = Batcher(load_model(BASE)), []
    options = {"head": None, "timestamps": False}
    with batcher._change:  # they wait together
        told_one = batcher.submit(clips[0][1], options, told.append)
        others = [batcher.submit(samples, options) for _, samples in clips]
    assert told_one.result(60).text == transcripts[0].text and told
    assert [other.result(60).text for other in others] == [t.text for t in transcripts]
    batcher.close()


class Silent:
    """A model that hears nothing."""

    sample_rate = 16000

    def transcribe(self, clips, batch_size, wrong=False):
        if wrong:
            raise ValueError("wrong")
        return [Transcript("", [], [], None, None, None, 0.0, "ctc", 1.0) for _ in clips]


def test_samples_are_free_when_a_request_is_done():
    """At once, and not when Python next looks for cycles: under load that is after many requests,
    each of which held its clip until then."""
    batcher = Batcher(Silent())
    gc.disable()
    try:
        clips = [np.zeros(16000, np.float32) for _ in range(4)]
        held = [weakref.ref(clip) for clip in clips]
        failed = batcher.submit(clips.pop(), {"wrong": True})
        futures = [batcher.submit(clips.pop(), {}) for _ in range(3)]
        assert [future.result().text for future in futures] == [""] * 3
        assert str(failed.exception()) == "wrong"
        del futures, failed
        for _ in range(100):
            if not any(ref() is not None for ref in held):
                return
            time.sleep(0.01)
        raise AssertionError("samples are held by what is done")
    finally:
        gc.enable()
        batcher.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_files_yield_to_streams_in_a_process_that_yields_itself():
    made, wanted = [], []

    def start():
        own = threading.get_native_id()
        nice = min(14, os.getpriority(os.PRIO_PROCESS, own) + 7)
        os.setpriority(os.PRIO_PROCESS, own, nice)
        wanted.append(nice + 5)
        made.append(Batcher(Silent()))

    thread = threading.Thread(target=start)  # those that it starts inherit its priority
    thread.start()
    thread.join()
    made[0].submit(np.zeros(16000, np.float32), {}).result(timeout=60)
    (files,) = (t for t in threading.enumerate() if t.name == "files")
    assert os.getpriority(os.PRIO_PROCESS, files.native_id) == wanted[0]
    made[0].close()


def test_keys_limits_and_draining(clips, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# of the office\nfrom-file\n")
    server = Server(
        *("--api-key", "secret", "--api-key-file", str(keys), "--max-duration-s", "2"),
        *("--max-queue", "1", "--batch-size", "1"),
        FASTCONFORMER_API_KEY="from-environment",
    )
    try:
        short = flac(clips[0][1][:16000])
        for headers, status in [
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Bearer ключ".encode()}, 401),
            ({"Authorization": "Bearer secret"}, 200),
            ({"Authorization": "Bearer from-file"}, 200),
            ({"Authorization": "Bearer from-environment"}, 200),
        ]:
            assert server.post(short, headers=headers).status_code == status
        assert httpx.get(f"{server.url}/health").status_code == 200
        own = {"Authorization": "Bearer secret"}
        answer = server.post(flac(clips[0][1][: 16000 * 3]), headers=own)
        assert answer.status_code == 413 and "2 s" in answer.json()["error"]["message"]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            crowd = [pool.submit(server.post, short, own) for _ in range(16)]
            answers = [one.result() for one in crowd]
        busy = [a for a in answers if a.status_code == 503]
        assert busy and all(int(a.headers["retry-after"]) >= 1 for a in busy)
        assert any(a.status_code == 200 for a in answers)

        def interrupted():  # the server is told to stop in the middle of an upload
            yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
            yield short[:1000]
            time.sleep(1.0)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(1.0)
            yield short[1000:] + b"\r\n--x--\r\n"

        headers = own | {"content-type": "multipart/form-data; boundary=x"}
        last = httpx.post(server.url + PATH, content=interrupted(), headers=headers, timeout=60)
        assert last.status_code == 200, last.text
        assert server.process.wait(timeout=60) == 0
    finally:
        server.process.kill()
