"""The index of tars: the number of samples in each shard, their blocks and their offsets.

One file contains the counts and blocks of all shards, which a source keeps in memory. A folder of
the same name has a file with the rows of each shard, read when a row is needed. It is written as
soon as the shard is indexed, so that processes share the work and a kill loses only unfinished
shards.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from clip_jax.clock import CLOCK
from clip_jax.data.sources.shards import BadShards, Places, settle, warn_once
from clip_jax.data.sources.tar_members import IMAGES, MORE, TEXTS, members, samples
from clip_jax.errors import InputError
from clip_jax.storage import files

_log = logging.getLogger(__name__)

_THREADS = 16  # for reading headers, which is mostly waiting
_THREADS_REMOTE = 64
_AT_ONCE = 1 << 16  # bytes read for a header: as many as the operating system reads anyway
_AT_ONCE_REMOTE = 1 << 12  # a header, a caption and the next header
_BLOCK_BYTES = 1 << 22  # approximate bytes: transfer takes 30 ms, about as long as the latency
_OPEN = 256  # shards whose rows are cached, or mapped
_LOOK = 2.0  # seconds between checks for other processes' files
_REPORT = 60.0  # seconds between messages about waiting
_SCHEMA = pa.schema(
    [("key", pa.binary())]
    + [(f"{name}_{what}", pa.int64()) for name in ("image", *TEXTS) for what in ("offset", "size")]
)
# A reinforced shard's samples are read whole, and split by their headers.
_REINFORCED = pa.schema([*_SCHEMA, ("start", pa.int64()), ("end", pa.int64())])
_ENDINGS = {
    b"endings": " ".join((*IMAGES, *TEXTS, *MORE)).encode()
}  # with others, the index is rebuilt
_SHARDS = pa.schema(
    {
        "shard": pa.string(),
        "size": pa.int64(),
        "time": pa.float64(),
        "edges": pa.list_(pa.int64()),
        "counts": pa.list_(pa.int32()),
        "ignored": pa.string(),
        "failure": pa.string(),
    },
    _ENDINGS,
)


@dataclass(frozen=True)
class Shard:
    """The entry of one tar in the index."""

    path: str
    stat: tuple[int, float]  # size in bytes and time of the last change
    edges: Sequence[int] | np.ndarray  # offsets at which its blocks begin, and the last one ends
    counts: Sequence[int] | np.ndarray  # samples of each block
    ignored: str = ""  # JSON: the number of ignored members, and one of them
    failure: str = ""  # why it cannot be used


class TarIndex:
    """All usable shards: their blocks in memory, their rows on demand."""

    def __init__(self, shards: Sequence[tuple[Shard, str]]) -> None:
        """`shards` are entries with the path of their rows."""
        self.paths = [shard.path for shard, _ in shards]
        rows = [file for _, file in shards]
        self.places = Places(sum(shard.counts) for shard, _ in shards)
        none = np.zeros(0, np.int64)
        counts = [np.array(shard.counts, np.int64) for shard, _ in shards]
        edges = [np.array(shard.edges, np.int64) for shard, _ in shards]
        self.counts = np.concatenate([none, *counts])
        self._begins = np.concatenate([none, *(of_shard[:-1] for of_shard in edges)])
        self._ends = np.concatenate([none, *(of_shard[1:] for of_shard in edges)])
        self._shard = np.repeat(np.arange(len(shards)), [len(of_shard) - 1 for of_shard in edges])
        self._firsts = np.cumsum(self.counts) - self.counts
        lengths = self._ends - self._begins
        self._before = tuple(np.cumsum([0.0, *sizes]) for sizes in (self.counts, lengths))
        # Raises OSError, or ArrowInvalid for a foreign file.
        self.rows = functools.lru_cache(maxsize=_OPEN)(lambda i: _reader(rows[i]).get_batch(0))

    def block(self, record: int) -> tuple[int, int, int, int, int]:
        """Return a record's block: shard, first byte, end, first record, the one after the last."""
        at = int(np.searchsorted(self._firsts, record, side="right")) - 1
        first = int(self._firsts[at])
        edges = int(self._begins[at]), int(self._ends[at])
        return int(self._shard[at]), *edges, first, first + int(self.counts[at])

    def size(self, first: int, last: int) -> int:
        """Estimate the bytes of these records."""
        records, size = self._before
        return int(np.diff(np.interp([first, last], records, size))[0])


# ------------------------------------------------------------------------------------ building


def open_index(
    path: str,
    folder: str,
    bad_shards: BadShards,
    process: tuple[int, int] = (0, 1),
    wait: bool = True,
) -> TarIndex | None:
    """Open the index of the shards that match `path`, after indexing the missing ones.

    An empty `folder` means that of the first shard. In a bucket this process indexes its share;
    then it waits for the others, or without `wait` returns None if shards are still missing.
    Raises InputError for bad shards.
    """
    shards = files.expand(path)
    digest = hashlib.sha256("\n".join(shards).encode()).hexdigest()[:12]
    folder = os.path.expanduser(folder or shards[0].rpartition("/")[0] or ".")
    name = f"{folder}/clip_jax_index_{digest}"
    stats = files.stats(shards)
    missing = [shard for shard, stat in zip(shards, stats, strict=True) if stat is None]
    settle(path, missing, "missing", bad_shards)
    present = [(s, stat) for s, stat in zip(shards, stats, strict=True) if stat is not None]
    entries = read_summary(f"{name}.arrow")
    good = [(entry.path, entry.stat) for entry in entries if not entry.failure]
    if good != present:
        try:
            files.make_folder(name)
            indexed = {(entry.path, entry.stat): entry for entry in entries}
            shared = files.is_remote(name)
            entries = _complete(name, present, indexed, process if shared else (0, 1), wait)
        except OSError as error:
            raise InputError(
                f"the index of {path} cannot be written to {name}: {error}; set "
                "index to a writable folder"
            ) from error
        if entries is None:
            return None
    bad = [f"{entry.path} ({entry.failure})" for entry in entries if entry.failure]
    settle(path, bad, "unusable", bad_shards)
    _say_ignored(entries)
    files_of_rows = [(entry, _rows_file(name, i)) for i, entry in enumerate(entries)]
    return TarIndex([(entry, file) for entry, file in files_of_rows if not entry.failure])


def _rows_file(name: str, number: int) -> str:
    return f"{name}/{number:05d}.arrow"


def _complete(
    name: str,
    present: list[tuple[str, tuple[int, float]]],
    indexed_before: dict[Any, Shard],
    process: tuple[int, int],
    wait: bool,
) -> list[Shard] | None:
    """Index this process's shards, wait for the others, and write the summary of all."""
    indexed: dict[int, Shard] = {}
    written = {os.path.basename(path) for path in files.walk(name)}

    def entry_of(number: int) -> Shard:
        shard, stat = present[number]
        file = _rows_file(name, number)
        exists = os.path.basename(file) in written
        before = indexed_before.get((shard, stat))
        if exists and before is not None and not before.failure:
            return before
        entry = read_shard(file) if exists else None
        if entry is None or (entry.path, entry.stat) != (shard, stat) or entry.failure:
            entry = _index_and_write(shard, stat, file)
        return entry

    numbers = range(process[0], len(present), process[1])
    threads = _THREADS_REMOTE if files.is_remote(name) else _THREADS
    with ThreadPoolExecutor(threads) as pool:
        indexed.update(zip(numbers, pool.map(entry_of, numbers), strict=True))
        reported = CLOCK.now()
        while len(indexed) < len(present):
            rest = [number for number in range(len(present)) if number not in indexed]
            written = {os.path.basename(path) for path in files.walk(name)}
            others = [n for n in rest if os.path.basename(_rows_file(name, n)) in written]
            read = pool.map(read_shard, [_rows_file(name, n) for n in others])
            indexed |= {
                number: shard
                for number, shard in zip(others, read, strict=True)
                if shard is not None and (shard.path, shard.stat) == present[number]
            }
            if len(indexed) == len(present):
                break
            if not wait:
                return None
            if CLOCK.now() > reported + _REPORT:
                reported = CLOCK.now()
                _log.warning("waiting for %d shards of other workers", len(present) - len(indexed))
            CLOCK.sleep(_LOOK)
    entries = [indexed[number] for number in range(len(present))]
    if process[0] == 0 or not wait:
        write_summary(f"{name}.arrow", entries)
    return entries


def _index_and_write(path: str, stat: tuple[int, float], file: str) -> Shard:
    try:
        rows, facts = index_shard(path, stat[0])
        shard = Shard(path, stat, **facts)
    except (InputError, OSError) as error:
        shard = Shard(path, stat, [0], [], "", str(error))
        rows = pa.RecordBatch.from_pydict({name: [] for name in _SCHEMA.names}, schema=_SCHEMA)
    write_rows(file, shard, rows)
    return shard


def write_rows(file: str, shard: Shard, rows: pa.RecordBatch) -> None:
    """Write the rows of one shard, with its entry as their metadata."""
    fields = shard.__dict__ | {"edges": list(shard.edges), "counts": list(shard.counts)}
    metadata = {b"shard": json.dumps(fields).encode()} | _ENDINGS
    _write(file, rows.replace_schema_metadata(metadata))


def _write(file: str, batch: pa.RecordBatch) -> None:
    with pa.BufferOutputStream() as out:
        with pa.ipc.new_file(out, batch.schema) as writer:
            writer.write_batch(batch)
        content = out.getvalue()
    files.write_whole(file, lambda target: target.write(content))


def read_shard(file: str) -> Shard | None:
    """Read a shard's entry from the file of its rows; None if it is missing or incomplete."""
    try:
        reader = _reader(file)
        metadata = reader.schema.metadata
        content = json.loads(metadata[b"shard"])
        if not (reader.schema in (_SCHEMA, _REINFORCED) and _ENDINGS.items() <= metadata.items()):
            return None
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None
    return Shard(**content | {"stat": tuple(content["stat"])})


def _reader(file: str) -> Any:
    """Open a file with Arrow, memory-mapped if it is on a disk."""
    if files.is_remote(file):
        return pa.ipc.open_file(pa.py_buffer(files.read(file)))
    files.check_kind(file)
    return pa.ipc.open_file(pa.memory_map(file))


def write_summary(path: str, shards: Sequence[Shard]) -> None:
    """Write the entries of all shards."""
    rows = []
    for shard in shards:
        size, time = shard.stat
        rows.append(
            {
                "shard": shard.path,
                "size": size,
                "time": time,
                "edges": list(shard.edges),
                "counts": list(shard.counts),
                "ignored": shard.ignored,
                "failure": shard.failure,
            }
        )
    _write(path, pa.RecordBatch.from_pylist(rows, schema=_SHARDS))


def read_summary(path: str) -> list[Shard]:
    """Read the entries that `write_summary` wrote; empty if they are missing or incomplete."""
    try:
        reader = _reader(path)
        if not reader.schema.equals(_SHARDS, check_metadata=True):
            return []
        batch = reader.get_batch(0)
    except (OSError, pa.ArrowInvalid):
        return []
    columns = (
        batch["shard"].to_pylist(),
        zip(batch["size"].to_pylist(), batch["time"].to_pylist(), strict=True),
        _lists(batch["edges"]),
        _lists(batch["counts"]),
        batch["ignored"].to_pylist(),
        batch["failure"].to_pylist(),
    )
    return [Shard(*row) for row in zip(*columns, strict=True)]


def _lists(column: Any) -> list[np.ndarray]:
    """Return the arrays of a column of lists, which share its memory."""
    offsets = column.offsets.to_pylist()
    values = column.values.to_numpy()
    return [values[a:b] for a, b in itertools.pairwise(offsets)]


def _say_ignored(shards: Sequence[Shard]) -> None:
    """Warn about members that are never read."""
    notes = [json.loads(shard.ignored) for shard in shards if shard.ignored]
    if notes:
        warn_once(
            f"{sum(count for count, _ in notes):,} members of {len(notes):,} shards, such as "
            f"{notes[0][1]}, are ignored: after the first dot, a name must have one of "
            f"{', '.join((*IMAGES, *TEXTS, *MORE))}. Of a sample's images, the first in this list "
            "is used"
        )


# ----------------------------------------------------------------------------------- one shard


def index_shard(shard: str, size: int) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """Index one tar: return its samples, and the fields of its `Shard`.

    Raises InputError, with the reason and the offset, if it cannot be used.
    """
    columns: dict[str, list[Any]] = {name: [] for name in _REINFORCED.names}
    ignored: list[bytes] = []
    schema = _SCHEMA

    def read(at: int, count: int) -> bytes:
        return files.read_ranges(shard, [(at, min(count, size - at))])[0] if at < size else b""

    if str(shard).endswith((".gz", ".tgz")) or read(0, 2) == b"\x1f\x8b":
        raise InputError(
            "is compressed with gzip, which has no random access; gunzip it (gzip hardly "
            "shrinks JPEGs anyway)"
        )
    at_once = _AT_ONCE_REMOTE if files.is_remote(shard) else _AT_ONCE
    for sample in samples(members(read, 0, size + 1, size, at_once), ignored):
        columns["key"].append(sample.key)
        for kind in ("image", *TEXTS):
            offset, length = sample.spans.get(kind, (None, None))
            columns[f"{kind}_offset"].append(offset)
            columns[f"{kind}_size"].append(length)
        columns["start"].append(sample.start)
        columns["end"].append(sample.end)
        schema = _REINFORCED if sample.spans.keys() & MORE[:2] else schema
    expected = _expected(shard)
    if expected is not None and (count := len(columns["start"])) != expected:
        raise InputError(f"has {count} samples, but img2dataset counted {expected}")
    facts: dict[str, Any] = _blocks([*columns["start"], *columns["end"][-1:]] or [0])
    if ignored:
        facts["ignored"] = json.dumps([len(ignored), ignored[0].decode(errors="replace")])
    return pa.RecordBatch.from_pydict(columns, schema=schema), facts


def _blocks(edges: list[int]) -> dict[str, list[int]]:
    """Cut a shard between samples into roughly equal blocks of about 4 MiB."""
    places = np.array(edges)
    parts = max(1, round((edges[-1] - edges[0]) / _BLOCK_BYTES))
    marks = edges[0] + np.arange(1, parts) * (edges[-1] - edges[0]) / parts
    cuts = np.unique([0, *np.searchsorted(places, marks), len(edges) - 1])
    return {"edges": places[cuts].tolist(), "counts": np.diff(cuts).tolist()}


def _expected(shard: str) -> int | None:
    """Return how many samples img2dataset wrote, by a file beside the tar, if there is one."""
    stem = str(shard).removesuffix(".tar")
    try:
        with files.open_file(f"{stem}_stats.json") as file:
            return int(json.load(file)["successes"])
    except FileNotFoundError:
        pass
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{PurePosixPath(stem).name}_stats.json is not img2dataset's") from error
    try:
        import pyarrow.parquet

        with files.open_file(f"{stem}.parquet") as file:
            status = pyarrow.parquet.read_table(file, columns=["status"])["status"].to_pylist()
    except (FileNotFoundError, pa.ArrowInvalid):  # no such file, or a foreign one without `status`
        return None
    return status.count("success") if status else None
