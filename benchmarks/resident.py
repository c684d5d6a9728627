"""Measure the resident memory of a run that reads blocks from a slow bucket.

    PYTHONPATH=. python benchmarks/resident.py [SECONDS]

The bucket holds JPEG files of 56 kB in an ArrayRecord file; it answers after 30 ms, at 30 MB/s.
`data.read_ahead_mib` is 64. The exit code is 1 if memory grew by 400 MiB more than that budget, or
by 40 MiB more in the second half of the time than in the first.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grain  # noqa: F401  imported here, so that it does not count as growth
import numpy as np
import obstore  # noqa: F401
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from clip_jax.data.batch_plan import constant
from clip_jax.data.pipeline import DataConfig, build
from clip_jax.data.sources.array_record import ArrayRecordConfig, encode_example
from clip_jax.models.images import Square
from clip_jax.storage import files
from tests.contract.servers import Server

BUDGET, IMAGES = 64, 6_000  # MiB; pairs


def resident() -> int:
    """Return the resident memory of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) >> 10


def upload(url: str) -> None:
    images = []
    for i in range(20):
        file = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 256, (250, 300, 3), np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        images.append(file.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for i in range(IMAGES):
            writer.write(encode_example({"image": [images[i % 20]], "caption": [b"x"]}))
        writer.close()
        files.write_whole(url, path.read_bytes())


def measure(url: str, seconds: float) -> int:
    """Read for the given time; print the largest growth of memory in each half of it."""
    pipeline = build(
        DataConfig(source=ArrayRecordConfig(path=url), read_ahead_mib=BUDGET, shuffle_blocks=8),
        constant(64, Square(32)),
        tokenizer=lambda texts, *_: np.zeros((len(texts), 8), np.int32),
        context_length=8,
    )
    assert pipeline.order == "blocks"
    before, most, samples, start = resident(), [0, 0], 0, time.monotonic()
    for batch in pipeline.batches(0):
        samples += len(batch.keys)
        half = int(time.monotonic() > start + seconds / 2)
        most[half] = max(most[half], resident() - before)
        if time.monotonic() > start + seconds:
            break
    print(f"{samples:,} images: growth {most[0]} MiB, then {most[1]} MiB", flush=True)
    return int(max(most) >= BUDGET + 400 or most[1] >= most[0] + 40)


def main(seconds: float) -> int:
    with Server("gs") as server:
        os.environ |= server.environment()
        url = f"{server.make_bucket('resident')}/x.array_record"
        upload(url)
        server.behave(latency=0.03, bytes_per_second=30e6)
        command = [sys.executable, __file__, str(seconds), url]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seconds", nargs="?", type=float, default=120.0, help="seconds to read")
    parser.add_argument("url", nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.url:  # in a process of its own, which has not uploaded
        os._exit(measure(args.url, args.seconds))  # does not wait for threads
    sys.exit(main(args.seconds))
