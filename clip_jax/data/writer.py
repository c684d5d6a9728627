"""Any source to ArrayRecord shards: filtered, in parallel, and resumable.

A shard is written under another name and renamed when whole, with its counts beside it; what is
there is not written again. Which samples a shard holds depends on the source and the settings
alone, so that several machines may each write a part.
"""

import contextlib
import dataclasses
import io
import json
import os
import secrets
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool
from PIL import Image

from clip_jax.data import report
from clip_jax.data.filters import Filter, FilterConfig, repeated
from clip_jax.data.sources import SampleError, StoredSource
from clip_jax.data.sources.any import PathConfig, open_single
from clip_jax.data.sources.array_record import (
    ArrayRecordConfig,
    ArrayRecordSource,
    encode_example,
)
from clip_jax.data.sources.files import BadShards

_INSPECTED = 1_000  # samples
_SHOWN = 5
_STEP = 64  # samples between movements of the progress bar


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(FilterConfig):
    """What to write where."""

    source: str  # file, pattern or folder: tars, Parquet, ArrayRecord, table, TFDS, save_to_disk
    destination: Path | None = None  # folder of the shards
    inspect: bool = False  # only show the first samples and statistics, and draw a contact sheet
    image_column: str = ""  # where the source has columns; empty: the format's default
    caption_column: str = ""  # column, feature, or key of the .json in tars; empty: the default
    bad_shards: BadShards = "error"  # of the source: missing, truncated or damaged ones
    part: str = "1/1"  # which of how many parts of the work this process takes: 1/4 to 4/4
    samples_per_shard: int = 10_000  # of the source; what is dropped leaves a shard smaller
    threads: int = 0  # that read, check and write, each a shard; 0: one a core
    resize: int = 0  # pixels; larger images get a shorter side of so many; 0: sizes as they are
    encode: Literal["keep", "jpeg", "webp"] = "keep"  # keep: bytes as they are; resized ones: jpeg
    quality: int = 95  # of what is encoded anew

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("samples_per_shard", 1), ("threads", 0), ("resize", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} must be from 1 to 100")
        self.parts()

    def parts(self) -> tuple[int, int]:
        """Number of this part from 0 on, and how many there are."""
        number, _, count = self.part.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ValueError(f"part={self.part!r} must be i/n with i from 1 to n, such as 1/4")
        return int(number) - 1, int(count)


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write this part's shards that are not there yet; returns the report over all parts so far.

    ValueError for a source that is not usable, and for a folder begun with other settings.
    """
    if config.destination is None:
        raise ValueError("prepare needs a destination: clip-jax prepare SRC DST")
    source = _open(config)
    passes = Filter(config, source)
    folder = config.destination
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder, config, len(source))
    shards = _shards(folder, len(source), config.samples_per_shard)
    number, parts = config.parts()
    if config.drop_duplicates:
        passes.leave_out(_repeated(passes, shards, config))
    own = [shard for shard in shards[number::parts] if not shard.is_done()]

    def write(shard: _Shard, counted: _Counted) -> None:
        _write_shard(shard, counted(shard.indices), source, passes, config)
        kept = json.loads(shard.told.read_text())["counts"].get("kept", 0)
        print(f"{shard.path}: {kept:,} of {len(shard.indices):,} pairs", file=sys.stderr)

    _in_threads("prepare", write, own, config)
    return _report(folder, shards)


def inspect(config: PrepareConfig) -> dict[str, Any]:
    """Show the first pairs that pass, count what is wrong in up to 1,000 evenly spread ones, and
    draw a contact sheet and histograms, in `destination` or here."""
    source = _open(config)
    passes = Filter(config, source)
    found = report.Statistics()
    for index in np.unique(np.linspace(0, len(source) - 1, _INSPECTED).astype(int)).tolist():
        try:
            image, picture, captions = passes.read(index)
            found.keep(picture.size, len(image), captions)
        except SampleError as error:
            found.drop(source.key(index), error)
    first = []
    for index in range(min(len(source), _SHOWN)):
        try:
            image, picture, captions = passes.read(index)
            told = {"size": list(picture.size), "bytes": len(image), "captions": captions}
        except SampleError as error:
            told = {"dropped": str(error)}
        first.append({"key": source.key(index), **told})
    folder = config.destination or Path()
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [folder / "contact_sheet.png", folder / "statistics.png"]
    report.contact_sheet(pictures[0], source)
    result = report.merged([found.to_dict()])
    report.draw(pictures[1], result)
    return {
        "samples": len(source),
        "first": first,
        **result,
        "pictures": [str(p) for p in pictures],
    }


def describe(result: dict[str, Any]) -> str:
    """Lines for people, of `prepare` or `inspect`."""
    lines = [f"{result['samples']:,} samples"]
    lines += [json.dumps(pair, ensure_ascii=False) for pair in result.get("first", ())]
    lines.append(report.describe(result))
    if "shards" in result:
        lines.append("{written} of {of} shards are written".format(**result["shards"]))
    return "\n".join([*lines, *result["pictures"]])


def _open(config: PrepareConfig) -> StoredSource:
    names = ("image_column", "caption_column", "bad_shards")
    how = {name: getattr(config, name) for name in names}
    source = open_single(PathConfig(path=config.source, **how), image_size=1)
    assert isinstance(source, StoredSource), config.source  # what has a path never draws
    return source


def _check_settings(folder: Path, config: PrepareConfig, samples: int) -> None:
    """Refuse a folder that other settings have begun: its shards would not fit."""
    kept = dataclasses.asdict(config) | {"samples": samples}
    for name in ("destination", "inspect", "part", "threads"):
        del kept[name]
    path = folder / "prepare.json"
    if not path.exists():
        _write_whole(path, json.dumps(kept, indent=1).encode())
    elif json.loads(path.read_text()) != kept:
        raise ValueError(
            f"{folder} was begun with other settings, see {path}; give the same ones to go on, or "
            "another destination"
        )


# ------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class _Shard:
    path: Path
    indices: range  # of the source

    @property
    def told(self) -> Path:
        """Its counts; written after the shard, so that their being there says it is whole."""
        return self.path.with_suffix(".json")

    @property
    def hashes(self) -> Path:
        return self.path.with_suffix(".hashes")

    def is_done(self) -> bool:
        return self.path.exists() and self.told.exists()


def _shards(folder: Path, samples: int, size: int) -> list[_Shard]:
    count = -(-samples // size)
    return [
        _Shard(
            folder / f"pairs-{number:05d}-of-{count:05d}.array_record",
            range(number * size, min((number + 1) * size, samples)),
        )
        for number in range(count)
    ]


def _write_shard(
    shard: _Shard,
    indices: Iterable[int],
    source: StoredSource,
    passes: Filter,
    config: PrepareConfig,
) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    found = report.Statistics()
    for old in shard.path.parent.glob(f"{shard.path.name}.*.partial"):  # of a run that was killed
        old.unlink(missing_ok=True)
    with _whole(shard.path) as partial:
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        try:
            for index in indices:
                key = source.key(index)
                try:
                    image, picture, captions = passes.read(index)
                except SampleError as error:
                    found.drop(key, error)
                    continue
                image, size = _encoded(image, picture, config)
                found.keep(size, len(image), captions)
                texts = [caption.encode() for caption in captions]
                record = {"image": [image], "caption": texts, "key": [key.encode()]}
                writer.write(encode_example(record))
        finally:
            writer.close()
    _write_whole(shard.told, json.dumps(found.to_dict()).encode())


def _encoded(
    image: bytes, picture: Image.Image, config: PrepareConfig
) -> tuple[bytes, tuple[int, int]]:
    """The image as it is to be stored, and its size."""
    short = min(picture.size)
    smaller = 0 < config.resize < short
    if config.encode == "keep" and not smaller:
        return image, picture.size
    if smaller:
        width, height = (max(1, round(side * config.resize / short)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "WEBP" if config.encode == "webp" else "JPEG", quality=config.quality)
    return file.getvalue(), picture.size


def _repeated(
    passes: Filter, shards: list[_Shard], config: PrepareConfig
) -> Bool[np.ndarray, " N"]:
    """Hash every image, those of this part first; other parts' hashes are taken where they are."""
    number, parts = config.parts()

    def write(shard: _Shard, counted: _Counted) -> None:
        if not shard.hashes.exists():
            _write_whole(shard.hashes, passes.hashes(counted(shard.indices)).tobytes())

    in_turn = [shard for i in range(parts) for shard in shards[(number + i) % parts :: parts]]
    _in_threads("hash", write, [s for s in in_turn if not s.hashes.exists()], config)
    return repeated(np.concatenate([np.fromfile(shard.hashes, np.uint64) for shard in shards]))


def _report(folder: Path, shards: Sequence[_Shard]) -> dict[str, Any]:
    """Write what all parts have done so far, as JSON and as pictures."""
    done = [shard for shard in shards if shard.is_done()]
    total = report.merged(json.loads(shard.told.read_text()) for shard in done)
    pictures = [folder / "report.png"]
    report.draw(pictures[0], total)
    if total["counts"].get("kept"):
        pictures.append(folder / "contact_sheet.png")
        written = ArrayRecordConfig(path=str(folder / "pairs-*.array_record"))
        report.contact_sheet(pictures[1], ArrayRecordSource(written))
    result = {
        "samples": sum(len(shard.indices) for shard in shards),
        "shards": {"written": len(done), "of": len(shards)},
        **total,
        "pictures": [str(picture) for picture in pictures],
    }
    _write_whole(folder / "report.json", json.dumps(result, indent=1).encode())
    return result


@contextlib.contextmanager
def _whole(path: Path) -> Generator[Path]:
    """A path to write to; it becomes `path` if the block ends well, and otherwise nothing."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_whole(path: Path, content: bytes) -> None:
    with _whole(path) as partial:
        partial.write_bytes(content)


# ------------------------------------------------------------------------------------ threads

_Counted = Callable[[Iterable[int]], Iterator[int]]


class _Stopped(Exception):
    """Another thread failed, or a person pressed Ctrl-C."""


def _in_threads(
    what: str, work: Callable[[_Shard, _Counted], None], shards: list[_Shard], config: PrepareConfig
) -> None:
    """Call `work` for each shard, with what it is to wrap its indices in; show the progress.

    The first error, or Ctrl-C, stops all of them at their next sample.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    stop = threading.Event()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    bar = Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    task = bar.add_task(what, total=sum(len(shard.indices) for shard in shards))

    def counted(indices: Iterable[int]) -> Iterator[int]:
        done = 0
        for index in indices:
            if stop.is_set():
                raise _Stopped
            yield index
            done += 1
            if done % _STEP == 0:
                bar.advance(task, _STEP)
        bar.advance(task, done % _STEP)

    with bar, ThreadPoolExecutor(config.threads or os.cpu_count()) as threads:
        futures = [threads.submit(work, shard, counted) for shard in shards]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            threads.shutdown(cancel_futures=True)
            raise
