"""A running server and what goes wrong at its clients: it stays up, and no place stays taken."""

import concurrent.futures
import contextlib
import functools
import io
import itertools
import json
import re
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time

import pytest
import soundfile
from test_serve import PATH, ROOT, Server, httpx

from fastconformer.audio import load_audio

CLIP = ROOT / "samples" / "jfk.flac"
HEAD = (
    b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\n"
    b"Content-Type: multipart/form-data; boundary=x\r\n"
)
FILE = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'


@pytest.fixture(scope="module")
def server():
    """One without much patience, so that the tests need none."""
    patience = "import fastconformer.serving.gate as g; g.HEAD_S = 1.0; g.SLOWEST_S = 2.0"
    started = Server("--max-queue", "8", "--batch-size", "4", before=patience)
    yield started
    assert started.process.poll() is None
    assert started.stop() == 0


@pytest.fixture(autouse=True)
def stays_whole(request):
    """After each test: nothing is held, and a plain request is answered."""
    yield
    if "server" not in request.fixturenames:
        return
    server = request.getfixturevalue("server")
    for _ in range(150):
        if gauge(server, "uploads") == gauge(server, "waiting_requests") == 0:
            break
        time.sleep(0.2)
    else:
        raise AssertionError("places stay taken")
    assert server.post(short()).status_code == 200


@functools.cache
def short() -> bytes:
    """A file of a second."""
    found = io.BytesIO()
    soundfile.write(found, load_audio(CLIP, 16000)[:16000], 16000, format="WAV")
    return found.getvalue()


def gauge(server, name: str) -> float:
    metrics = httpx.get(f"{server.url}/metrics", timeout=60).text
    return float(re.search(rf"^fastconformer_{name} (\S+)$", metrics, re.M)[1])


def opened(server) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    # closed by a reset, as where a client's machine is gone
    found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return found


def heard(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(1 << 16):
            found += data
    return found


def status(answer: bytes) -> int | None:
    match = re.match(rb"HTTP/1.1 (\d+)", answer)
    return int(match[1]) if match else None


def test_half_uploads(server):
    for cut in (len(HEAD) // 2, len(HEAD), None):
        for _ in range(10):
            with opened(server) as connection:
                whole = HEAD + b"Content-Length: 100000\r\n\r\n" + FILE + bytes(5000)
                connection.sendall(whole[:cut])


def test_slow_uploads_are_given_up(server):
    with opened(server) as connection, opened(server) as silent, opened(server) as half:
        half.sendall(HEAD[:40])
        began = time.monotonic()
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):  # a byte at a time, until the server has enough
            for byte in FILE * 4:
                connection.sendall(b"1\r\n%c\r\n" % byte)
                time.sleep(0.05)
        assert status(heard(connection)) == 408
        # one that sends nothing, or no end of its head, is not kept
        assert heard(silent) == heard(half) == b""
        assert time.monotonic() - began < 30


def test_a_slow_upload_that_goes_on_is_served(server):
    audio = CLIP.read_bytes()

    def slowly():
        yield FILE
        for start in range(0, len(audio), 1 << 15):
            time.sleep(0.5)
            yield audio[start : start + (1 << 15)]
        yield b"\r\n--x--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = httpx.post(server.url + PATH, content=slowly(), headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text


def test_connections_by_the_hundred(server):
    crowd(server, 200)


@pytest.mark.slow
def test_connections_by_the_thousand(server):
    crowd(server, 1000)


def crowd(server, n: int) -> None:
    """So many connections that each ask at once: all are answered, by a text or by 503."""
    audio = short()
    end = b"\r\n--x--\r\n"
    length = len(FILE) + len(audio) + len(end)
    head = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % length
    with contextlib.ExitStack() as stack:
        all_of_them = [stack.enter_context(opened(server)) for _ in range(n)]
        for connection in all_of_them:  # every one holds a request that is not at its end
            connection.sendall(head)
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200

        def finish(connection) -> int | None:
            with contextlib.suppress(ConnectionError):
                connection.sendall(FILE + audio + end)
            return status(heard(connection))

        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            seen = list(pool.map(finish, all_of_them))
    # None: told 503 and closed while it was still sending
    assert set(seen) <= {200, 408, 503, None} and 200 in seen, statistics.multimode(seen)
    assert 503 in seen or None in seen


CLIENT = """
import httpx, sys
with open(sys.argv[2], "rb") as file:
    audio = file.read()
print("sending", flush=True)
while True:
    httpx.post(sys.argv[1], files={"file": audio}, timeout=60)
"""


def test_killed_clients(server):
    command = [sys.executable, "-c", CLIENT, server.url + PATH, str(CLIP)]
    clients = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    for client in clients:
        client.stdout.readline()
    time.sleep(1.0)
    for client in clients:
        client.kill()
        client.wait()
        client.stdout.close()


TRICKS = [  # (what is sent, statuses; None: closed while it was sent)
    (b"\x00\xff\xfe rubbish\r\n\r\n", {400}),
    (b"GET / HTTP/1.1\r\n\r\n", {200, 400}),  # no Host
    (b"GET /" + b"a" * 2000000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", {400, 431, None}),
    (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2000000 + b"\r\n\r\n", {400, 431, None}),
    (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 400000 + b"\r\n", {400, 431, None}),
    (HEAD + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\n--x--\r\n", {400}),
    (HEAD + b"Content-Length: -5\r\n\r\n", {400}),
    (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", {400, 413}),
    (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", {400}),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n", {400}),
    (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", {400, 501}),
    (HEAD + b"Content-Length: 0\r\n\r\n", {400}),
    (HEAD.replace(b"; boundary=x", b"") + b"Content-Length: 5\r\n\r\n--x--", {400}),
    (
        HEAD.replace(b"multipart/form-data", b"text/json") + b"Content-Length: 2\r\n\r\n{}",
        {400},
    ),
    (b"GET /page/../../serve.py HTTP/1.1\r\nHost: x\r\n\r\n", {404}),
    (b"GET /page/%2e%2e%2fserve.py HTTP/1.1\r\nHost: x\r\n\r\n", {404}),
    (b"GET /page/..%5c..%00 HTTP/1.1\r\nHost: x\r\n\r\n", {404}),
    (b"GET //etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", {404}),
    (b"GET http://elsewhere/ HTTP/1.1\r\nHost: x\r\n\r\n", {400, 404}),
    (b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", {405}),
    (b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\n\r\n", {404}),
    (
        b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x\r\n\r\n",
        {400},
    ),
    (
        b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\nOrigin: http://elsewhere\r\n"
        b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        {403},
    ),
]


def test_tricks_with_headers(server):
    for request, expected in TRICKS:
        with opened(server) as connection:
            answer = b""
            with contextlib.suppress(ConnectionError):
                connection.sendall(request)
                answer = connection.recv(1 << 16)
        assert status(answer) in expected, (request[:300], answer[:300])
        assert b"Traceback" not in answer and str(ROOT).encode() not in answer


def test_websockets_that_break_off(server):
    sync = pytest.importorskip("websockets.sync.client", reason="websockets is not installed")
    address = server.url.replace("http", "ws") + "/v1/realtime?intent=transcription"
    for message in (b"\x00\x01", "[" * 100000, '{"type": "session.update", "session": 5}', None):
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(sync.connect(address))
            assert json.loads(client.recv(timeout=60))["type"] == "session.created"
            if message is None:  # gone in the middle of a frame
                client.socket.sendall(b"\x81\xfe\x7f")
                client.socket.shutdown(socket.SHUT_RDWR)
            else:
                client.send(message)
    for _ in range(100):
        if gauge(server, "live_streams") == 0:
            return
        time.sleep(0.2)
    raise AssertionError("streams stay open")


SOAK_S = 600


@pytest.mark.slow
def test_ten_minutes_at_a_full_line():
    """Memory stays within 5 % of what it was after the first three minutes."""
    server = Server("--max-queue", "8", "--batch-size", "4")
    audio, until = CLIP.read_bytes(), time.monotonic() + SOAK_S
    counts: dict[object, int] = {}
    lock, full, memory = threading.Lock(), [], []

    def ask(number: int) -> None:
        while time.monotonic() < until:
            kind = next(kinds)
            try:
                content = b"rubbish" * 1000 if kind % 7 == 0 else audio
                patience = 0.05 if kind % 11 == 0 else 120
                timeout = httpx.Timeout(120, read=patience)
                found = httpx.post(server.url + PATH, files={"file": content}, timeout=timeout)
                seen: object = found.status_code
                if seen == 503:
                    time.sleep(0.2)
            except httpx.TransportError as error:
                seen = type(error).__name__
            with lock:
                counts[seen] = counts.get(seen, 0) + 1

    kinds = itertools.count(1)
    try:
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            for number in range(24):
                pool.submit(ask, number)
            while time.monotonic() < until:
                time.sleep(5)
                full.append(gauge(server, "waiting_requests"))
                memory.append(resident_mb(server.process.pid))
        for _ in range(100):
            if gauge(server, "uploads") == 0:
                break
            time.sleep(0.2)
        assert gauge(server, "uploads") == gauge(server, "waiting_requests") == 0
        third = len(memory) // 3
        before, after = statistics.median(memory[third - 12 : third]), max(memory[-12:])
        print(json.dumps({"answers": {str(k): v for k, v in counts.items()}, "MB": memory}))
        print(f"waiting: median {statistics.median(full)}; {before:.0f} MB, then {after:.0f} MB")
        assert after < 1.05 * before
        assert counts[200] > 100 and counts[503] > 10 and 500 not in counts
        assert server.stop() == 0
    finally:
        server.process.kill()


def resident_mb(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024
