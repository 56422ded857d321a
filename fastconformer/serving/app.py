"""The HTTP application: routes, limits, keys, and one form for every error.

An upload is counted while it arrives, decoded on threads of its own, and waits in the `Batcher`'s
line; a client that goes away takes its request with it.
"""

import asyncio
import concurrent.futures
import contextlib
import hmac
import io
import time
from collections import Counter
from dataclasses import dataclass
from importlib import resources

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from ..audio import load_audio
from . import openai
from .batcher import Batcher, Full
from .live import serve_session
from .openai import BadRequest

OPEN_PATHS = ("/", "/health", "/page/")  # without a key
KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
PAGE = ("index.html", "page.js", "page.css", "worklet.js")
DECODERS = 2  # threads that turn uploads into samples
WATCH_S = 0.25  # how often a waiting request looks whether its client is still there
FORM_OVERHEAD = 1 << 16  # bytes of an upload's form beside its file


@dataclass(frozen=True)
class Limits:
    """What a client may ask of the server.

    upload_bytes: of one request's file. duration_s: of its audio. timeout_s: from its first byte to
    its answer, and of silence on a websocket. streams: live ones at a time.
    """

    upload_bytes: int = 25 << 20
    duration_s: float = 4 * 3600.0
    timeout_s: float = 600.0
    streams: int = 32


class Service:
    """The model with its line, limits, keys and counts: what the routes work on."""

    def __init__(self, batcher: Batcher, name: str, head: str | None, keys=(), limits=Limits()):
        self.batcher, self.name, self.head, self.limits = batcher, name, head, limits
        self.keys = tuple(key.encode() for key in keys)
        self.requests: Counter[tuple[str, int]] = Counter()
        self.started = time.time()
        self.streams = 0  # live now
        self.decoders = concurrent.futures.ThreadPoolExecutor(DECODERS, "decode")

    def admits(self, key: str | None) -> bool:
        """Whether a key is one of ours; every one is compared, in constant time."""
        given = (key or "").encode()
        found = [hmac.compare_digest(given, own) for own in self.keys]
        return not self.keys or any(found)

    async def samples(self, upload: UploadFile):
        """An upload as samples (L,) of the model's rate. BadRequest: no audio, or too much."""
        content, name = await upload.read(), upload.filename or "the file"
        rate, longest_s = self.batcher.model.sample_rate, self.limits.duration_s

        def decode():
            return load_audio(io.BytesIO(content), rate, 0.0, longest_s + 1.0)

        try:
            samples = await asyncio.get_running_loop().run_in_executor(self.decoders, decode)
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise BadRequest(f"{name!r} cannot be read as audio: {reason}", "file") from None
        if len(samples) > longest_s * rate:
            raise BadRequest(f"the audio is longer than {longest_s:g} s", "file", 413)
        return samples

    async def transcript(self, request: Request, upload: UploadFile, options: dict):
        """What the model finds; gives up the place in the line where the client goes away."""
        samples = await self.samples(upload)
        future = self.batcher.submit(samples, options)
        waiting = asyncio.wrap_future(future)
        try:
            while not waiting.done():
                await asyncio.wait([waiting], timeout=WATCH_S)
                if not waiting.done() and await request.is_disconnected():
                    raise ClientDisconnect
            return waiting.result()
        except ValueError as error:  # an option that does not fit, or a clip that is empty
            raise BadRequest(" ".join(str(error).split())) from None
        finally:
            waiting.cancel()


def make_app(service: Service) -> Starlette:
    """The application; it closes the service's batcher, everything accepted done, when it stops."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        await asyncio.to_thread(service.batcher.close)
        service.decoders.shutdown()

    async def transcriptions(request: Request) -> Response:
        return await _serve(service, request, translate=False)

    async def translations(request: Request) -> Response:
        return await _serve(service, request, translate=True)

    async def realtime(socket: WebSocket) -> None:
        if service.streams >= service.limits.streams:
            await socket.close(1013, "too many streams")
            return
        service.streams += 1
        try:
            limits = service.limits
            longest = limits.duration_s, limits.timeout_s
            await serve_session(socket, service.batcher, service.head, *longest)
        finally:
            service.streams -= 1

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model_card(service)]})

    async def one_model(request: Request) -> Response:
        if request.path_params["name"] != service.name:
            raise HTTPException(404, f"this server has {service.name}")
        return JSONResponse(_model_card(service))

    async def health(request: Request) -> Response:
        return JSONResponse(
            {
                "status": "ok",
                "model": service.name,
                "waiting": service.batcher.waiting,
                "limits": {
                    "upload_mb": service.limits.upload_bytes / 2**20,
                    "duration_s": service.limits.duration_s,
                    "queue": service.batcher.max_queue,
                },
            }
        )

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(_metrics(service), media_type="text/plain; version=0.0.4")

    return Starlette(
        routes=[
            Route("/", _page_file),
            Route("/page/{name}", _page_file),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/audio/transcriptions", transcriptions, methods=["POST"]),
            WebSocketRoute("/v1/realtime", realtime),
            Route("/v1/audio/translations", translations, methods=["POST"]),
        ],
        middleware=[Middleware(Gate, service=service)],
        exception_handlers={Exception: _error, HTTPException: _error, BadRequest: _error}
        | dict.fromkeys(
            (Full, TooLarge, MultiPartException, TimeoutError, ClientDisconnect), _error
        ),
        lifespan=lifespan,
    )


class TooLarge(Exception):
    """A body longer than the limit."""


class Gate:
    """Before the routes: keys, and a count of every body's bytes as they arrive."""

    def __init__(self, app, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send):
        service, status = self.service, 500
        headers = dict(scope.get("headers", ()))
        if scope["type"] == "websocket":
            if not service.admits(_bearer(headers) or _key_protocol(scope)) or _is_foreign(headers):
                return await send({"type": "websocket.close", "code": 1008})
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limit = service.limits.upload_bytes + FORM_OVERHEAD
        arrived = 0

        async def counted():
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > limit:
                raise TooLarge
            return message

        async def noted(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        path = scope["path"]
        length = headers.get(b"content-length", b"0")
        try:
            is_open = path in OPEN_PATHS or path.startswith(OPEN_PATHS[-1])
            if not is_open and not service.admits(_bearer(headers)):
                response = _error_response(401, "missing or wrong API key", code="invalid_api_key")
                await response(scope, receive, noted)
            elif not length.isdigit() or int(length) > limit:
                await _error_response(413, _too_large(service))(scope, receive, noted)
            else:
                await self.app(scope | {"service": service}, counted, noted)
        finally:
            service.requests[path if path.startswith("/v1/audio/") else "other", status] += 1


def _bearer(headers: dict[bytes, bytes]) -> str | None:
    kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    return key.strip() if kind.lower() == "bearer" else None


def _key_protocol(scope) -> str | None:
    # a browser cannot set headers on a websocket; OpenAI's clients name the key as a subprotocol
    prefix = "openai-insecure-api-key."
    names = scope.get("subprotocols") or ()
    return next((name[len(prefix) :] for name in names if name.startswith(prefix)), None)


def _is_foreign(headers: dict[bytes, bytes]) -> bool:
    """Whether a page of another host opens the websocket: browsers let it, and say so."""
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2] != headers.get(b"host")


async def _serve(service: Service, request: Request, translate: bool) -> Response:
    task = "translate" if translate else "transcribe"
    async with asyncio.timeout(service.limits.timeout_s):
        async with request.form(max_files=1, max_fields=64) as form:
            upload = form.get("file")
            if not isinstance(upload, UploadFile):
                raise BadRequest("file is missing: send the audio as a multipart file", "file")
            if upload.size is not None and upload.size > service.limits.upload_bytes:
                raise TooLarge
            wanted = openai.read_request(form, service.batcher.model, service.head, translate)
            if wanted.stream:
                wanted.options["timestamps"] = True
            transcript = await service.transcript(request, upload, wanted.options)
    headers = {"x-unused-fields": ", ".join(wanted.unused)} if wanted.unused else {}
    if wanted.stream:
        return StreamingResponse(
            _events(transcript), media_type="text/event-stream", headers=headers
        )
    media_type = openai.MEDIA_TYPES.get(wanted.response_format, "application/json")
    return Response(openai.answer(transcript, wanted, task), media_type=media_type, headers=headers)


async def _events(transcript):
    position = 0
    for segment in transcript.segments:
        end = transcript.text.find(segment.text, position)
        end = position + len(segment.text) if end < 0 else end + len(segment.text)
        delta, position = transcript.text[position:end], end
        if delta:
            yield openai.event({"type": "transcript.text.delta", "delta": delta})
    if transcript.text[position:]:
        yield openai.event({"type": "transcript.text.delta", "delta": transcript.text[position:]})
    yield openai.event({"type": "transcript.text.done", "text": transcript.text})


def _model_card(service: Service) -> dict:
    created = int(service.started)
    return {"id": service.name, "object": "model", "created": created, "owned_by": "local"}


def _page_file(request: Request) -> Response:
    name = request.path_params.get("name", "index.html")
    kinds = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
    if name not in PAGE:
        raise HTTPException(404, "there is no such page")
    content = resources.files(__package__).joinpath("page", name).read_bytes()
    policy = "default-src 'self'; img-src 'self' data:; media-src 'self' blob:"
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
    return Response(content, media_type=kinds[name.rpartition(".")[2]], headers=headers)


def _metrics(service: Service) -> str:
    """Prometheus' text format."""
    batcher = service.batcher
    rows = [
        ("requests_total", "counter", "Requests by path and status.", None),
        ("live_streams", "gauge", "Websockets that transcribe.", service.streams),
        ("waiting_requests", "gauge", "Requests in the line.", batcher.waiting),
        ("batches_total", "counter", "Passes of the model.", batcher.batches),
        ("audio_seconds_total", "counter", "Audio transcribed.", batcher.audio_s),
        ("busy_seconds_total", "counter", "Time the model worked.", batcher.busy_s),
    ]
    lines = []
    for name, kind, text, value in rows:
        name = f"fastconformer_{name}"
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        if value is None:
            lines += [
                f'{name}{{path="{path}",status="{status}"}} {count}'
                for (path, status), count in sorted(service.requests.items())
            ]
        else:
            lines.append(f"{name} {value:g}")
    return "\n".join(lines) + "\n"


def _too_large(service: Service) -> str:
    return f"the upload is larger than {service.limits.upload_bytes / 2**20:g} MiB"


def _error_response(status: int, message: str, param=None, code=None, headers=None) -> Response:
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = openai.error_body(message, kind, param, code)
    return JSONResponse(body, status, headers=headers)


def _error(request: Request, error: Exception) -> Response:
    service: Service = request.scope["service"]
    if isinstance(error, Full):
        headers = {"retry-after": str(error.retry_after_s)}
        return _error_response(503, "the server is busy, try again later", headers=headers)
    if isinstance(error, BadRequest):
        return _error_response(error.status, str(error), error.param)
    if isinstance(error, TooLarge):
        return _error_response(413, _too_large(service), headers={"connection": "close"})
    if isinstance(error, MultiPartException):
        return _error_response(400, f"the form cannot be read: {error.message}")
    if isinstance(error, TimeoutError):
        return _error_response(504, f"no answer within {service.limits.timeout_s:g} s")
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        return _error_response(error.status_code, str(error.detail), headers=error.headers)
    return _error_response(500, f"{type(error).__name__} while serving this request")
