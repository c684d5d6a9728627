"""Compare the throughput of `clip-jax serve` with `encode_image` in batches.

    PYTHONPATH=. python benchmarks/serve.py

One process serves. This process runs the clients; each sends one image per request, and the next
one as soon as it has its answer. CPU time per image is measured as well, since other work on the
machine changes it little.
"""

import argparse
import contextlib
import dataclasses
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from clip_jax.inference.loading import load
from clip_jax.models import zoo
from tests.conftest import write_tiny_model
from tests.serve.conftest import encoded, png


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Process:
    """`clip-jax serve` as a process of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        command = [sys.executable, "-m", "clip_jax", "serve", str(folder / "model")]
        self.port = port
        self.process = subprocess.Popen(
            [*command, "--port", str(port)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        assert self.process.stderr
        line = self.process.stderr.readline()
        assert "at http://127.0.0.1" in line, line + self.process.stderr.read()

    def ask(self, path: str, body: bytes) -> int:
        """Send a request on a connection of its own; return its status."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        with contextlib.closing(connection):
            connection.request("POST", path, body)
            answer = connection.getresponse()
            answer.read()
            return answer.status

    def seconds(self) -> float:
        """Return the CPU seconds of its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", default="ViT-B-32", help="model to serve")
    parser.add_argument("--requests", type=int, default=512, help="requests per round")
    parser.add_argument("--clients", type=int, default=32, help="concurrent clients")
    parser.add_argument("--rounds", type=int, default=2, help="rounds to measure")
    args = parser.parse_args()
    jax.config.update("jax_default_prng_impl", "rbg")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = dataclasses.replace(zoo.get(args.architecture), dtype="float32")
        write_tiny_model(folder / "model", config=config)
        model = load(folder / "model")
        size = config.vision.image_size
        bodies = [json.dumps({"images": [encoded(png(i, size, size))]}).encode() for i in range(64)]
        pixels = np.stack([model.preprocess(png(i, size, size))[0] for i in range(64)])
        server = Process(folder, free_port())

        def ask(i: int) -> float:
            started = time.perf_counter()
            assert server.ask("/embed", bodies[i % 64]) == 200
            return time.perf_counter() - started

        for _ in range(args.rounds):
            jax.block_until_ready(model.encode_image(pixels))
            started, computed = time.perf_counter(), time.process_time()
            count = max(args.requests // 128, 1) * 64
            for _ in range(count // 64):
                jax.block_until_ready(model.encode_image(pixels))
            alone = count / (time.perf_counter() - started)
            own = (time.process_time() - computed) / count
            started, computed = time.perf_counter(), server.seconds()
            with ThreadPoolExecutor(args.clients) as threads:
                seconds = list(threads.map(ask, range(args.requests)))
            served = args.requests / (time.perf_counter() - started)
            theirs = (server.seconds() - computed) / args.requests
            p50, p99 = np.percentile(seconds, [50, 99])
            print(
                f"encode_image {alone:.1f}/s, served {served:.1f}/s, ratio {served / alone:.3f}; "
                f"p50 {p50:.3f} s, p99 {p99:.3f} s; CPU time {1000 * own:.1f} and "
                f"{1000 * theirs:.1f} ms per image, ratio {own / theirs:.3f}",
                flush=True,
            )
        server.end()
