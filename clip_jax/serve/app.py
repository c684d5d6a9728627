"""HTTP paths of the server: limits on request bodies; results and errors as JSON."""

import asyncio
import functools
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
from clip_jax.evals.evaluator import length_of
from clip_jax.serve.batcher import Full
from clip_jax.serve.service import Answer, Service

HEADER_SECONDS = 10.0  # time for the headers of a request to arrive
MAX_BODY = 16 << 20  # bytes of a request body; status 413 above
MAX_WAITING = 256 << 20  # bytes of all pending requests; status 429 above
BODY_SECONDS = 60.0  # time for a request body to arrive; status 408 after
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}  # by status
_DROPPED = 4  # how much of a rejected body is read, in multiples of MAX_BODY


def build(service: Service, token: str | None = None) -> Starlette:
    """Return the ASGI application for Uvicorn."""
    paths = _Paths(service, token)
    errors: Any = dict.fromkeys((404, 405, 500), paths.failed)
    app = Starlette(
        routes=[
            *(
                Route(path, functools.partial(paths.answer, path), methods=["POST"])
                for path in paths.work
            ),
            Route("/health", paths.health),
            Route("/metrics", paths.numbers),
        ],
        exception_handlers=errors,
        lifespan=paths.lifespan,
    )
    app.router.redirect_slashes = False  # a redirect would go to what the header `Host` names
    return app


class Protocol(AutoHTTPProtocol):
    """Uvicorn's protocol that also closes connections whose headers arrive too slowly."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the time limit for headers."""
        super().connection_made(transport)
        self._late = self.loop.call_later(HEADER_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        """Keep the time limit until the headers are complete."""
        super().data_received(data)
        is_busy = self.cycle and not self.cycle.response_complete
        if self._late and is_busy:
            self._late.cancel()
            self._late = None
        elif not self._late and not is_busy:
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.close)


class _Paths:
    """Handlers of all paths."""

    def __init__(self, service: Service, token: str | None) -> None:
        self._service, self._token = service, token
        self.work = {"/embed": service.embed, "/label": service.label, "/search": service.search}

    async def answer(self, path: str, request: Request) -> Response:
        """Handle a request to `path`, one of those that compute.

        `path` is that of the route: the request's URL also depends on its header `Host`.
        """
        started, service = CLOCK.now(), self._service
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
            status = 499  # the client has left
        service.metrics.requests.labels(path, status).inc()
        service.metrics.seconds.labels(path).observe(CLOCK.now() - started)
        return JSONResponse(content, status, _HEADERS.get(status))

    async def _read(self, request: Request) -> bytes:
        """Read the body.

        Of a rejected body, some more is read and dropped: closing the connection at once would
        reset it, and the client would not see the error.
        """
        service, body, size = self._service, bytearray(), 0
        too_long = Answer(
            413, f"the body is longer than {MAX_BODY / 2**20:g} MiB; send fewer inputs."
        )
        length = request.headers.get("content-length", "0")
        refusal: Exception | None = _wrong_token(self._token, request)
        if length.isdecimal() and int(length[:20]) > MAX_BODY:
            refusal = refusal or too_long
        if refusal and "expect" in request.headers:  # the client waits for our "continue"
            raise refusal
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > MAX_BODY:
                        refusal = refusal or too_long
                    elif service.bytes_waiting + size > MAX_WAITING:
                        refusal = refusal or Full(
                            "the server has too many pending requests; retry later."
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
        """Return that the server is up, and the model."""
        model = self._service.model
        image = length_of(model.image_preprocess) or {
            "image_size": model.config.vision.image_spec.side
        }
        about = {"status": "ok", "model": str(self._service.config.model)}
        return JSONResponse({**about, **image, "embed_dim": model.config.embed_dim})

    async def numbers(self, request: Request) -> Response:
        """Return the metrics for Prometheus."""
        if error := _wrong_token(self._token, request):
            return JSONResponse({"error": str(error)}, 401, _HEADERS[401])
        known = generate_latest(self._service.metrics.registry)
        return Response(known, media_type=CONTENT_TYPE_LATEST)

    async def failed(self, _: Request, error: Exception) -> Response:
        """Return the error of an unknown path, another method, or a bug."""
        status = getattr(error, "status_code", 500)
        message = {
            404: f"unknown path; use {', '.join(self.work)}, /health or /metrics.",
            405: f"wrong method; use POST for {', '.join(self.work)}, GET for the others.",
        }.get(status, "internal error; see the server's log.")
        return JSONResponse({"error": message}, status, getattr(error, "headers", None))

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        """Close the service after the last request."""
        yield
        await asyncio.to_thread(self._service.close)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Answer(400, f"the body is not JSON: {error!s:.200}.") from error
    if not isinstance(values, dict):
        raise Answer(400, 'the body must be a JSON object, such as {"texts": ["a cat"]}.')
    return values


def _wrong_token(token: str | None, request: Request) -> Answer | None:
    header = request.headers.get("authorization", "")
    if token is None or hmac.compare_digest(f"Bearer {token}".encode(), header.encode()):
        return None
    return Answer(401, "missing or wrong token; send the header Authorization: Bearer TOKEN.")
