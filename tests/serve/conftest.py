"""The server's ASGI application with a tiny model, called without a network."""

import asyncio
import base64
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_jax.clock import CLOCK, Clock
from clip_jax.inference.embed import EmbedConfig, embed
from clip_jax.inference.loading import Model, load
from clip_jax.serve.app import build
from clip_jax.serve.service import ServeConfig, Service
from tests.conftest import write_tiny_model


def png(seed: int, width: int = 20, height: int = 16) -> bytes:
    """Return a random picture, different for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


Answered = tuple[int, Any, dict[str, str]]  # status, content, headers


@dataclass(frozen=True)
class Client:
    """Calls the application as Uvicorn does."""

    service: Service
    token: str | None = None
    clock: Clock = CLOCK

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answered:
        """Send a body as JSON, or bytes unchanged."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        length = {} if data is None else {"content-length": str(len(data))}
        return asyncio.run(self.call(path, [data or b""], length | (headers or {}), data is None))

    async def call(
        self,
        path: str,
        pieces: list[bytes],
        headers: dict[str, str] | None = None,
        get: bool = False,
        then: dict[str, Any] | None = None,
        whole: bool = True,
    ) -> Answered:
        """Send the body in pieces. After an incomplete one, `then` is sent, or nothing."""
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "GET" if get else "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(k.lower().encode(), x.encode()) for k, x in (headers or {}).items()],
        }
        left, sent = pieces, []

        async def receive() -> dict[str, Any]:
            if left:
                body = left.pop(0)
                return {"type": "http.request", "body": body, "more_body": not whole or bool(left)}
            return then or await asyncio.get_running_loop().create_future()

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await build(self.service, self.token, self.clock)(scope, receive, send)
        headers = {k.decode(): x.decode() for k, x in sent[0]["headers"]}
        content = b"".join(message.get("body", b"") for message in sent)
        is_json = headers["content-type"] == "application/json"
        return sent[0]["status"], json.loads(content) if is_json else content.decode(), headers


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny model, six pictures and their embeddings."""
    path = tmp_path_factory.mktemp("served")
    write_tiny_model(path / "model")
    (path / "photos").mkdir()
    for i in range(6):
        (path / "photos" / f"{i}.png").write_bytes(png(i))
    places = {"model": path / "model", "source": str(path / "photos")}
    embed(EmbedConfig(**places, output=path / "embeddings"))
    return path


@pytest.fixture(scope="session")
def model(folder: Path) -> Model:
    """Load the model to serve."""
    return load(folder / "model")


@pytest.fixture
def start(folder: Path, model: Model) -> Iterator[Callable[..., Client]]:
    """Return a function that starts a server with some settings; it ends with the test."""
    services = []

    def begin(token: str | None = None, **settings: Any) -> Client:
        services.append(Service(ServeConfig(model=folder / "model", **settings), model))
        return Client(services[-1], token)

    yield begin
    for service in services:
        service.close()
