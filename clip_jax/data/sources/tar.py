"""WebDataset tars with random access, by an index of where each member lies.

The index (tar_index.py) is built once, in parallel, and kept beside the shards or in a folder of
your choice; a shard that changes is read anew.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int64

from clip_jax.data.sources import Record, SampleError, caption_of, captions_of, scores
from clip_jax.data.sources.shards import BadShards, listed
from clip_jax.data.sources.tar_index import TarIndex, open_index
from clip_jax.data.sources.tar_members import IMAGES, TEXTS, members, samples
from clip_jax.errors import InputError
from clip_jax.storage import files


@dataclass(frozen=True, kw_only=True)
class TarConfig:
    """WebDataset tars: members 000.jpg and 000.txt (or .json, .cls) make a pair."""

    path: str  # of the shards: data/{00000..00041}.tar, data/*.tar, gs://bucket/*.tar
    caption: Literal["txt", "json", "cls"] = "txt"  # extension of the member with the text
    caption_key: str = "caption"  # of a .json
    class_names: str = ""  # file with one class name a line, for .cls; empty: the number itself
    index: str = ""  # folder for the index; empty: where the first shard is
    bad_shards: BadShards = "error"  # missing, truncated or damaged ones


class TarSource:
    """All pairs of all shards, in the order of the pattern. Raises InputError for shards not
    usable."""

    def __init__(self, config: TarConfig, process: tuple[int, int] = (0, 1)) -> None:
        """`process` is which of several processes' this is: they share the index's building."""
        self._caption, self._caption_key = config.caption, config.caption_key
        self._classes = _class_names(config.class_names)
        index = open_index(config.path, config.index, config.bad_shards, process)
        assert index is not None  # it waits for the others
        self._index: TarIndex = index
        if not len(self):
            raise InputError(
                f"no samples in {listed(index.paths)}; data.source.path needs tars with "
                f"images ({', '.join(IMAGES)}) and texts ({', '.join(TEXTS)})"
            )

    def __len__(self) -> int:
        return len(self._index.places)

    def _find(self, index: int) -> tuple[str, pa.RecordBatch, int]:
        shard, row = self._index.places.find(index)
        try:
            return self._index.paths[shard], self._index.rows(shard), row
        except (OSError, pa.ArrowInvalid) as error:
            raise SampleError(f"index of the shard: {error}") from error

    def shards(self) -> list[tuple[str, int]]:
        """Paths of the shards, and how many samples each has."""
        return list(zip(self._index.paths, map(int, self._index.places.sizes), strict=True))

    def key(self, index: int) -> str:
        """Shard and the members' common name."""
        shard, rows, row = self._find(index)
        return f"{shard}:{rows['key'][row].as_py().decode(errors='replace')}"

    def load(self, index: int, rng: np.random.Generator) -> tuple[bytes, str]:
        """Get the image member's bytes and the text; a list of texts in a .json draws one."""
        image, text = self._read(index, "image", self._caption)
        return image, caption_of(self._value(text), rng)

    def image(self, index: int) -> bytes:
        """Get the image member's bytes."""
        return self._read(index, "image")[0]

    def captions(self, index: int) -> list[str]:
        """Get the text, or all texts of a list in a .json."""
        return captions_of(self._value(self._read(index, self._caption)[0]))

    def blocks(self) -> Int64[np.ndarray, " blocks"]:
        """Samples of each block: some MiB of a shard, from the first header to the last byte."""
        return self._index.counts

    def size(self, first: int, last: int) -> int:
        """Bytes of the shards in which these lie, headers included."""
        return self._index.bytes_before(last) - self._index.bytes_before(first)

    def fetch(self, first: int, last: int) -> list[Record | SampleError]:
        """Read samples of one block by one request, and take them apart by their headers.

        Of a part of a block the rows say where it lies.
        """
        shard, begin, end, *whole = self._index.block(first)
        path = self._index.paths[shard]
        if [first, last] == whole:
            samples = self._in_block(path, begin, end)
        else:
            samples = self._in_rows(path, first, last)
        if len(samples) != last - first:
            raise SampleError(f"shard changed: other members at byte {begin}")
        return [
            Record(
                f"{path}:{key.decode(errors='replace')}",
                sum(map(len, parts.values())),
                functools.partial(self._pair, parts),
                functools.partial(self._whole, parts),
            )
            for key, parts in samples
        ]

    def _in_block(self, path: str, begin: int, end: int) -> "list[_Parts]":
        (data,) = _read(path, [(begin, end - begin)])
        read = functools.partial(_slice, data, begin)
        try:
            inside = list(samples(members(read, begin, end, end + 1, len(data))))
        except InputError as error:
            raise SampleError(f"shard changed: {error}") from error
        wanted = ("image", self._caption)
        return [
            (one.key, {k: read(*one.places[k]) for k in wanted if k in one.places})
            for one in inside
        ]

    def _in_rows(self, path: str, first: int, last: int) -> "list[_Parts]":
        _, rows, row = self._find(first)
        names = ("image", self._caption)
        inside = rows.slice(row, last - first).to_pydict()
        places = [
            {n: (inside[f"{n}_offset"][i], inside[f"{n}_size"][i]) for n in names
             if inside[f"{n}_offset"][i] is not None}
            for i in range(last - first)
        ]  # fmt: skip
        edges = [(at, at + size) for one in places for at, size in one.values()]
        begin = min((at for at, _ in edges), default=0)
        end = max((at for _, at in edges), default=0)
        (data,) = _read(path, [(begin, end - begin)])
        read = functools.partial(_slice, data, begin)
        return [
            (key, {name: read(*place) for name, place in one.items()})
            for key, one in zip(inside["key"], places, strict=True)
        ]

    def _pair(self, parts: dict[str, bytes], rng: np.random.Generator) -> tuple[bytes, str]:
        self._check_parts(parts, "image", self._caption)
        return parts["image"], caption_of(self._value(parts[self._caption]), rng)

    def _whole(self, parts: dict[str, bytes]) -> tuple[bytes, list[str]]:
        self._check_parts(parts, self._caption)
        captions = captions_of(self._value(parts[self._caption]))
        self._check_parts(parts, "image")
        return parts["image"], captions

    def _check_parts(self, parts: dict[str, bytes], *names: str) -> None:
        for name in names:
            if name not in parts:
                raise _no_member(name)

    def scores(self, column: str) -> Float64[np.ndarray, " N"]:
        """Get a column of img2dataset's Parquet files beside the shards, by the members' keys."""
        columns = []
        for number, shard in enumerate(self._index.paths):
            rows = self._index.rows(number)
            paths = (key.decode(errors="replace") for key in rows["key"].to_pylist())
            keys = [path.rpartition("/")[2] for path in paths]
            columns.append(scores.beside_tar(shard, keys, column))
        return np.concatenate(columns)

    def _read(self, index: int, *names: str) -> list[bytes]:
        shard, rows, row = self._find(index)
        wanted = []
        for name in names:
            offset = rows[f"{name}_offset"][row].as_py()
            if offset is None:
                raise _no_member(name)
            wanted.append((offset, rows[f"{name}_size"][row].as_py()))
        return _read(shard, wanted)

    def _value(self, member: bytes) -> Any:
        """What `caption_of` takes."""
        if self._caption == "txt":
            return member
        if self._caption == "json":
            try:
                fields = json.loads(member)
            except (ValueError, RecursionError) as error:
                raise SampleError(f".json is not JSON in UTF-8: {error}") from error
            if not isinstance(fields, dict):
                raise SampleError(f".json is a {type(fields).__name__}, not an object")
            return fields.get(self._caption_key)
        label = captions_of(member)[0].strip()
        if not self._classes:
            return label
        if not (label.isascii() and label.isdigit() and int(label) < len(self._classes)):
            raise SampleError(f".cls is {label!r:.40}, not a number below {len(self._classes)}")
        return self._classes[int(label)]


_Parts = tuple[bytes, dict[str, bytes]]  # a sample's key, and its members' bytes


def _read(shard: str, ranges: list[tuple[int, int]]) -> list[bytes]:
    try:
        contents = files.read_ranges(shard, ranges)
    except OSError as error:
        raise SampleError(f"shard: {error.strerror or error}") from error
    if [len(part) for part in contents] != [size for _, size in ranges]:
        raise SampleError("shard ended before the member did: it changed during the run")
    return contents


def _slice(data: bytes, begin: int, at: int, size: int) -> bytes:
    return data[at - begin : at - begin + size]


def _no_member(name: str) -> SampleError:
    return SampleError(f"no .{'/.'.join(IMAGES) if name == 'image' else name} member")


def _class_names(path: str) -> list[str]:
    if not path:
        return []
    try:
        with files.open_file(path) as file:
            return file.read().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.source.class_names={path}: {error}") from error
