"""Prepare generated pairs, here and on Ray: seconds of each stage, memory, and what came out.

    python benchmarks/prepare.py make FOLDER 1000000 48    # pairs, pixels of a side
    python benchmarks/prepare.py run FOLDER OUT --drop-duplicates --shuffle --threads 2
    python benchmarks/prepare.py run FOLDER OUT --drop-duplicates --shuffle --on ray

Every tenth image is an earlier one again; beside the tars lie img2dataset's Parquet files with a
column `similarity`.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clip_jax import engine
from clip_jax.cli import arguments, commands
from clip_jax.prepare import writer
from clip_jax.prepare.layout import PrepareConfig

SHARD, DISTINCT = 10_000, 2_000


def pictures(side: int) -> list[bytes]:
    """Smooth noise as JPEG; a comment makes as many of each as one likes, with the same pixels."""
    rng, files = np.random.default_rng(0), []
    for _ in range(DISTINCT):
        noise = Image.fromarray(rng.integers(0, 256, (33, 33, 3), np.uint8))
        file = io.BytesIO()
        noise.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def make(folder: Path, count: int, side: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images, rng = pictures(side), np.random.default_rng(1)
    for start in range(0, count, SHARD):
        name, keys = f"{start // SHARD:05d}", range(start, min(start + SHARD, count))
        with (folder / f"{name}.tar").open("wb") as file:
            for key in keys:
                original = int(rng.integers(key)) if key % 10 == 9 else key
                image = images[original % DISTINCT]
                image = image[:2] + b"\xff\xfe\x00\x0a" + original.to_bytes(8) + image[2:]
                for suffix, content in (("jpg", image), ("txt", b"a picture, number %d" % key)):
                    member = tarfile.TarInfo(f"{key:09d}.{suffix}")
                    member.size = len(content)
                    file.write(member.tobuf(tarfile.USTAR_FORMAT))
                    file.write(content + bytes(-len(content) % 512))
            file.write(bytes(1024))
        scores = rng.standard_normal(len(keys))
        table = {"key": [f"{key:09d}" for key in keys], "similarity": scores}
        pq.write_table(pa.table(table), folder / f"{name}.parquet")


def processes(of: int) -> list[int]:
    """This process and all that came from it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    pids = [of]
    for pid in pids:
        pids += [child for child, parent in parents.items() if parent == pid]
    return pids


def watch(most: list[float], stop: threading.Event) -> None:
    """Keep the largest sums of memory: proportional set sizes, of this process and of its own."""
    while not stop.wait(0.5):
        own, total = 0.0, 0.0
        for pid in processes(os.getpid()):
            with contextlib.suppress(OSError, IndexError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                size = int(rollup.partition("\nPss:")[2].split()[0]) / 2**20
                total += size
                own = size if pid == os.getpid() else own
        most[:] = [max(most[0], own), max(most[1], total)]


def run(arguments_given: list[str]) -> None:
    folder, *rest = arguments_given
    config, _ = arguments.read(
        PrepareConfig, [f"{folder}/*.tar", *rest], ("source", "destination"), commands.prepare
    )
    assert isinstance(config, PrepareConfig)
    assert config.destination is not None
    for kind in (engine.Here, engine.OnRay):
        timed(kind)
    most, stop = [0.0, 0.0], threading.Event()
    threading.Thread(target=watch, args=(most, stop)).start()
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        result = writer.prepare(config)
    seconds = time.perf_counter() - start
    stop.set()
    digest = hashlib.sha256()
    for path in sorted(Path(config.destination).glob("*.array_record")):
        digest.update(path.read_bytes())
    print(f"all {seconds:.1f} s, {result['samples'] / seconds:,.0f} pairs/s")
    print(f"memory: {most[0]:.2f} GiB this process, {most[1]:.2f} GiB with its workers")
    print(json.dumps(result["counts"]), digest.hexdigest()[:16])


def timed(kind: type) -> None:
    """Print how long each stage takes."""
    original = kind.run

    def run(self, name, work, some, *, model=False):
        start, busy = time.perf_counter(), time.process_time()
        original(self, name, work, some, model=model)
        wall, own = time.perf_counter() - start, time.process_time() - busy
        print(f"{name:>16} {wall:7.1f} s, {own:7.1f} core-s here, {len(some)} tasks", flush=True)

    kind.run = run


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        run(sys.argv[2:])
