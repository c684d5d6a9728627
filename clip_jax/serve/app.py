"""The paths that are served: bodies read within their limits, answers and refusals as JSON."""

import asyncio
import hmac
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from clip_jax.clock import CLOCK
from clip_jax.errors import InputError
from clip_jax.serve.batcher import Full
from clip_jax.serve.service import Answer, Service

HEADER_SECONDS = 10.0  # for the headers of a request to arrive
MAX_BODY = 16 << 20  # bytes of the body of one request; a longer one is answered with 413
MAX_WAITING = 256 << 20  # bytes of all requests in progress; beyond it the answer is 429
BODY_SECONDS = 60.0  # for a body to arrive; after that the answer is 408
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}  # by status
_DROPPED = 4  # times the longest body are read of one that is refused


def build(service: Service, token: str | None = None) -> Starlette:
    """Return the application, which Uvicorn calls."""
    paths = _Paths(service, token)
    errors: Any = dict.fromkeys((404, 405, 500), paths.failed)
    return Starlette(
        routes=[
            *(Route(path, paths.answer, methods=["POST"]) for path in paths.work),
            Route("/health", paths.health),
            Route("/metrics", paths.numbers),
        ],
        exception_handlers=errors,
        lifespan=paths.lifespan,
    )


class Protocol(AutoHTTPProtocol):
    """Uvicorn's protocol, which also closes connections whose headers arrive too slowly."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to wait for headers."""
        super().connection_made(transport)
        self._late = self.loop.call_later(HEADER_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of the headers, unless a request is being answered."""
        super().data_received(data)
        is_busy = self.cycle and not self.cycle.response_complete
        if self._late and is_busy:
            self._late.cancel()
            self._late = None
        elif not self._late and not is_busy:
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.close)


class _Paths:
    """What answers each path."""

    def __init__(self, service: Service, token: str | None) -> None:
        self._service, self._token = service, token
        self.work = {"/embed": service.embed, "/label": service.label, "/search": service.search}

    async def answer(self, request: Request) -> Response:
        """Answer one of the paths that compute."""
        started, path, service = CLOCK.now(), request.url.path, self._service
        status, content = 200, {}
        try:
            body = await self._read(request)
            service.bytes_waiting += len(body)
            try:
                loop = asyncio.get_running_loop()
                values = await loop.run_in_executor(service.threads, _parse, body)
                content = await self.work[path](values)
            finally:
                service.bytes_waiting -= len(body)
        except (Answer, Full, InputError) as error:
            status, content = getattr(error, "status", 400), {"error": str(error)}
        except ClientDisconnect:
            status = 499  # which nobody reads
        service.metrics.requests.labels(path, status).inc()
        service.metrics.seconds.labels(path).observe(CLOCK.now() - started)
        return JSONResponse(content, status, _HEADERS.get(status))

    async def _read(self, request: Request) -> bytes:
        """Read the body.

        One that is refused is read on for a while and dropped: a connection that is closed before
        is reset, and its client does not see why.
        """
        service, body, size = self._service, bytearray(), 0
        too_long = Answer(413, f"the body is longer than {MAX_BODY / 2**20:g} MiB.")
        length = request.headers.get("content-length", "0")
        refusal: Exception | None = _wrong_token(self._token, request)
        if length.isdecimal() and int(length[:20]) > MAX_BODY:
            refusal = refusal or too_long
        if refusal and "expect" in request.headers:  # nothing is sent before we say so
            raise refusal
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > MAX_BODY:
                        refusal = refusal or too_long
                    elif service.bytes_waiting + size > MAX_WAITING:
                        refusal = refusal or Full(
                            "too many bytes are waiting; try again in a moment."
                        )
                    if size > _DROPPED * MAX_BODY:
                        break
                    if not refusal:
                        body += chunk
        except TimeoutError:
            late = f"the body did not arrive in {BODY_SECONDS:g} seconds."
            refusal = refusal or Answer(408, late)
        if refusal:
            raise refusal
        return bytes(body)

    async def health(self, _: Request) -> Response:
        """Say that the server is there, and with which model."""
        config = self._service.model.config
        about = {"image_size": config.vision.image_spec.side, "embed_dim": config.embed_dim}
        return JSONResponse({"status": "ok", "model": str(self._service.config.model), **about})

    async def numbers(self, request: Request) -> Response:
        """Give Prometheus what it asks for."""
        if error := _wrong_token(self._token, request):
            return JSONResponse({"error": str(error)}, 401, _HEADERS[401])
        known = generate_latest(self._service.metrics.registry)
        return Response(known, media_type=CONTENT_TYPE_LATEST)

    async def failed(self, _: Request, error: Exception) -> Response:
        """Answer what has no path, another method, or was a bug."""
        status = getattr(error, "status_code", 500)
        message = {
            404: f"there are {', '.join(self.work)}, /health and /metrics.",
            405: "take POST for what is computed, GET for /health and /metrics.",
        }.get(status, "an error of the server, which its log shows.")
        return JSONResponse({"error": message}, status, getattr(error, "headers", None))

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        """Close the service behind the last request."""
        yield
        await asyncio.to_thread(self._service.close)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Answer(400, f"the body is not JSON: {error!s:.200}.") from error
    if not isinstance(values, dict):
        raise Answer(400, 'the body is a JSON object, such as {"texts": ["a cat"]}.')
    return values


def _wrong_token(token: str | None, request: Request) -> Answer | None:
    header = request.headers.get("authorization", "")
    if token is None or hmac.compare_digest(f"Bearer {token}".encode(), header.encode()):
        return None
    return Answer(401, "send the token of this server: Authorization: Bearer TOKEN.")
