"""Measure indexing of tars, opening of a large index, and the order of a large data set.

    PYTHONPATH=. python benchmarks/index.py

- Samples/s of indexing one tar, on one core.
- CPU seconds and memory to open the index of 41,455 shards with 10,000 samples each.
- Microseconds per sample to compute the order of 414 million samples in seven million blocks.
"""

import argparse
import os
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from clip_jax.data.order.blocks import BlockOrder, OfPositions, Streams
from clip_jax.data.sources import tar_index
from tests.data.conftest import write_tar


def index_a_tar(folder: Path) -> None:
    names = [f"{i:09d}.{kind}" for i in range(3000) for kind in ("jpg", "txt")]
    path = str(folder / "a.tar")
    write_tar(Path(path), [(name, b"x" * 2000) for name in names])
    seconds = []
    for _ in range(3):  # the first loads the libraries that Arrow needs
        start = time.process_time()
        rows, _ = tar_index.index_shard(path, os.path.getsize(path))
        assert rows.num_rows == 3000
        seconds.append(time.process_time() - start)
    print(f"{3000 / min(seconds):,.0f} samples/s indexed")


def open_a_large_index(folder: Path) -> None:
    shards = [
        tar_index.Shard(
            *(f"gs://b/{i:05d}.tar", (10**9, 0.0)), np.arange(51) * 20_000_000, np.full(50, 200)
        )
        for i in range(41_455)
    ]
    path = str(folder / "all.arrow")
    tar_index.write_summary(path, shards)
    del shards
    start = time.process_time()
    tracemalloc.start()
    index = tar_index.TarIndex([(one, "") for one in tar_index.read_summary(path)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index.places) == 414_550_000
    assert index.block(414_549_999)[0] == 41_454
    print(f"opened in {time.process_time() - start:.1f} s of CPU, {peak / 1e6:.0f} MB")


def order_a_large_set() -> None:
    sizes, streams = np.full(7_000_000, 60), Streams(32768, (0, 64))
    shares = OfPositions(streams, int(sizes.sum()))
    order = BlockOrder(sizes, seed=0, shuffle_blocks=1024, shares=shares)
    took = []
    for first in (0, 1, 257, 513):  # the first computes the epoch's permutation
        start = time.process_time()
        for stream in streams.of_process:
            order.at(stream, first * streams.width, 256 * streams.width)
        took.append(time.process_time() - start)
    print(f"{min(took[1:]) / 256 / 512 * 1e6:.2f} µs a sample, after {took[0]:.1f} s")


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        index_a_tar(Path(scratch))
        open_a_large_index(Path(scratch))
    order_a_large_set()
