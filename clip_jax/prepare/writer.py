"""Convert any source to ArrayRecord shards, from reading to the report, in threads or on Ray.

Each stage consists of tasks that write files atomically, as a function of options and source alone;
a task whose files exist is not repeated. So nodes, threads, retries and stops do not change the
result, and machines without Ray can share the work. If no pair depends on another, a single stage
copies those that pass. Otherwise samples are read once into the folder `work`, compared and scored
there, and gathered into shards.
"""

import csv
import dataclasses
import functools
import io
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from clip_jax.data.sources import BlockSource, SampleError, StoredSource, digest
from clip_jax.data.sources.any import open_images
from clip_jax.data.sources.shards import listed
from clip_jax.data.sources.tar_index import open_index
from clip_jax.display import say
from clip_jax.engine import Runner, runner
from clip_jax.errors import InputError, read_worker
from clip_jax.prepare import buckets, contamination, counts, near, reinforce, settle, stages
from clip_jax.prepare.filters import Filter
from clip_jax.prepare.layout import Layout, PrepareConfig
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import check_version, read_json

_VERSION = 1  # of the format of a prepared folder; see `check_version`
_INSPECTED = 1_000  # samples
_SHOWN = 5
_TEST_IMAGES = 2_000  # images of an evaluation set that one task hashes
_REPORT = ("samples", "found", "shards", *counts.COUNTED)  # keys of the report over all shards
_THREADS = 16  # for reading statistics, which is mostly waiting if files are in a bucket
_WHOLE = "_SUCCESS"  # file that marks a complete result, as in Hadoop and Spark


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write this worker's missing shards; return the report over all shards so far.

    Raises InputError for an unusable source, or a folder that was created with other settings.
    """
    if config.destination is None:
        raise InputError("prepare needs a destination: clip-jax prepare SRC DST")
    config = config.with_filter()
    folder = config.destination
    files.check_destination(folder, "DESTINATION")
    if config.drop_near_duplicates or config.decontaminate:
        near.check()
    stages.forget()
    reinforce.describe_models(config)  # before the source is read
    source = stages.open_source(config)
    per_task = config.samples_per_task if config.joins else 0
    layout = Layout(folder, len(source), per_task or config.samples_per_shard, config.shards)
    stages.opened(config, layout)
    _check_settings(folder, config, source)
    if (folder / _WHOLE).exists():
        missing = _missing(layout)
        if not missing:
            epath.Path(layout.work).rmtree(missing_ok=True)
            return read_json(folder / "report.json", *_REPORT)
        say(f"{listed(missing)} of {folder} are missing or damaged; writing them again")
        files.remove(folder / _WHOLE)
    if config.reinforce:
        say(reinforce.sizes(config, source))
    files.make_folder(layout.work if config.joins or config.decontaminate else folder)
    with runner(config.on, config.threads) as does:
        work = _Work(does, config, layout)
        if config.decontaminate:
            work.hash_evaluation_sets()
        if config.joins:
            dropped, shards = work.join()
        else:
            dropped = settle.Dropped()
            shards = work.copy()
    return _report(config, layout, dropped, shards)


class _Work:
    """Runs the stages in their order, each for its missing tasks."""

    def __init__(self, does: Runner, config: PrepareConfig, layout: Layout) -> None:
        self._does = does
        self._config = config
        self._layout = layout
        self._worker, self._workers = read_worker(config.worker)

    def copy(self) -> list[AnyPath]:
        """Run the single stage; return all shards of the result."""
        layout = self._layout
        count = layout.reads
        work = functools.partial(stages.copy, self._config, layout)
        shards = [layout.shard(number, count) for number in range(count)]
        complete = _complete(shards)
        numbers = range(self._worker, count, self._workers)
        missing = [number for number in numbers if shards[number] not in complete]
        tasks = [(number, len(layout.indices(number))) for number in missing]
        self._does.run("prepare", work, tasks, model=self._config.has_models)
        return shards

    def join(self) -> tuple[settle.Dropped, list[AnyPath]]:
        """Read, compare, score, decide, gather; return what was dropped and all shards."""
        config = self._config
        layout = self._layout
        reads = range(layout.reads)
        count = layout.join_buckets
        read = functools.partial(stages.read, config, layout)
        kinds = ["pairs", "rows", "read"]
        if config.drop_duplicates:
            kinds.append("same")
        if config.drop_near_duplicates:
            kinds.append("alike")
        self._all("read", read, reads, lambda x: [layout.file(x, kind) for kind in kinds])
        if config.drop_duplicates:
            find = functools.partial(stages.find_same, layout)
            self._all("compare", find, range(count), lambda x: [layout.joined("same", x)], size=1)
        if config.drop_near_duplicates:
            find = functools.partial(stages.find_alike, layout, config.near_distance)
            bands = range(near.BANDS * count)
            self._all("hash", find, bands, lambda x: [layout.joined("alike", x)], size=1)
        verdicts, dropped = settle.candidates(layout, config)
        if config.score_with:
            score = functools.partial(stages.score, config, layout)
            self._all("score", score, reads, lambda x: [layout.file(x, "scores")], model=True)
        verdicts = settle.settle(layout, config, verdicts)
        groups = settle.groups(layout, config, verdicts)
        shards = [
            layout.shard(number, group.count)
            for group in groups
            for number in range(group.first, group.last)
        ]
        complete = _complete(shards)
        write = functools.partial(stages.write, config, layout)
        tasks = []
        for group in groups[self._worker :: self._workers]:
            of_group = shards[group.first : group.last]
            if any(shard not in complete for shard in of_group):
                tasks.append((group, group.pairs))
        self._does.run("write", write, tasks, model=config.has_models)
        source = stages.opened(config, layout)[0]
        if config.list_dropped:
            dropped.samples = settle.listed(layout, config, verdicts, source)
        return settle.describe(dropped, verdicts, source), shards

    def hash_evaluation_sets(self) -> None:
        """Hash the images of all evaluation sets, with which each pair is compared."""
        layout = self._layout
        parts = []
        for number, source in enumerate(contamination.named(self._config.decontaminate).values()):
            images = len(open_images(source, option="--decontaminate"))
            existing = self._existing()
            tasks = []
            for start in range(0, images, _TEST_IMAGES):
                indices = range(start, min(start + _TEST_IMAGES, images))
                path = layout.work / f"set-{number}-{start}"
                parts.append((number, path))
                if path.name not in existing:
                    tasks.append(((indices, path), len(indices)))
            image_hash = functools.partial(stages.hash_evaluation_set, source)
            self._does.run("evaluation sets", image_hash, tasks)
        numbers = np.array([number for number, _ in parts], np.uint64)
        rows = [np.frombuffer(buckets.read_one(path), near.ROW) for _, path in parts]
        file = io.BytesIO()
        np.savez(
            file,
            hashes=np.concatenate([table["hash"] for table in rows]),
            indices=np.concatenate([table["index"] for table in rows]),
            sets=np.repeat(numbers, [len(table) for table in rows]),
        )
        files.write_whole(layout.evaluation, file.getvalue())

    def _all(
        self,
        name: str,
        work: Callable[..., None],
        numbers: range,
        paths: Callable[[int], list[AnyPath]],
        size: int = 0,
        model: bool = False,
    ) -> None:
        """Run all missing tasks of a stage, this worker's first: the next stage needs them all."""
        existing = self._existing()
        missing = [x for x in numbers if not existing >= {path.name for path in paths(x)}]
        turn = sorted(missing, key=lambda x: (x - self._worker) % self._workers)
        tasks = [(x, size or len(self._layout.indices(x))) for x in turn]
        self._does.run(name, work, tasks, model=model)

    def _existing(self) -> set[str]:
        return {os.path.basename(path) for path in files.walk(self._layout.work)}


def _complete(shards: Sequence[AnyPath]) -> dict[AnyPath, dict[str, Any]]:
    """Return the statistics of the shards that are complete; see `stages.read_statistics`."""
    existing = {path.name for path in shards[0].parent.iterdir()} if shards else ()
    present = [shard for shard in shards if shard.name in existing]
    with ThreadPoolExecutor(_THREADS) as threads:
        statistics = list(threads.map(stages.read_statistics, present))
    by_shard = dict(zip(present, statistics, strict=True))
    return {shard: of_shard for shard, of_shard in by_shard.items() if of_shard}


def inspect(config: PrepareConfig) -> dict[str, Any]:
    """Return the first pairs, and the statistics of up to 1,000 evenly spread ones."""
    config = config.with_filter()
    source = stages.open_source(config)
    passes = Filter(config, source)
    statistics = counts.Statistics()
    for index in np.unique(np.linspace(0, len(source) - 1, _INSPECTED).astype(int)).tolist():
        try:
            pair = passes.read(index)
            statistics.keep(pair.picture.size, len(pair.image), pair.captions)
        except SampleError as error:
            statistics.drop(source.key(index), error)
    first = []
    for index in range(min(len(source), _SHOWN)):
        try:
            pair = passes.read(index)
            size = list(pair.picture.size)
            values = {"size": size, "bytes": len(pair.image), "captions": pair.captions}
        except SampleError as error:
            values = {"dropped": str(error)}
        first.append({"key": source.key(index), **values})
    return {"samples": len(source), "first": first, **counts.merged([statistics.to_dict()])}


def index(config: PrepareConfig) -> dict[str, Any]:
    """Index this worker's share of the source's tars; write the index beside them.

    Returns the number of shards and samples, 0 as long as those of other workers are missing.
    """
    if not config.source.endswith(".tar"):
        raise InputError(f"{config.source} needs no index: only tars (data/*.tar) do; omit --index")
    worker = read_worker(config.worker)
    shards = open_index(config.source, "", config.bad_shards, worker, wait=False)
    if shards is None:
        return {"shards": 0, "samples": 0}
    return {"shards": len(shards.paths), "samples": len(shards.places)}


def describe_index(result: dict[str, Any]) -> str:
    """Format the result of `index` for people."""
    if not result["shards"]:
        return "this worker's shards are indexed; those of others are still missing"
    return f"{result['samples']:,} samples in {result['shards']:,} shards are indexed"


def describe(result: dict[str, Any]) -> str:
    """Format the result of `prepare` or `inspect` for people."""
    lines = [f"{result['samples']:,} samples"]
    lines += [json.dumps(pair, ensure_ascii=False) for pair in result.get("first", ())]
    lines.append(counts.describe(result))
    for model in result.get("models", ()):
        lines.append(f"{model['model']}: {model.get('teacher', 'writes the captions')}")
    if "shards" in result:
        lines.append("{written} of {of} shards are written".format(**result["shards"]))
    return "\n".join(lines)


def _missing(layout: Layout) -> list[str]:
    """List the files that are missing or damaged in a result that was complete."""
    path = layout.folder / "report.json"
    if not path.exists():
        return [path.name]
    advice = "Restore a copy, or delete it: the same command creates it again."
    shards = read_json(path, *_REPORT, advice=advice)["shards"]
    count = shards.get("of") if isinstance(shards, dict) else None
    if type(count) is not int or not 0 <= count <= layout.samples:
        raise InputError(f"{path} is damaged: it has {count!r:.99} shards. {advice}")
    paths = [layout.shard(number, count) for number in range(count)]
    complete = _complete(paths)
    return [shard.name for shard in paths if shard not in complete]


def _check_settings(folder: AnyPath, config: PrepareConfig, source: StoredSource) -> None:
    """Raise InputError if the folder was created with other settings, samples or models."""
    fields = dataclasses.asdict(config) | {"score_with": config.score_with or ""}
    for name in ("destination", "on", "inspect", "index", "worker", "threads"):
        del fields[name]
    settings = json.loads(json.dumps(fields, default=str))
    settings["samples"] = len(source)
    settings["digest"] = digest(source, blocks=isinstance(source, BlockSource))
    settings["models"] = [model["digest"] for model in reinforce.describe_models(config)]
    path = folder / "prepare.json"
    content = read_json(path)
    check_version(content, _VERSION, path)
    before = {name: value for name, value in content.items() if name in settings}
    # Older files lack the digest, the towers of teachers, and the options of models.
    default = {"digest": settings["digest"], "reinforce_towers": ["image", "text"]}
    default = default if config.has_models else settings
    earlier = default | before
    if before and earlier != settings:
        differ = ", ".join(name for name in settings if earlier.get(name) != settings[name])
        raise InputError(
            f"{folder} was created with other settings: {differ} (digest: the names or order of "
            f"samples; models: the weights). Use those in {path} to continue, or choose another "
            "destination"
        )
    if before != settings:
        files.write_whole(path, json.dumps(settings, indent=1))


def _list(path: AnyPath, statistics: Sequence[dict[str, Any]], dropped: settle.Dropped) -> None:
    """Write the key and the reason of all dropped samples."""
    with (
        files.written_whole(path) as partial,
        partial.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("key", "reason"))
        for of_task in statistics:
            writer.writerows(of_task.get("dropped", ()))
        writer.writerows(dropped.samples)


def _report(
    config: PrepareConfig, layout: Layout, dropped: settle.Dropped, shards: Sequence[AnyPath]
) -> dict[str, Any]:
    """Write the report over all processes; if no shard is missing, mark it as complete."""
    folder = layout.folder
    done = _complete(shards)
    statistics = list(done.values())
    for number in range(layout.reads if config.joins else 0):
        path = layout.file(number, "read")
        statistics.append(read_json(path, *counts.COUNTED, advice=buckets.ADVICE))
    statistics.append({"counts": dropped.counts, "examples": dropped.examples})
    total = counts.merged(statistics)
    for name, source in contamination.named(config.decontaminate).items():
        matches = total["found"].setdefault(name, {"pairs": 0, "images": 0})
        matches["of"] = len(open_images(source, option="--decontaminate"))
    result = {
        "samples": layout.samples,
        "shards": {"written": len(done), "of": len(shards)},
        **total,
        "models": reinforce.describe_models(config),
    }
    files.write_whole(folder / "report.json", json.dumps(result, indent=1))
    if config.list_dropped:
        _list(folder / "dropped.csv", statistics, dropped)
    if len(done) == len(shards):
        files.write_whole(folder / _WHOLE, "")
        epath.Path(layout.work).rmtree(missing_ok=True)
    return result
