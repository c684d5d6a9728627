"""Throughput of the server beside `encode_image` in batches.

    PYTHONPATH=. python benchmarks/serve.py

One process serves, this one asks: 32 clients, one picture a request, each at once with the next.
Seconds of a processor are measured too, which other work on the machine does not change much.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from clip_jax.loading import load
from clip_jax.models import zoo
from tests.conftest import write_tiny_model
from tests.serve.conftest import Process, encoded, free_port, png

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", default="ViT-B-32")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
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
            status, _, _ = server.client.ask("/embed", bodies[i % 64], seconds=600)
            assert status == 200
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
                f"p50 {p50:.3f} s, p99 {p99:.3f} s; processor {1000 * own:.1f} and "
                f"{1000 * theirs:.1f} ms an image, ratio {own / theirs:.3f}",
                flush=True,
            )
        server.end()
