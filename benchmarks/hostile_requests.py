"""Send hostile requests to `clip-jax serve`; print statuses, seconds and the server's peak memory.

    PYTHONPATH=. python benchmarks/hostile_requests.py

One process serves a tiny model with random weights and CLIP's context length of 77. Each attack
begins with a new measurement of the peak (Linux only). The rows are a table in Markdown.
"""

import argparse
import collections
import contextlib
import dataclasses
import http.client
import importlib.metadata
import io
import json
import resource
import socket
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from benchmarks.serve import Process, free_port
from tests.conftest import TINY, write_tiny_model
from tests.serve.conftest import encoded, png

MIB = 1 << 20
BODY = 16 * MIB  # the server's limit
PACKAGES = ("starlette", "uvicorn", "h11", "prometheus_client")

Outcome = Iterable[str]  # a status each, or what happened to the connection


class Target(Process):
    """A server whose memory is measured, and limited, so that no attack harms this machine."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder, port)
        resource.prlimit(self.process.pid, resource.RLIMIT_AS, (24 << 30, 24 << 30))
        self.log: list[str] = []
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()

    def memory(self, name: str) -> int:
        """Return VmRSS or VmHWM, in bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def send(self, path: str, body: bytes, method: str = "POST", **headers: str) -> str:
        """Send one request; return its status, and the length of a long error."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(connection):
            try:
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
            except (OSError, http.client.HTTPException) as error:
                return type(error).__name__
        is_long = answer.status >= 400 and len(content) > 1000
        return f"{answer.status}{f' ({len(content):,} bytes)' if is_long else ''}"

    def values(self, path: str, **values: object) -> str:
        return self.send(path, json.dumps(values).encode())

    def open(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=90)

    def series(self) -> int:
        """Return the number of metric series."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        return sum(not line.startswith("#") for line in lines)


def head(length: int | str = BODY - 100_000, path: str = "/embed", method: str = "POST") -> bytes:
    """Return the headers of a request whose body has this length."""
    framing = f"Content-Length: {length}" if length != "chunked" else "Transfer-Encoding: chunked"
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode()


def answers(connection: socket.socket) -> Outcome:
    """Return the statuses of all answers until the server closes, or the client's time is over."""
    received = b""
    try:
        while data := connection.recv(1 << 16):
            received += data
    except TimeoutError:
        yield "still open"
    except OSError as error:
        yield type(error).__name__
    yield from (x[:3].decode() for x in received.split(b"HTTP/1.1 ")[1:])
    if not received:
        yield "closed"


# ------------------------------------------------------------------ bodies


def long_template(target: Target) -> Outcome:
    labels = [f"label {i}" for i in range(200)]
    yield target.values("/label", images=[], labels=labels, template="{}" + "x" * 6 * MIB)


def template_of_placeholders(target: Target) -> Outcome:
    yield target.values("/label", images=[], labels=["x" * 8 * MIB], template="{}" * 2 * MIB)


def template_and_many_labels(target: Target) -> Outcome:
    labels = [f"label {i}" for i in range(4096)]
    yield target.values("/label", images=[], labels=labels, template="{} " + "word " * 15_000)


def long_label_in_error(target: Target) -> Outcome:
    yield target.values("/label", images=[], labels=["x" * 14_000_000, " "])
    yield target.values("/label", images=[], labels=["x"], template="y" * 14_000_000)
    yield target.values("/embed", **{"z" * 14_000_000: 1})
    yield target.values("/embed", images=["é" * 7_000_000])


def stalled_bodies(target: Target) -> Outcome:
    """60 bodies that never end."""

    def stall(_: int) -> socket.socket:
        connection = target.open()
        with contextlib.suppress(OSError):
            connection.sendall(head() + b" " * (BODY - 200_000))
        connection.settimeout(1)
        return connection

    with ThreadPoolExecutor(60) as threads:
        connections = list(threads.map(stall, range(60)))
    yield f"during it {target.values('/embed', texts=['a'])}"
    yield from (status for connection in connections for status in answers(connection))
    for connection in connections:
        connection.close()
    time.sleep(1)
    yield f"after it {target.values('/embed', texts=['a'])}"


def many_full_bodies(target: Target) -> Outcome:
    """32 at once, of texts that need four bytes a character."""
    text = "x" * (BODY - 100) + "😀"
    body = json.dumps({"texts": [text]}, ensure_ascii=False).encode()
    with ThreadPoolExecutor(32) as threads:
        yield from threads.map(lambda _: target.send("/embed", body), range(32))


def long_texts(target: Target) -> Outcome:
    for size in (1_000_000, 10_000_000):
        for unit in ("x", " ", "e\u0301", "\u0345", "&amp;", "😀", "x!", "Ã©", "\n"):
            text = (unit * size).encode()[:size].decode(errors="ignore")
            yield target.send("/embed", json.dumps({"texts": [text]}, ensure_ascii=False).encode())


def many_long_texts(target: Target) -> Outcome:
    """As many combining letters as fit, in texts as long as they are read."""
    yield target.send(
        "/embed",
        json.dumps({"texts": ["e\u0301" * 38_500] * 140}, ensure_ascii=False).encode(),
    )


def nested_json(target: Target) -> Outcome:
    for opener in (b"[", b'{"a":', b'{"texts":['):
        for count in (500, 100_000, BODY // len(opener)):
            yield target.send("/embed", opener * count)


def json_that_grows(target: Target) -> Outcome:
    """Many small values, each of which takes far more memory than its text."""
    for unit in (b'{"":0}', b"[]", b"1.5", b'"ab"', b'""'):
        count = (BODY - 100) // (len(unit) + 1)
        yield target.send("/embed", b'{"texts":[' + b",".join([unit] * count) + b"]}")
    fields = b",".join(b'"%x":0' % i for i in range(1_400_000))
    yield target.send("/embed", b"{" + fields + b"}")


def odd_json(target: Target) -> Outcome:
    for body in (
        b'{"texts": ["\xff\xfe"]}',
        b'{"texts": ["\xed\xa0\x80"]}',
        b'{"texts": ["\\ud800"]}',
        b'{"\\ud800": 1}',
        b'{"text": "\\ud800"}',
        b'{"images": ["\\ud800"]}',
        b'{"texts": [NaN]}',
        b'{"texts": NaN}',
        b'{"text": "a", "top": Infinity}',
        b'{"text": "a", "top": 1' + b"0" * 5000 + b"}",
        b'{"text": "a", "top": true}',
        b'{"texts": ["a"], "texts": ["b"]}',
        b'{"texts": ["a"]} {}',
        b'\xef\xbb\xbf{"texts": ["a"]}',
        '{"texts": ["a"]}'.encode("utf-16"),
        '{"texts": ["a"]}'.encode("utf-32"),
        b"\0" * 1000,
        b"null",
        b'{"labels": ["\\ud800"], "images": [], "template": "{}"}',
        b'{"labels": ["a"], "images": [], "template": "{}\\ud800"}',
    ):
        yield target.send("/label" if b"labels" in body else "/embed", body)


def many_labels(target: Target) -> Outcome:
    for count in (4096, 4097, 1_000_000):
        yield target.values("/label", images=[], labels=[str(i) for i in range(count)])


def slow_readers(target: Target) -> Outcome:
    """20 clients that ask for as many embeddings as they may, and read none."""
    body = json.dumps({"texts": ["a"] * 4096}).encode()
    connections = []
    for _ in range(20):
        connections.append(target.open())
        connections[-1].sendall(head(len(body)) + body)
        yield connections[-1].recv(12)[9:].decode()
    yield f"during it {target.values('/embed', texts=['a'])}"
    for connection in connections:
        connection.close()


# ------------------------------------------------------------------ images


def solid(width: int, height: int, kind: str = "PNG", mode: str = "1") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, kind)
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """Return the start of a PNG of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def icon_of(data: bytes) -> bytes:
    """Return an icon that claims 16 x 16 pixels and holds this PNG."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(data), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + data


def images(target: Target) -> Outcome:
    bomb = solid(13_000, 13_000)
    for data in (
        solid(7_000, 7_000),
        bomb,
        icon_of(bomb),
        icon_of(solid(13_000, 13_000, mode="RGBA")),
        icon_of(solid(30_000, 30_000)),
        png_of(60_000, 60_000),
        png_of(2**31 - 1, 2**31 - 1),
        png_of(50_000_000, 1),
        png_of(1, 50_000_000),
        png_of(0, 5),
        solid(7_000, 7_000, "TIFF"),
        solid(7_000, 7_000, "GIF"),
        solid(7_000, 7_000, "JPEG2000", "L"),
        solid(7_000, 7_000, "BMP"),
        solid(7_000, 7_000, "WEBP", "RGB"),
        solid(2_000, 2_000, "DDS", "RGB"),
        png(0)[:200],
        b"",
        b"x" * 10 * MIB,
        b"%!PS-Adobe-3.0 EPSF-3.0\n(a) print quit\n",
    ):
        yield target.values("/embed", images=[encoded(data)])


def many_large_images(target: Target) -> Outcome:
    for data in (solid(7_000, 7_000), solid(7_000, 7_000, "WEBP", "RGB")):
        yield target.values("/embed", images=[encoded(data)] * 64)


# ------------------------------------------------------------------ HTTP


def forged_hosts(target: Target) -> Outcome:
    """2,000 names of hosts that look like paths."""
    before = target.series()
    for i in range(500):
        yield target.send("/embed", b"{", Host=f"x/{i}?")
        yield target.send("/embed", b'{"texts": ["a"]}', Host=f"x/{i}?")
        yield target.send("/label", b'{"texts": ["a"]}', Host="x/embed?")
        yield target.send("/embed/", b"{", Host=f"[{i}")
    yield f"{before} → {target.series()} series"


def unknown_paths(target: Target) -> Outcome:
    before = target.series()
    for i in range(200):
        yield target.send(f"/{i}", b"{}")
        yield target.send("/embed", b"{}", method=f"M{i}")
    yield f"{before} → {target.series()} series"


def methods(target: Target) -> Outcome:
    for method in ("HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "CONNECT", "FOO"):
        for path in ("/health", "/embed", "/metrics", "/nothing", "*"):
            yield target.send(path, b"", method=method)


def slow_headers(target: Target) -> Outcome:
    """200 connections, each with one more byte a second."""
    connections = [target.open() for _ in range(200)]
    for connection in connections:
        connection.sendall(b"POST /embed HTTP/1.1\r\nX: ")
    for _ in range(12):
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(b"x")
        time.sleep(1)
    for connection in connections:
        connection.settimeout(1)
        yield from answers(connection)
        connection.close()


def long_headers(target: Target) -> Outcome:
    for data in (b"X: " + b"x" * 200 * MIB, b"X: y\r\n" * 5_000_000, b"\r\n" * 10_000_000):
        with target.open() as connection:
            with contextlib.suppress(OSError):
                connection.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\n" * (data[0] == 88) + data)
            yield from answers(connection)
    with target.open() as connection:
        connection.sendall(b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        yield from answers(connection)


def endless_chunks(target: Target) -> Outcome:
    chunks = b"100000\r\n" + b" " * MIB + b"\r\n", b"1\r\n \r\n" * 10_000, b"1;" + b"x" * MIB
    for chunk in chunks:
        with target.open() as connection:
            with contextlib.suppress(OSError):
                connection.sendall(head("chunked"))
                for _ in range(200 * MIB // len(chunk)):
                    connection.sendall(chunk)
            yield from answers(connection)
    with target.open() as connection:  # trailers
        with contextlib.suppress(OSError):
            connection.sendall(head("chunked") + b"1\r\n \r\n0\r\n")
            for _ in range(200):
                connection.sendall(b"X: y\r\n" * 100_000)
        yield from answers(connection)


def pipelining(target: Target) -> Outcome:
    body = b'{"texts": ["a"]}'
    both = head(0, "/health", "GET") + head(len(body)) + body
    with target.open() as connection:
        connection.settimeout(8)
        connection.sendall(both * 500)
        yield from answers(connection)


def odd_requests(target: Target) -> Outcome:
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10,
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET http://a/health HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 6\r\n\r\n{}",
        b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
        b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
        b"GET /%ff%00/../health HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
        with target.open() as connection:
            connection.settimeout(3)
            connection.sendall(data)
            yield from answers(connection)


ATTACKS: list[Callable[[Target], Outcome]] = [
    long_template,
    long_label_in_error,
    template_of_placeholders,
    template_and_many_labels,
    stalled_bodies,
    many_full_bodies,
    long_texts,
    many_long_texts,
    nested_json,
    json_that_grows,
    odd_json,
    many_labels,
    slow_readers,
    images,
    many_large_images,
    forged_hosts,
    unknown_paths,
    methods,
    slow_headers,
    long_headers,
    endless_chunks,
    pipelining,
    odd_requests,
]


def run(target: Target, attack: Callable[[Target], Outcome]) -> str:
    """Return a row of the table."""
    target.forget_peak()
    lines, started = len(target.log), time.perf_counter()
    counts = collections.Counter(attack(target))
    seconds = time.perf_counter() - started
    statuses = ", ".join(f"{name} × {n}" if n > 1 else name for name, n in counts.items())
    errors = sum(line.startswith("Traceback") for line in target.log[lines:])
    peak = target.memory("VmHWM") / MIB
    name = attack.__name__.replace("_", " ")
    return f"| {name} | {statuses} | {seconds:.1f} | {peak:,.0f} | {errors} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attacks", nargs="*", help="names of attacks; none: all of them")
    args = parser.parse_args()
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES))
    with tempfile.TemporaryDirectory() as scratch:
        text = dataclasses.replace(TINY.text, context_length=77)
        config = dataclasses.replace(TINY, text=text, embed_dim=512)
        write_tiny_model(Path(scratch) / "model", config=config)
        target = Target(Path(scratch), free_port())
        print(f"Memory at rest: {target.memory('VmRSS') / MIB:,.0f} MiB.\n")
        print("| attack | statuses | time (s) | peak (MiB) | tracebacks |")
        print("|---|---|---|---|---|", flush=True)
        for attack in ATTACKS:
            if not args.attacks or attack.__name__ in args.attacks:
                print(run(target, attack), flush=True)
        assert target.send("/health", b"", method="GET") == "200"
        print(f"\nExit code of the server: {target.end()}.")
