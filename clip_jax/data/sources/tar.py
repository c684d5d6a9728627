"""WebDataset tars with random access, by an index of where each member lies.

The index is an Arrow file with one record batch a shard. It is built once, in parallel, and kept
beside the shards or in a folder of your choice; a shard that changes is read anew.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from clip_jax.data.sources import SampleError, caption_of, captions_of, files, scores

IMAGES = ("jpg", "jpeg", "png", "webp", "avif")
TEXTS = ("txt", "json", "cls")

_BLOCK = 512
_THREADS = 16  # that read headers: from disks and buckets, waiting takes most of the time
_READ_AHEAD = 1 << 16  # bytes: what the system reads anyway, in one call
_MAX_HEADER = 1 << 20  # bytes of a long name; more is damage
_COLUMNS = ("image", *TEXTS)
_SCHEMA = pa.schema(
    [("key", pa.binary())]
    + [(f"{name}_{what}", pa.int64()) for name in _COLUMNS for what in ("offset", "size")]
)


@dataclass(frozen=True, kw_only=True)
class TarConfig:
    """WebDataset tars: members 000.jpg and 000.txt (or .json, .cls) make a pair."""

    path: str  # of the shards: data/{00000..00041}.tar, data/*.tar, gs://bucket/*.tar
    caption: Literal["txt", "json", "cls"] = "txt"  # extension of the member with the text
    caption_key: str = "caption"  # of a .json
    class_names: str = ""  # file with one class name a line, for .cls; empty: the number itself
    index: str = ""  # folder for the index; empty: where the first shard is
    bad_shards: files.BadShards = "error"  # missing, truncated or damaged ones


class TarSource:
    """All pairs of all shards, in the order of the pattern. ValueError for shards not usable."""

    def __init__(self, config: TarConfig) -> None:
        self._caption, self._caption_key = config.caption, config.caption_key
        self._classes = _class_names(config.class_names)
        self._shards, self._rows = _open_index(config)
        self._ends = np.cumsum([rows.num_rows for rows in self._rows], dtype=np.int64)
        if not len(self):
            raise ValueError(
                f"no samples in {files.listed(self._shards)}; data.source.path needs tars with "
                f"images ({', '.join(IMAGES)}) and texts ({', '.join(TEXTS)})"
            )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _find(self, index: int) -> tuple[str, pa.RecordBatch, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        rows = self._rows[shard]
        return self._shards[shard], rows, index - (int(self._ends[shard]) - rows.num_rows)

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

    def scores(self, column: str) -> Float64[np.ndarray, " N"]:
        """Get a column of img2dataset's Parquet files beside the shards, by the members' keys."""
        found = []
        for shard, rows in zip(self._shards, self._rows, strict=True):
            paths = (key.decode(errors="replace") for key in rows["key"].to_pylist())
            keys = [path.rpartition("/")[2] for path in paths]
            found.append(scores.beside_tar(shard, keys, column))
        return np.concatenate(found)

    def _read(self, index: int, *names: str) -> list[bytes]:
        shard, rows, row = self._find(index)
        wanted = []
        for name in names:
            offset = rows[f"{name}_offset"][row].as_py()
            if offset is None:
                raise SampleError(f"no .{'/.'.join(IMAGES) if name == 'image' else name} member")
            wanted.append((offset, rows[f"{name}_size"][row].as_py()))
        try:
            found = files.read_ranges(shard, wanted)
        except OSError as error:
            raise SampleError(f"shard: {error.strerror or error}") from error
        if [len(member) for member in found] != [size for _, size in wanted]:
            raise SampleError("shard ended before the member did: it changed during the run")
        return found

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


def _class_names(path: str) -> list[str]:
    if not path:
        return []
    try:
        with files.open_file(path) as file:
            return file.read().decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.source.class_names={path}: {error}") from error


# ----------------------------------------------------------------------------------- the index


def _open_index(config: TarConfig) -> tuple[list[str], list[pa.RecordBatch]]:
    """Shards and their rows, from the index where it is right and from the shards elsewhere."""
    shards = files.expand(config.path)
    with ThreadPoolExecutor(_THREADS) as threads:
        stats = list(threads.map(_stat, shards))
    missing = [shard for shard, found in zip(shards, stats, strict=True) if found is None]
    files.settle(config.path, missing, "missing", config.bad_shards)
    present = [
        (shard, found) for shard, found in zip(shards, stats, strict=True) if found is not None
    ]
    path = index_path(config, shards)
    known = read_index(path)
    if [(shard, found) for shard, found, _ in known] == present:
        return [shard for shard, _, _ in known], [rows for _, _, rows in known]
    by_shard = {(shard, found): rows for shard, found, rows in known}

    def rows_of(item: tuple[str, tuple[int, float]]) -> pa.RecordBatch | str:
        try:
            return by_shard.get(item) or index_shard(item[0])
        except (ValueError, OSError) as error:
            return f"{item[0]} ({error})"

    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(zip(present, threads.map(rows_of, present), strict=True))
    bad = [rows for _, rows in found if isinstance(rows, str)]
    files.settle(config.path, bad, "not usable", config.bad_shards)
    good = [(*item, rows) for item, rows in found if isinstance(rows, pa.RecordBatch)]
    if good:
        try:
            write_index(path, good)
        except OSError as error:
            raise ValueError(
                f"the index of {config.path} cannot be written to {path}: {error}; set "
                "data.source.index to a folder that can be written"
            ) from error
    return [shard for shard, _, _ in good], [rows for _, _, rows in good]


def _stat(shard: str) -> tuple[int, float] | None:
    try:
        return files.stat(shard)
    except FileNotFoundError:
        return None


def index_path(config: TarConfig, shards: list[str]) -> str:
    """Where the index of these shards lies: its name depends on theirs."""
    name = hashlib.sha256("\n".join(shards).encode()).hexdigest()[:12]
    folder = config.index or str(shards[0]).rpartition("/")[0] or "."
    if not files.is_remote(folder):
        folder = os.path.expanduser(folder)
        os.makedirs(folder, exist_ok=True)
    return f"{folder}/clip_jax_index_{name}.arrow"


Entry = tuple[str, tuple[int, float], pa.RecordBatch]  # shard, its size and time, its rows


def write_index(path: str, entries: list[Entry]) -> None:
    """Write one record batch a shard; its metadata say of which."""

    def write(file: Any) -> None:
        with pa.ipc.new_file(file, _SCHEMA) as writer:
            for shard, (size, time), rows in entries:
                told = json.dumps({"shard": shard, "size": size, "time": time})
                writer.write_batch(rows, custom_metadata={"of": told})

    files.write_whole(path, write)


def read_index(path: str) -> list[Entry]:
    """Read what `write_index` wrote; empty if it isn't there or not whole."""
    try:
        if files.is_remote(path):
            with files.open_file(path) as file:
                reader = pa.ipc.open_file(pa.py_buffer(file.read()))
        else:
            reader = pa.ipc.open_file(pa.memory_map(path))
        if reader.schema != _SCHEMA:
            return []
        entries = []
        for i in range(reader.num_record_batches):
            rows, metadata = reader.get_batch_with_custom_metadata(i)
            told = json.loads(metadata[b"of"])
            entries.append((told["shard"], (told["size"], told["time"]), rows))
    except (OSError, pa.ArrowInvalid):
        return []
    return entries


def index_shard(shard: str) -> pa.RecordBatch:
    """Find the samples of one tar. ValueError says why it cannot be used, and from which byte."""
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    last_key, place = None, {}
    for name, offset, size in _members(shard):
        folder, _, file = name.rpartition(b"/")
        stem, _, extension = file.partition(b".")
        kind = _kind(extension)
        if not stem or kind is None:
            continue
        key = folder + b"/" + stem if folder else stem
        if key != last_key or kind in place:
            last_key, place = key, {}
            for column, values in columns.items():
                values.append(key if column == "key" else None)
        place[kind] = True
        columns[f"{kind}_offset"][-1] = offset
        columns[f"{kind}_size"][-1] = size
    expected = _expected(shard)
    if expected is not None and len(columns["key"]) != expected:
        raise ValueError(f"has {len(columns['key'])} samples, img2dataset counted {expected}")
    return pa.RecordBatch.from_pydict(columns, schema=_SCHEMA)


def _kind(extension: bytes) -> str | None:
    name = extension.lower().decode("ascii", "replace")
    if name in IMAGES:
        return "image"
    return name if name in TEXTS else None


def _expected(shard: str) -> int | None:
    """How many samples img2dataset says that it wrote, in a file beside the tar."""
    stem = str(shard).removesuffix(".tar")
    try:
        with files.open_file(f"{stem}_stats.json") as file:
            return int(json.load(file)["successes"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{PurePosixPath(stem).name}_stats.json is no img2dataset's") from error
    try:
        import pyarrow.parquet

        with files.open_file(f"{stem}.parquet") as file:
            status = pyarrow.parquet.read_table(file, columns=["status"])["status"].to_pylist()
    except (FileNotFoundError, pa.ArrowInvalid):  # no such file, or another's, without `status`
        return None
    return status.count("success") if status else None


def _members(shard: str) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset and size of each regular file in a tar (ustar, GNU and pax)."""
    size_of_file = files.stat(shard)[0]
    with files.open_file(shard) as file:
        if str(shard).endswith((".gz", ".tgz")) or file.read(2) == b"\x1f\x8b":
            raise ValueError(
                "is compressed with gzip, which has no random access; gunzip it (JPEGs hardly "
                "shrink anyway)"
            )
        at, long_name, long_size = 0, None, None
        ahead, start = b"", 0  # bytes of the file, and where they start
        while True:
            if not start <= at <= start + len(ahead) - _BLOCK:
                start = file.seek(at)
                ahead = file.read(_READ_AHEAD)
            header = ahead[at - start : at - start + _BLOCK]
            if len(header) < _BLOCK:
                raise ValueError(f"truncated: ends at byte {size_of_file} without an end mark")
            if not header.strip(b"\0"):
                return
            if not _checksum_holds(header):
                raise ValueError(f"damaged: no tar header at byte {at}")
            size = _octal(header[124:136])
            if header[156:157] not in (b"x", b"g", b"L") and long_size is not None:
                size = long_size
            data, at = at + _BLOCK, at + _BLOCK + -(-size // _BLOCK) * _BLOCK
            if size < 0 or at > size_of_file:
                raise ValueError(
                    f"truncated: the member at byte {data} has {size} bytes, the file ends at "
                    f"{size_of_file}"
                )
            kind = header[156:157]
            if kind in (b"L", b"x"):
                if size > _MAX_HEADER:
                    raise ValueError(f"damaged: a name of {size} bytes at byte {data}")
                file.seek(data)
                content = file.read(size)
                if kind == b"L":
                    long_name = content.rstrip(b"\0")
                else:
                    fields = _pax(content)
                    long_name = fields.get(b"path", long_name)
                    long_size = int(fields[b"size"]) if b"size" in fields else None
            elif kind != b"g":
                if kind in (b"0", b"\0"):
                    name = header[:100].split(b"\0", 1)[0]
                    prefix = header[345:500].split(b"\0", 1)[0]
                    if prefix and header[257:263] == b"ustar\0":
                        name = prefix + b"/" + name
                    yield long_name or name, data, size
                long_name = long_size = None


def _checksum_holds(header: bytes) -> bool:
    # Adler-32's lower half is one more than the sum of the bytes: ten times as fast as `sum`.
    total = zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF
    return total == (_octal(header[148:156]) + 1) % 65521


def _octal(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's binary numbers, for 8 GiB and more
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        return -1
    return int(digits or b"0", 8)


def _pax(content: bytes) -> dict[bytes, bytes]:
    """Fields of an extended header: lines of "LENGTH name=value"."""
    fields = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(content):
            raise ValueError("damaged: an extended header that does not parse")
        name, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[name] = value
        content = content[int(length) :]
    if not fields.get(b"size", b"0").isdigit():
        raise ValueError("damaged: an extended header whose size is no number")
    return fields
