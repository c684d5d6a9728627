"""A server of a tiny model in this process, and a client that speaks plain HTTP."""

import base64
import http.client
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image

from clip_jax.loading import Model, load
from clip_jax.predict import EmbedConfig, embed
from clip_jax.serve.app import build
from clip_jax.serve.service import ServeConfig, Service
from tests.conftest import ROOT, write_tiny_model


def png(seed: int, width: int = 20, height: int = 16) -> bytes:
    """A picture of its own for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@dataclass
class Client:
    """Requests to one port, each on a connection of its own."""

    port: int
    service: Service | None = None

    def ask(
        self,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        seconds: float = 60,
    ) -> tuple[int, Any, dict[str, str]]:
        """Send JSON, or bytes as they are; return status, content, headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body)
            connection.request("GET" if data is None else "POST", path, data, headers or {})
            answer = connection.getresponse()
            content = answer.read()
            kind = answer.headers.get("content-type", "")
            value = json.loads(content) if kind == "application/json" else content.decode()
            return answer.status, value, dict(answer.headers)
        finally:
            connection.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, six pictures, their embeddings."""
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
    """What is served."""
    return load(folder / "model")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


class Process:
    """`clip-jax serve` as a process of its own."""

    def __init__(self, folder: Path, port: int, *flags: str) -> None:
        command = [sys.executable, "-m", "clip_jax", "serve", str(folder / "model")]
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *flags],
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        line = self.process.stderr.readline()
        assert "at http://127.0.0.1" in line, line + self.process.stderr.read()
        self.client = Client(port)

    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    def seconds(self) -> float:
        """What its threads have computed."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(90)
        self.process.stderr.close()
        return code


@pytest.fixture
def run(folder: Path) -> Iterator[Callable[..., Process]]:
    """Start processes that serve; what is left of them is killed with the test."""
    running: list[Process] = []

    def begin(*flags: str, port: int = 0) -> Process:
        running.append(Process(folder, port or free_port(), *flags))
        return running[-1]

    yield begin
    for one in running:
        if one.process.poll() is None:
            one.end(signal.SIGKILL)


@pytest.fixture
def start(folder: Path, model: Model) -> Iterator[Callable[..., Client]]:
    """Start servers with settings of their own; they end with the test."""
    running = []

    def begin(token: str | None = None, **settings: Any) -> Client:
        service = Service(ServeConfig(model=folder / "model", **settings), model)
        config = uvicorn.Config(
            build(service, token), port=0, log_level="critical", access_log=False, lifespan="on"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return Client(server.servers[0].sockets[0].getsockname()[1], service)

    yield begin
    for server, thread in running:
        server.should_exit = True
        thread.join()
