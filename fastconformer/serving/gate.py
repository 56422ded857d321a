"""What stands before the routes: keys, a place for each upload, and a watch over slow clients.

A request is counted as it arrives and is given up where it grows too large or too slow; an upload
that finds no place is told to come again before it is read.
"""

import asyncio
import json
import time

import h11
from starlette.responses import JSONResponse, Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from . import openai

OPEN_PATHS = ("/", "/health", "/page/")  # without a key
UPLOADS = "/v1/audio/"
KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
FORM_OVERHEAD = 1 << 16  # bytes of an upload's form beside its file
SLOWEST_BYTES, SLOWEST_S = 1 << 14, 20.0  # an upload that brings less in this time has stalled
HEAD_S = 10.0  # for a request's head, and for the rest of a body whose answer is out


class TooLarge(Exception):
    """A body longer than the limit."""


class Stalled(Exception):
    """A body that hardly comes."""


class Gate:
    """ASGI middleware in front of the routes; `service` is an `app.Service`."""

    def __init__(self, app, service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send):
        headers = dict(scope.get("headers", ()))
        if scope["type"] == "websocket":
            key = _bearer(headers) or _key_protocol(scope)
            if not self.service.admits(key) or _is_foreign(headers):
                return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, status = scope["path"], 500

        async def noted(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, path, headers, receive, noted)
        finally:
            self.service.requests[path if path.startswith(UPLOADS) else "other", status] += 1

    async def _pass(self, scope, path, headers, receive, send):
        service = self.service
        is_open = path in OPEN_PATHS or path.startswith(OPEN_PATHS[-1])
        if not is_open and not service.admits(_bearer(headers)):
            response = error_response(401, "missing or wrong API key", code="invalid_api_key")
            return await response(scope, receive, send)
        limit = service.limits.upload_bytes + FORM_OVERHEAD
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            return await too_large(service)(scope, receive, send)
        receive = Body(receive, limit).receive
        if not path.startswith(UPLOADS):
            return await self.app(scope | {"service": service}, receive, send)
        if service.uploads >= service.places:
            return await busy(service.batcher.seconds_to_wait())(scope, receive, send)
        service.uploads += 1
        try:
            await self.app(scope | {"service": service}, receive, send)
        finally:
            service.uploads -= 1


class Body:
    """A request's body, counted and timed as it comes. `receive` is ASGI's."""

    def __init__(self, receive, limit: int):
        self._receive, self.limit = receive, limit
        self.arrived = self.of_window = 0  # bytes, all and since `began`
        self.began, self.is_complete = time.monotonic(), False

    async def receive(self):
        """The next message. Raises TooLarge, Stalled."""
        if self.is_complete:
            return await self._receive()
        while True:
            left = self.began + SLOWEST_S - time.monotonic()
            try:
                message = await asyncio.wait_for(self._receive(), max(0.0, left))
                break
            except asyncio.TimeoutError:
                if self.of_window < SLOWEST_BYTES:
                    raise Stalled from None
                self.began, self.of_window = time.monotonic(), 0
        size = len(message.get("body", b""))
        self.arrived += size
        self.of_window += size
        self.is_complete = not message.get("more_body", False)
        if self.arrived > self.limit:
            raise TooLarge
        return message


class Protocol(H11Protocol):
    """uvicorn's HTTP over h11, which also closes what never sends a request, and what goes on
    sending after it was answered."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self._last = None  # (cycle,) if the client was waited for at the last look
        self._next_look = self.loop.call_later(HEAD_S, self._look)

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(openai.error_body(msg, KINDS[400])).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        answer = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def connection_lost(self, error):
        super().connection_lost(error)
        self._next_look.cancel()  # which would keep the connection's objects until then

    def _look(self):
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            return  # gone, or a websocket now
        answered = self.cycle is not None and self.cycle.response_complete
        if self.conn.their_state is h11.IDLE or answered:
            if self._last == (self.cycle,):
                self.transport.abort()
                return
            self._last = (self.cycle,)
        else:
            self._last = None
        self._next_look = self.loop.call_later(HEAD_S, self._look)


def error_response(status: int, message: str, param=None, code=None, headers=None) -> Response:
    """An error in OpenAI's form."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = openai.error_body(message, kind, param, code)
    return JSONResponse(body, status, headers=headers)


def too_large(service) -> Response:
    limit = service.limits.upload_bytes / 2**20
    headers = {"connection": "close"}
    return error_response(413, f"the upload is larger than {limit:g} MiB", headers=headers)


def busy(retry_after_s: int) -> Response:
    headers = {"retry-after": str(retry_after_s)}
    return error_response(503, "the server is busy, try again later", headers=headers)


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
