"""Any source to ArrayRecord shards: filtered, in parallel, and resumable.

A shard is written under another name and renamed when whole, with its counts beside it; what is
there is not written again. Which samples a shard holds depends on the source and the settings
alone, so that several machines may each write a part.
"""

import dataclasses
import io
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from clip_jax.data.images import ImageError, decode
from clip_jax.data.pipeline import open_source
from clip_jax.data.sources import SampleError, Source
from clip_jax.data.sources.any import SingleConfig
from clip_jax.data.sources.array_record import ArrayRecordConfig, encode_example
from clip_jax.data.sources.folder import FolderConfig
from clip_jax.data.sources.parquet import ParquetConfig
from clip_jax.data.sources.saved_dataset import SavedDatasetConfig
from clip_jax.data.sources.table import TableConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.data.sources.tfds import TfdsConfig

_SUFFIXES: dict[str, Any] = {
    ".tar": TarConfig,
    ".parquet": ParquetConfig,
    ".array_record": ArrayRecordConfig,
    **dict.fromkeys((".csv", ".tsv", ".jsonl", ".ndjson"), TableConfig),
}
_SHEET = (6, 4)  # pairs on a contact sheet, across and down
_TILE = 160  # pixels
_INSPECTED = 200  # samples
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to write where."""

    source: (
        str  # pattern or folder: tars, Parquet, ArrayRecord, a table, save_to_disk, TFDS, images
    )
    destination: Path | None = None  # folder of the shards
    inspect: bool = False  # only show the first samples and write a contact sheet
    image_column: str = ""  # where the source has columns; empty: its default
    caption_column: str = ""
    part: str = "0/1"  # i/n: the i-th of n machines, from 0
    samples_per_shard: int = 10_000  # of the source; what filters drop leaves a shard smaller
    threads: int = 2  # that read, check and write, each a shard
    min_side: int = 1  # pixels
    max_aspect: float = 100.0  # longer side / shorter side
    min_caption: int = 1  # characters
    max_caption: int = 100_000  # characters
    resize: int = (
        0  # shorter side of larger images to so many pixels, as JPEG; 0: bytes as they are
    )
    quality: int = 95  # of the JPEG

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard={self.samples_per_shard} must be at least 1")
        if self.threads < 1:
            raise ValueError(f"threads={self.threads} must be at least 1")
        self.parts()

    def parts(self) -> tuple[int, int]:
        """Number of this part, and how many there are."""
        number, _, count = self.part.partition("/")
        if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
            raise ValueError(f"part={self.part!r} must be i/n with i from 0 to n - 1, such as 0/4")
        return int(number), int(count)


def guess_source(path: str, image_column: str = "", caption_column: str = "") -> SingleConfig:
    """Tell the format by a path's ending, or by what a folder holds. ValueError if neither does."""
    folder = Path(path).expanduser()
    kind = _SUFFIXES.get(Path(path).suffix)
    if kind is None and (folder / "state.json").is_file():
        kind = SavedDatasetConfig
    elif kind is None and (folder / "dataset_info.json").is_file():
        kind = TfdsConfig
    elif kind is None and folder.is_dir():
        kind = FolderConfig
    if kind is None:
        raise ValueError(
            f"{path} is no source: give files that end in {', '.join(_SUFFIXES)}, or a folder of "
            "images, of save_to_disk or of a TFDS version"
        )
    columns = {"image_column": image_column, "caption_column": caption_column}
    given = {name: value for name, value in columns.items() if value}
    names = {field.name for field in dataclasses.fields(kind)}
    if not given.keys() <= names:
        raise ValueError(f"{path} ({kind.__name__}) has no columns: leave {', '.join(given)} out")
    return kind(path=path, **given)


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write this part's shards that are not there yet; returns and writes the counts."""
    source = _open(config)
    if config.destination is None:
        raise ValueError("prepare needs a destination: clip-jax prepare SRC DST")
    folder = config.destination
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder, config, len(source))
    count = -(-len(source) // config.samples_per_shard)
    number, parts = config.parts()
    own = range(number, count, parts)

    def write(shard: int) -> dict[str, int]:
        path = folder / f"pairs-{shard:05d}-of-{count:05d}.array_record"
        told = path.with_suffix(".json")
        if path.exists() and told.exists():
            return json.loads(told.read_text())
        first = shard * config.samples_per_shard
        last = min(first + config.samples_per_shard, len(source))
        counts = _write_shard(source, range(first, last), path, config)
        _write_whole(told, counts)
        return counts

    total: Counter[str] = Counter()
    with ThreadPoolExecutor(config.threads) as threads:
        for counts in threads.map(write, own):
            total.update(counts)
    report = {"samples": len(source), "shards": len(own), "counts": dict(total)}
    _write_whole(folder / f"report-{number}-of-{parts}.json", report)
    contact_sheet(source, folder / "contact_sheet.png")
    return report


def inspect(config: PrepareConfig) -> dict[str, Any]:
    """Read the first samples, count what is wrong, and draw a contact sheet."""
    source = _open(config)
    counts: Counter[str] = Counter()
    shown = []
    for index in range(min(len(source), _INSPECTED)):
        try:
            image, caption, size = _read(source, index, config)
        except SampleError as error:
            counts[_reason(error)] += 1
            continue
        counts["kept"] += 1
        if len(shown) < _SHOWN:
            shown.append(
                {
                    "key": source.key(index),
                    "size": list(size),
                    "bytes": len(image),
                    "caption": caption,
                }
            )
    sheet = (config.destination or Path()) / "contact_sheet.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(source, sheet)
    return {
        "samples": len(source),
        "counts": dict(counts),
        "first": shown,
        "contact_sheet": str(sheet),
    }


def _open(config: PrepareConfig) -> Source:
    single = guess_source(config.source, config.image_column, config.caption_column)
    return open_source(single, image_size=1)


def _check_settings(folder: Path, config: PrepareConfig, samples: int) -> None:
    """Refuse a folder that other settings have begun: its shards would not fit."""
    kept = dataclasses.asdict(config) | {"samples": samples}
    for name in ("destination", "inspect", "part", "threads"):
        del kept[name]
    path = folder / "prepare.json"
    if not path.exists():
        _write_whole(path, kept)
    elif json.loads(path.read_text()) != kept:
        raise ValueError(
            f"{folder} was begun with other settings, see {path}; give the same ones to go on, or "
            "another destination"
        )


def _write_whole(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(path)


def _write_shard(
    source: Source, indices: range, path: Path, config: PrepareConfig
) -> dict[str, int]:
    from array_record.python.array_record_module import ArrayRecordWriter

    counts: Counter[str] = Counter()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    writer = ArrayRecordWriter(str(partial), "group_size:1")
    try:
        for index in indices:
            try:
                image, caption, _ = _read(source, index, config)
            except SampleError as error:
                counts[_reason(error)] += 1
                continue
            key = source.key(index).encode()
            features = {"image": [image], "caption": [caption.encode()], "key": [key]}
            writer.write(encode_example(features))
            counts["kept"] += 1
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return dict(counts)


def _reason(error: SampleError) -> str:
    return str(error).partition(":")[0]


def _read(source: Source, index: int, config: PrepareConfig) -> tuple[bytes, str, tuple[int, int]]:
    """Image bytes, caption and size of a sample that passes the filters; else SampleError."""
    image, caption = source.load(index, np.random.default_rng(index))
    if not isinstance(image, bytes):
        raise SampleError("image is drawn, not stored")
    if not config.min_caption <= len(caption.strip()) <= config.max_caption:
        raise SampleError(f"caption length: {len(caption.strip())} characters")
    try:
        picture = decode(image)
    except ImageError as error:
        raise SampleError(str(error)) from error
    short, long = sorted(picture.size)
    if short < config.min_side:
        raise SampleError(f"image side: {short} pixels")
    if long > config.max_aspect * short:
        raise SampleError(f"image aspect: {picture.width} x {picture.height}")
    if config.resize and short > config.resize:
        width, height = (max(1, round(side * config.resize / short)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=config.quality)
        image = file.getvalue()
    return image, caption, picture.size


def contact_sheet(source: Source, path: Path) -> None:
    """Draw random pairs, always the same ones of a source, with their captions below."""
    across, down = _SHEET
    sheet = Image.new("RGB", (across * _TILE, down * (_TILE + 30)), "white")
    pen = ImageDraw.Draw(sheet)
    for place in range(min(across * down, len(source))):
        rng = np.random.default_rng(place)
        left, top = place % across * _TILE, place // across * (_TILE + 30)
        try:
            image, caption = source.load(int(rng.integers(len(source))), rng)
            picture = decode(image) if isinstance(image, bytes) else Image.fromarray(image)
        except (SampleError, ImageError) as error:
            caption = f"! {error}"
        else:
            picture.thumbnail((_TILE - 4, _TILE - 4))
            sheet.paste(picture, (left + 2, top + 2))
        words = caption.encode("ascii", "replace").decode().replace("\n", " ")
        pen.multiline_text((left + 2, top + _TILE), f"{words[:25]}\n{words[25:50]}", "black")
    sheet.save(path)
