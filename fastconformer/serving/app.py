"""The HTTP application: routes, limits, keys, and one form for every error.

An upload is counted while it arrives, decoded on threads of its own, and waits in the `Batcher`'s
line; a client that goes away takes its request with it. A streamed answer is told as windows of
the recording are done.
"""

import asyncio
import concurrent.futures
import contextlib
import hmac
import io
import json
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
from ..recordings import longform
from . import openai
from .batcher import Batcher, Full
from .gate import Gate, Stalled, TooLarge, busy, error_response, too_large
from .live import serve_session
from .openai import BadRequest

PAGE = ("index.html", "page.js", "page.css", "worklet.js")
DECODERS = 2  # threads that turn uploads into samples
WATCH_S = 0.25  # how often a waiting request looks whether its client is still there


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
        self.uploads = 0  # from their first byte to their answer
        self.places = batcher.max_queue + batcher.batch_size  # for them
        self.decoders = concurrent.futures.ThreadPoolExecutor(DECODERS, "decode")

    def admits(self, key: str | None) -> bool:
        """Whether a key is one of ours; every one is compared, in constant time."""
        given = (key or "").encode()
        found = [hmac.compare_digest(given, own) for own in self.keys]
        return not self.keys or any(found)

    async def samples(self, upload: UploadFile):
        """An upload as samples (L,) of the model's rate. BadRequest: no audio, or too much."""
        name = upload.filename or "the file"
        rate, longest_s = self.batcher.model.sample_rate, self.limits.duration_s

        def decode():  # what waits for its turn here lies on the disk, not in memory
            content = io.BytesIO(upload.file.read())
            return load_audio(content, rate, 0.0, longest_s + 1.0)

        try:
            samples = await asyncio.get_running_loop().run_in_executor(self.decoders, decode)
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise BadRequest(f"{name!r} cannot be read as audio: {reason}", "file") from None
        if len(samples) > longest_s * rate:
            raise BadRequest(f"the audio is longer than {longest_s:g} s", "file", 413)
        return samples

    async def transcript(self, request: Request, upload: UploadFile, options: dict, tell=None):
        """What the model finds; gives up the place in the line where the client goes away. `tell`
        hears the text of a long recording, as far as it stays, while it is made."""
        samples, loop, gone = await self.samples(upload), asyncio.get_running_loop(), False

        def heard(text: str) -> None:  # on the model's thread
            if gone:
                raise ClientDisconnect
            loop.call_soon_threadsafe(tell, text)

        head = self.batcher.model.head(options["head"])
        plain = not options.keys() - {"head", "timestamps", *head.slots}
        is_long = len(samples) > longform.WINDOW_S * self.batcher.model.sample_rate
        in_windows = tell and is_long and plain and head.first_hypothesis() is not None
        future = self.batcher.submit(samples, options, heard if in_windows else None)
        waiting = asyncio.wrap_future(future)
        del samples  # an error that comes out of here would hold them
        try:
            while not waiting.done():
                await asyncio.wait([waiting], timeout=WATCH_S)
                if not waiting.done() and await request.is_disconnected():
                    raise ClientDisconnect
            return waiting.result()
        except ValueError as error:  # an option that does not fit, or a clip that is empty
            raise BadRequest(" ".join(str(error).split())) from None
        finally:
            gone = True
            waiting.cancel()


def make_app(service: Service, beside: contextlib.AbstractAsyncContextManager) -> Starlette:
    """The application; it closes the service's batcher, everything accepted done, when it stops.
    `beside` is entered as long as it runs."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        async with beside:
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
        | dict.fromkeys((Full, TooLarge, Stalled, asyncio.TimeoutError), _error)
        | dict.fromkeys((MultiPartException, ClientDisconnect), _error),
        lifespan=lifespan,
    )


async def _serve(service: Service, request: Request, translate: bool) -> Response:
    told: asyncio.Queue = asyncio.Queue()  # (what was wanted, text that stays), None at the end
    work = asyncio.ensure_future(
        asyncio.wait_for(
            _transcribe(service, request, translate, told.put_nowait), service.limits.timeout_s
        )
    )
    work.add_done_callback(lambda _: told.put_nowait(None))
    try:
        first = await told.get()
    except asyncio.CancelledError:
        work.cancel()
        raise
    transcript, wanted = work.result() if first is None else (None, first[0])
    headers = {"x-unused-fields": ", ".join(wanted.unused)} if wanted.unused else {}
    if wanted.stream:
        events = _events(request, work, first, told)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    media_type = openai.MEDIA_TYPES.get(wanted.response_format, "application/json")
    content = openai.answer(transcript, wanted, "translate" if translate else "transcribe")
    return Response(content, media_type=media_type, headers=headers)


async def _transcribe(service: Service, request: Request, translate: bool, tell):
    """Reads a request's form -> what the model finds in its file, and what was wanted. `tell` hears
    a streamed answer's text while it is made."""
    async with request.form(max_files=1, max_fields=64) as form:
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise BadRequest("file is missing: send the audio as a multipart file", "file")
        if upload.size is not None and upload.size > service.limits.upload_bytes:
            raise TooLarge
        wanted = openai.read_request(form, service.batcher.model, service.head, translate)
        hear = (lambda text: tell((wanted, text))) if wanted.stream else None
        return await service.transcript(request, upload, wanted.options, hear), wanted


async def _events(request: Request, work: asyncio.Future, first, told: asyncio.Queue):
    """Server-sent events of a text that may still be made: `first`, what `told` brings after it,
    and the whole text."""
    item, sent = first, ""
    try:
        while item is not None:
            _, text = item
            if len(text) > len(sent):
                yield openai.event({"type": "transcript.text.delta", "delta": text[len(sent) :]})
                sent = text
            item = await told.get()
        text = work.result()[0].text
        if text[len(sent) :]:
            yield openai.event({"type": "transcript.text.delta", "delta": text[len(sent) :]})
        yield openai.event({"type": "transcript.text.done", "text": text})
    except Exception as error:  # the answer's status is out: it becomes an event
        answer = _error(request, error)
        if answer.body:
            yield openai.event({"type": "error"} | json.loads(answer.body))
        if answer.status_code == 500:
            raise
    finally:
        work.cancel()


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
    counts = [
        (f'path="{path}",status="{status}"', count)
        for (path, status), count in sorted(service.requests.items())
    ]
    audio, busy_s = batcher.audio_s.items(), batcher.busy_s.items()
    rows = [
        ("requests_total", "counter", "Requests by path and status.", counts),
        ("live_streams", "gauge", "Websockets that transcribe.", [("", service.streams)]),
        ("uploads", "gauge", "Requests from first byte to answer.", [("", service.uploads)]),
        ("waiting_requests", "gauge", "Requests in the line.", [("", batcher.waiting)]),
        ("batches_total", "counter", "Passes over files.", [("", batcher.batches)]),
        ("audio_seconds_total", "counter", "Audio heard.", [(f'of="{k}"', s) for k, s in audio]),
        ("busy_seconds_total", "counter", "Work on it.", [(f'of="{k}"', s) for k, s in busy_s]),
    ]
    lines = []
    for name, kind, text, values in rows:
        name = f"fastconformer_{name}"
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [
            f"{name}{{{labels}}} {x:g}" if labels else f"{name} {x:g}" for labels, x in values
        ]
    return "\n".join(lines) + "\n"


def _error(request: Request, error: Exception) -> Response:
    service: Service = request.scope["service"]
    if isinstance(error, Full):
        return busy(error.retry_after_s)
    if isinstance(error, BadRequest):
        return error_response(error.status, str(error), error.param)
    if isinstance(error, TooLarge):
        return too_large(service)
    if isinstance(error, Stalled):
        headers = {"connection": "close"}
        return error_response(408, "the upload came too slowly, or stopped", headers=headers)
    if isinstance(error, MultiPartException):
        return error_response(400, f"the form cannot be read: {error.message}")
    if isinstance(error, asyncio.TimeoutError):
        return error_response(504, f"no answer within {service.limits.timeout_s:g} s")
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        return error_response(error.status_code, str(error.detail), headers=error.headers)
    return error_response(500, f"{type(error).__name__} while serving this request")
