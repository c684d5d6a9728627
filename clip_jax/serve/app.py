"""HTTP paths of the server: limits on request bodies; results and errors as JSON."""

import asyncio
import contextlib
import functools
import hmac
import itertools
import json
import sys
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from clip_jax.clock import CLOCK, Clock
from clip_jax.errors import InputError
from clip_jax.evals.evaluator import length_of
from clip_jax.serve.batcher import Full
from clip_jax.serve.service import Answer, Service

HEADER_SECONDS = 10.0  # time for the headers of a request to arrive
MAX_BODY = 16 << 20  # bytes of a request body; status 413 above
MAX_WAITING = 256 << 20  # bytes of all bodies that arrive or are pending, and unread answers
BODY_SECONDS = 60.0  # time for a request body to arrive; status 408 after
ANSWER_SECONDS = 60.0  # time for a client to read its answer; then it is disconnected
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}  # by status
_MOST_VALUES = 1 << 20  # about as many commas and brackets; status 413 above
_DROPPED = 4  # how much of a rejected body is read, in multiples of MAX_BODY
_DROP_SECONDS = 10.0  # for how long it is read
_PIECE = 1 << 20  # bytes of an answer that are sent at once


def build(service: Service, token: str | None = None, clock: Clock = CLOCK) -> Starlette:
    """Return the ASGI application for Uvicorn."""
    paths = _Paths(service, token, clock)
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


class Protocol(H11Protocol):
    """Uvicorn's protocol that also closes connections of clients that are too slow.

    These are clients whose headers do not arrive in time, or that do not read their answers.
    Uvicorn's other one, of httptools, does not limit the length of headers.
    """

    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

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

    def pause_writing(self) -> None:
        """Start the time limit for reading an answer."""
        super().pause_writing()
        if not self._unread:
            self._unread = self.loop.call_later(ANSWER_SECONDS, self.transport.abort)

    def on_response_complete(self) -> None:
        """End the time limit for reading an answer."""
        super().on_response_complete()
        if self._unread:
            self._unread.cancel()
            self._unread = None


class _Paths:
    """Handlers of all paths."""

    def __init__(self, service: Service, token: str | None, clock: Clock) -> None:
        self._service, self._token, self._clock = service, token, clock
        self.work = {"/embed": service.embed, "/label": service.label, "/search": service.search}

    async def answer(self, path: str, request: Request) -> Response:
        """Handle a request to `path`, one of those that compute.

        `path` is that of the route: the request's URL also depends on its header `Host`.
        """
        started, service, status = self._clock.now(), self._service, 500  # 500: a bug
        body = _Body(service)
        try:
            await self._read(request, body)
            loop = asyncio.get_running_loop()
            values = await loop.run_in_executor(service.parser, _parse, body.take())
            body.count(_memory(values))
            content = await self.work[path](values)
            response = await loop.run_in_executor(service.threads, _Answered, content, service)
            status = 200
        except (Answer, Full, InputError) as error:
            status = getattr(error, "status", 400)
            response = JSONResponse({"error": str(error)}, status, _HEADERS.get(status))
        except ClientDisconnect:
            status = 499  # the client has left
            response = JSONResponse({}, status)
        finally:
            body.release()
            service.metrics.requests.labels(path, status).inc()
            service.metrics.seconds.labels(path).observe(self._clock.now() - started)
        return response

    async def _read(self, request: Request, body: "_Body") -> None:
        """Read the body.

        Of a rejected body, some more is read and dropped: closing the connection at once would
        reset it, and the client would not see the error.
        """
        stream = request.stream()
        try:
            if refusal := _wrong_token(self._token, request) or _too_long(request):
                raise refusal
            await self._in_time(_receive(stream, body), BODY_SECONDS)
        except (Answer, Full):
            if "expect" not in request.headers:  # else the client waits for our "continue"
                with contextlib.suppress(Answer):  # after a 408, the stream has ended
                    await self._in_time(_drop(stream), _DROP_SECONDS)
            raise

    async def _in_time(self, reading: Coroutine[Any, Any, None], seconds: float) -> None:
        """Wait for a coroutine that reads a body. Raises Answer if that takes too long."""
        task = asyncio.ensure_future(reading)
        try:
            done, _ = await self._clock.first([task], seconds)
            if not done:
                raise Answer(408, f"the body did not arrive in {seconds:g} seconds.")
            task.result()
        finally:
            task.cancel()

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
        content = generate_latest(self._service.metrics.registry)
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    async def failed(self, _: Request, error: Exception) -> Response:
        """Return the error of an unknown path, another method, or a bug."""
        status = getattr(error, "status_code", 500)
        message = {
            404: f"unknown path; use {', '.join(self.work)}, /health or /metrics.",
            405: f"wrong method; use POST for {', '.join(self.work)}, GET for the others.",
        }.get(status, "internal error; see the server's log.")
        return JSONResponse({"error": message}, status, getattr(error, "headers", None))

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        """Close the service after the last request."""
        yield
        await asyncio.to_thread(self._service.close)


class _Body:
    """A request body, whose bytes count as pending from their arrival to `release`."""

    def __init__(self, service: Service) -> None:
        self._service, self._content, self._size = service, bytearray(), 0

    def add(self, chunk: bytes) -> None:
        """Add bytes. Raises Answer or Full if they are too many, and then forgets all."""
        if self._size + len(chunk) > MAX_BODY:
            self.release()
            raise _longer()
        self.count(self._size + len(chunk))
        self._content += chunk

    def count(self, size: int) -> None:
        """Count `size` bytes from now on. Raises Full if they are too many, and forgets all."""
        waiting = self._service.bytes_waiting + size - self._size
        if size > self._size and waiting > MAX_WAITING:
            self.release()  # at once, so that no other body is rejected, too
            raise Full("the server has too many pending requests; retry later.")
        self._service.bytes_waiting, self._size = waiting, size

    def take(self) -> bytearray:
        """Return all bytes, once; they count until `release`."""
        content, self._content = self._content, bytearray()
        return content

    def release(self) -> None:
        """Forget all bytes."""
        self._service.bytes_waiting -= self._size
        self._content, self._size = bytearray(), 0


async def _receive(stream: AsyncGenerator[bytes], body: _Body) -> None:
    async for chunk in stream:
        body.add(chunk)


async def _drop(stream: AsyncGenerator[bytes]) -> None:
    dropped = 0
    async for chunk in stream:
        dropped += len(chunk)
        if dropped > _DROPPED * MAX_BODY:
            return


def _longer() -> Answer:
    return Answer(413, f"the body is longer than {MAX_BODY / 2**20:g} MiB; send fewer inputs.")


def _too_long(request: Request) -> Answer | None:
    """Return the error of a body that will be too long, by its header."""
    length = request.headers.get("content-length", "0")
    return _longer() if length.isdecimal() and int(length[:20]) > MAX_BODY else None


def _parse(body: bytearray) -> dict[str, Any]:
    count = sum(map(body.count, b",:[{"))  # small values take far more memory than their text
    if count > _MOST_VALUES:
        raise Answer(413, f"the body has more than {_MOST_VALUES} values; send fewer inputs.")
    try:
        values = json.loads(body, object_pairs_hook=_fields, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Answer(400, f"the body is not JSON: {error!s:.200}.") from error
    if not isinstance(values, dict):
        raise Answer(400, 'the body must be a JSON object, such as {"texts": ["a cat"]}.')
    return values


def _memory(values: dict[str, Any]) -> int:
    """Return the bytes of a request's strings: up to four times those of its body."""
    lists = (value if isinstance(value, list) else [value] for value in values.values())
    return sum(map(sys.getsizeof, itertools.chain.from_iterable(lists)))


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field occurs twice")
    return fields


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


class _Answered(JSONResponse):
    """A result as JSON, whose bytes count as pending until the client has read them."""

    def __init__(self, content: dict[str, Any], service: Service) -> None:
        try:
            super().__init__(content)
        except ValueError as error:  # JSON has no such numbers
            raise Answer(
                500,
                "the answer has numbers that are NaN or infinite; check the weights with clip-jax "
                "evaluate, and the embeddings.",
            ) from error
        self._service = service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it in pieces: Uvicorn takes the next one when the client has read the last."""
        size, headers = len(self.body), self.raw_headers
        self._service.bytes_waiting += size
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for start in range(0, size, _PIECE):
                piece = bytes(self.body[start : start + _PIECE])
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body"})
        finally:
            self._service.bytes_waiting -= size


def _wrong_token(token: str | None, request: Request) -> Answer | None:
    header = request.headers.get("authorization", "")
    if token is None or hmac.compare_digest(f"Bearer {token}".encode(), header.encode()):
        return None
    return Answer(401, "missing or wrong token; send the header Authorization: Bearer TOKEN.")
