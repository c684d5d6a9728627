"""Measure input pipelines that read the same JPEG files from a bucket: clip_jax and open_clip.

    PYTHONPATH=. python benchmarks/bucket.py FOLDER [--latency 0.03] [--only NAME ...]

FOLDER receives the photographs of `input.py`. The bucket is a fake-gcs-server behind a proxy that
delays each response by `--latency` seconds. Server and proxy run on one core. The pipelines run on
the other, also when they read from disk, so all rates are rates of one core. open_clip reads
through `curl`, by its own WebDataset pipe.

Each run is a process of its own and is warmed up before it is timed. The runs alternate, `--rounds`
times each, and the medians are printed. Requests and bytes are counted by the pipeline over the
timed batches.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from input import (  # noqa: E402
    BATCH,
    SHARDS,
    SIZE,
    cpu_seconds,
    open_clip_batches,
    write_photographs,
)

from clip_jax.storage import files  # noqa: E402
from tests.contract.servers import Server  # noqa: E402

WARM, TIMED = 12, 39  # batches: half an epoch and two
RUNS: dict[str, dict[str, Any]] = {
    "disk": {"where": "disk"},
    "disk, blocks": {"where": "disk", "order": "blocks"},
    "disk, 2 workers": {"where": "disk", "workers": 2, "threads": 2},
    "disk, 3 workers": {"where": "disk", "workers": 3, "threads": 1},
    "bucket": {"where": "bucket"},
    "bucket, 2 workers": {"where": "bucket", "workers": 2, "threads": 2},
    "bucket, 3 workers": {"where": "bucket", "workers": 3, "threads": 1},
    "bucket, mixture": {"where": "bucket", "mixture": True},
    "bucket, global": {"where": "bucket", "order": "global", "threads": 16},
    "open_clip, disk": {"who": "open_clip", "where": "disk", "workers": 2},
    "open_clip, bucket": {"who": "open_clip", "where": "bucket", "workers": 2},
}


def ours(tars: str, run: dict[str, Any], part: tuple[int, int]):
    from clip_jax.data.batch_plan import constant
    from clip_jax.data.order.mixture import MemberConfig, MixtureConfig
    from clip_jax.data.pipeline import DataConfig, build
    from clip_jax.data.sources.tar import TarConfig
    from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer
    from clip_jax.models.images import Square

    def shards(first: int, last: int) -> TarConfig:
        return TarConfig(path=f"{tars}/{{{first:05d}..{last:05d}}}.tar")

    source = shards(0, SHARDS - 1)
    if run.get("mixture"):
        members = (shards(0, 9), 2.0), (shards(10, SHARDS - 1), 1.0)
        source = MixtureConfig(
            members=tuple(MemberConfig(source=tars, weight=weight) for tars, weight in members)
        )
    config = DataConfig(
        source=source,
        crop_scale=(0.9, 1.0),
        workers=run.get("workers", 0),
        threads=run.get("threads", 3),
        order=run.get("order", "auto"),
    )
    plan = constant(BATCH, Square(SIZE))
    pipeline = build(config, plan, tokenizer=ClipTokenizer(), context_length=77, process=part)
    for batch in pipeline.batches():
        assert batch.image.shape == (BATCH // part[1], SIZE, SIZE, 3)
        yield batch.reading


def measure(tars: str, run: dict[str, Any], part: tuple[int, int]) -> dict[str, float]:
    """Return the rates of the timed batches, measured in this process."""
    peer = run.get("who") == "open_clip"
    batches = open_clip_batches(tars, run["workers"]) if peer else ours(tars, run, part)
    for _ in range(WARM):
        next(batches)
    start, start_cpu = time.perf_counter(), cpu_seconds()
    readings = [next(batches) for _ in range(TIMED)]
    seconds = time.perf_counter() - start
    count = TIMED * BATCH // part[1]
    results = {
        "samples_per_second": count / seconds,
        "cpu_milliseconds_per_sample": (cpu_seconds() - start_cpu) * 1000 / count,
    }
    if not peer and run["where"] == "bucket":
        total = sum(readings[1:], readings[0])
        results["samples_per_request"] = count / max(total.requests, 1)
        results["bytes_read_per_byte_used"] = total.bytes_read / max(total.bytes_used, 1)
    return results


def start(tars: str, run: dict[str, Any], part: tuple[int, int]) -> subprocess.Popen:
    command = ["taskset", "-c", "1", sys.executable, "-W", "ignore", __file__, tars]
    command += ["--one", json.dumps([run, part])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen) -> dict[str, float]:
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(out.splitlines()[-1])


def take(places: dict[str, str], run: dict[str, Any], processes: int) -> dict[str, float]:
    where = "peer" if run.get("who") == "open_clip" and run["where"] == "bucket" else run["where"]
    started = [start(places[where], run, (i, processes)) for i in range(processes)]
    results = [result(process) for process in started]
    return {
        name: sum(one[name] for one in results) / (1 if name == "samples_per_second" else processes)
        for name in results[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="folder for the photographs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument(
        "--latency", type=float, default=0.03, help="delay of each response in seconds"
    )
    parser.add_argument(
        "--rate", type=float, default=0.0, help="bandwidth in bytes/s (0: no limit)"
    )
    parser.add_argument(
        "--faults",
        default="{}",
        help='shares of faulty responses as JSON: {"503": 0.05, "hang": 0.01}',
    )
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="runs to measure")
    parser.add_argument("--processes", type=int, default=1, help="processes that share a batch")
    parser.add_argument("--rounds", type=int, default=3, help="times to repeat each run")
    arguments = parser.parse_args()
    if arguments.one:
        run, part = json.loads(arguments.one)
        print(json.dumps(measure(arguments.folder, run, tuple(part))), flush=True)
        os._exit(0)  # without waiting for what is read ahead
    folder = Path(arguments.folder).absolute()
    write_photographs(folder)
    with Server("gs", cpu=0) as server:
        os.environ.update(server.environment())
        url = server.make_bucket("photographs")
        for path in sorted(folder.glob("*.tar")):
            files.write_whole(f"{url}/{path.name}", path.read_bytes())
        media = f"{server.address}/{url.removeprefix('gs://')}"
        places = {"disk": str(folder), "bucket": url, "peer": media}
        server.behave(
            latency=arguments.latency,
            bytes_per_second=arguments.rate,
            faults=json.loads(arguments.faults),
            only="GET",
        )
        results: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.only}
        for _ in range(arguments.rounds):
            for name in arguments.only:
                results[name].append(take(places, RUNS[name], arguments.processes))
                print(name, results[name][-1], file=sys.stderr, flush=True)
    names = list(dict.fromkeys(key for runs in results.values() for key in runs[0]))
    print(f"| {arguments.latency * 1000:.0f} ms | {' | '.join(names)} |")
    print("|---|" + "---|" * len(names))
    for name, runs in results.items():
        values = [
            statistics.median(run[key] for run in runs) if key in runs[0] else None for key in names
        ]
        print(f"| {name} | {' | '.join('' if v is None else f'{v:,.2f}' for v in values)} |")


if __name__ == "__main__":
    main()
