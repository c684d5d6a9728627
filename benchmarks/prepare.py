"""Time `clip-jax prepare` on generated pairs, on this machine or on Ray, and measure its memory.

    PYTHONPATH=. python benchmarks/prepare.py make FOLDER 1000000 48
    PYTHONPATH=. python benchmarks/prepare.py run FOLDER OUT --drop-duplicates --shuffle --threads 2
    PYTHONPATH=. python benchmarks/prepare.py run FOLDER OUT --drop-duplicates --shuffle --on ray

- make: Write tars with the given number of pairs, whose images have the given side in pixels. Every
  tenth image repeats an earlier one. Beside each tar is a Parquet file as img2dataset writes it,
  with a column `similarity`.
- run: Prepare them, with any options of `clip-jax prepare`, and print the seconds of each stage,
  the peak memory, the counts, and a digest of the shards.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
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
    """Return smooth noise as JPEG files. A comment in a file makes copies with other bytes."""
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
    """Return the ids of a process and all its descendants."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    pids = [of]
    for pid in pids:
        pids += [child for child, parent in parents.items() if parent == pid]
    return pids


def watch(most: list[float], stop: threading.Event) -> None:
    """Record the peak memory (proportional set size) of this process, and with its descendants."""
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    making, running = verbs.add_parser("make"), verbs.add_parser("run")
    making.add_argument("folder", type=Path, help="folder for the tars")
    making.add_argument("count", type=int, help="number of pairs")
    making.add_argument("side", type=int, help="side of an image in pixels")
    running.add_argument("folder", help="folder of the tars")
    running.add_argument("output", help="folder for the shards")
    args, options = parser.parse_known_args()
    if args.verb == "make":
        make(args.folder, args.count, args.side)
    else:
        run([args.folder, args.output, *options])
