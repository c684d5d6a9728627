"""Use a finished model: zero-shot labels for images, a folder embedded, a folder searched."""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from PIL import Image

from clip_jax.data.embeddings import Embeddings
from clip_jax.data.images import ImageError, ImageLike, center_crop, decode
from clip_jax.data.sources import SampleError, Source
from clip_jax.evals.pictures import contact_sheet
from clip_jax.evals.zero_shot import average
from clip_jax.load import Model, load
from clip_jax.metrics import Display, replace_text

SUFFIXES = {f".{name}" for name in ("jpg", "jpeg", "png", "webp", "gif", "avif", "bmp", "tif")}
DTYPE = Literal["float32", "bfloat16"]
TILE = 112  # pixels of a picture on a contact sheet


# ------------------------------------------------------------------------------------ predict


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Which of your labels fits each image, by the nearest text."""

    model: Path  # a run's work directory, a model folder, or a foreign file
    images: tuple[Path, ...] = ()  # files, or folders of them
    labels: tuple[str, ...] = ()  # the classes to choose from
    template: str = "a photo of a {}."  # sentence around each label; {} alone: the label as it is
    sheet: Path | None = None  # picture of the images with their three best labels
    batch_size: int = 64  # images at a time
    dtype: DTYPE = "float32"  # of the computation

    def __post_init__(self) -> None:
        if not self.labels or not all(label.strip() for label in self.labels):
            raise ValueError(
                f"labels={list(self.labels)}: give at least one label and none empty (--labels)."
            )
        if "{}" not in self.template:
            raise ValueError(
                f"template={self.template!r} has no {{}} where the label goes (--template)."
            )


def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """Return for each readable image its path and all labels with probabilities, best first.

    Unreadable images are named on standard error. ValueError if no image is left.
    """
    paths = list(_image_files(config.images))
    if not paths:
        given = ", ".join(map(str, config.images)) or "nothing"
        raise ValueError(f"no images in {given}; --images takes files and folders of images.")
    model = load(config.model, dtype=config.dtype)
    prompts = [config.template.replace("{}", label) for label in config.labels]
    texts = _unit(model.encode_text(model.tokenize(prompts, truncate=True)))
    classes = average(texts, [1] * len(texts))
    scale = float(np.exp(model.params["logit_scale"]))
    results, tiles = [], []
    for read, features, skipped in _embedded(
        model, paths, lambda path: path, config.batch_size, keep=config.sheet is not None
    ):
        for path, reason in skipped:
            print(f"skipped {path}: {reason}", file=sys.stderr)
        for (path, tile), row in zip(read, features @ classes.T * scale, strict=True):
            odds = np.exp(row - row.max())
            best = sorted(zip(odds / odds.sum(), config.labels, strict=True), key=lambda x: -x[0])
            labels = [{"label": label, "probability": float(share)} for share, label in best]
            results.append({"image": str(path), "labels": labels})
            tiles.append(tile)
    if not results:
        raise ValueError(f"none of the {len(paths)} images could be read.")
    if config.sheet:
        lines = [
            [f"{x['label']}  {x['probability']:.0%}" for x in result["labels"][:3]]
            for result in results
        ]
        contact_sheet(config.sheet, tiles, lines)
    return results


def _image_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Files as given, folders in alphabetical order with what is in them."""
    for path in paths:
        if path.is_dir():
            yield from sorted(
                Path(folder) / name
                for folder, _, names in os.walk(path, followlinks=True)
                for name in names
                if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
            )
        else:
            yield path


def _unit(features: Any) -> Float[np.ndarray, "B E"]:
    rows = np.asarray(features)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _embedded(
    model: Model,
    items: Sequence[Any],
    read: Callable[[Any], ImageLike],
    batch_size: int,
    keep: bool = False,
) -> Iterator[tuple[list[tuple[Any, Any]], Float[np.ndarray, "B E"], list[tuple[Any, str]]]]:
    """Yield items that could be read (each with a small picture if `keep`), their unit-length
    embeddings, and the others with the reason. Threads decode while the model computes."""

    def prepare(item: Any) -> tuple[Any, Any, str]:
        try:
            image = read(item)
            pixels = model.image_preprocess(image)
            tile = center_crop(_rgb(image), TILE) if keep else None
        except (ImageError, SampleError) as error:
            return None, None, str(error)
        return pixels, tile, ""

    def encode(batch: Sequence[Any], futures: list[Future]) -> tuple[Any, Any, Any]:
        done = [future.result() for future in futures]
        good = [(item, x) for item, x in zip(batch, done, strict=True) if x[0] is not None]
        bad = [(item, x[2]) for item, x in zip(batch, done, strict=True) if x[0] is None]
        features = np.empty((0, model.config.embed_dim), np.float32)
        if good:
            pixels = np.stack([x[0] for _, x in good])
            features = _unit(model.encode_image(pixels, batch_size=batch_size))
        return [(item, x[1]) for item, x in good], features, bad

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        ahead: deque = deque()
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            ahead.append((batch, [threads.submit(prepare, item) for item in batch]))
            if len(ahead) > 2:
                yield encode(*ahead.popleft())
        while ahead:
            yield encode(*ahead.popleft())


def _rgb(image: ImageLike) -> Image.Image:
    if isinstance(image, np.ndarray):
        return Image.fromarray(image).convert("RGB")
    return image.convert("RGB") if isinstance(image, Image.Image) else decode(image)


# -------------------------------------------------------------------------------------- embed


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Embeddings of many images, to a folder of Parquet files; the same command again resumes."""

    model: Path  # a run's work directory, a model folder, or a foreign file
    source: str  # a folder of images; a .csv, .tsv or .jsonl; tars: data/{00000..00041}.tar
    output: Path  # folder for rows-*.parquet with the columns index, key, embedding
    part: str = "1/1"  # which of how many parts of the work this process takes: 1/4 to 4/4
    image_column: str = "image"  # of a table: the image's path
    caption_column: str = "caption"  # of a table
    rows_per_file: int = 1024  # images a file; a kill loses at most as many
    batch_size: int = 64  # images at a time
    dtype: DTYPE = "float32"  # of the computation

    def __post_init__(self) -> None:
        _part(self.part)
        for name in ("rows_per_file", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")


def embed(config: EmbedConfig) -> dict[str, Any]:
    """Embed a source's images at unit length; return counts and what was skipped.

    Every file appears whole or not at all and its name says which rows it holds, so whatever was
    killed goes on where it stopped.
    """
    source = open_images(config.source, config.image_column, config.caption_column)
    _check_manifest(config, len(source))
    number, parts = _part(config.part)
    first, end = ((i * len(source)) // parts for i in (number - 1, number))
    starts = range(first, end, config.rows_per_file)
    model = None
    display = Display(end - first)
    for start in starts:
        stop = min(start + config.rows_per_file, end)
        path = config.output / f"rows-{start:010d}-{stop:010d}.parquet"
        if not path.exists():
            model = model or load(config.model, dtype=config.dtype)
            _write_rows(path, model, source, range(start, stop), config.batch_size)
        display.advance(stop - first)
    display.close()
    written = [config.output / f"rows-{s:010d}-{min(s + config.rows_per_file, end):010d}.parquet"
               for s in starts]  # fmt: skip
    metadata = [pq.read_schema(path).metadata for path in written]
    skipped = [line for data in metadata for line in json.loads(data[b"skipped"])]
    count = end - first - len(skipped)
    return {"output": str(config.output), "images": count, "skipped": skipped}


def _write_rows(path: Path, model: Model, source: Source, rows: range, batch_size: int) -> None:
    rng = np.random.default_rng(0)  # draws among captions, which are not looked at
    indices, features, skipped = [], [], []
    for read, found, failed in _embedded(
        model, rows, lambda index: source.load(index, rng)[0], batch_size
    ):
        indices += [index for index, _ in read]
        features.append(found)
        skipped += [{"key": source.key(index), "reason": reason} for index, reason in failed]
    flat = pa.array(np.concatenate(features).ravel())
    table = pa.table(
        {
            "index": pa.array(indices, pa.int64()),
            "key": pa.array([source.key(index) for index in indices], pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, model.config.embed_dim),
        }
    ).replace_schema_metadata({"skipped": json.dumps(skipped)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, temporary, compression="none")
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _part(text: str) -> tuple[int, int]:
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 0 < int(number) <= int(parts)):
        raise ValueError(f"part={text!r} must be i/n with i from 1 to n, such as 1/4.")
    return int(number), int(parts)


def _check_manifest(config: EmbedConfig, rows: int) -> None:
    """Say what the folder holds; ValueError if it holds something else already."""
    wanted = {
        "model": str(config.model), "source": config.source, "rows": rows, "dtype": config.dtype,
        "parts": _part(config.part)[1], "rows_per_file": config.rows_per_file,
        "batch_size": config.batch_size, "image_column": config.image_column,
        "caption_column": config.caption_column,
    }  # fmt: skip
    path = config.output / "embed.json"
    if path.exists():
        there = json.loads(path.read_text())
        for name, value in wanted.items():
            if there.get(name) != value:
                raise ValueError(
                    f"{config.output} holds embeddings with {name}={there.get(name)!r}, now "
                    f"{value!r}; resume with the same, or choose another output."
                )
        return
    config.output.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(wanted, indent=1))


class FolderImages:
    """Images of a folder by path, captions or not."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = [path.relative_to(folder).as_posix() for path in _image_files([folder])]
        if not self._names:
            raise ValueError(f"{folder} has no images ({', '.join(sorted(SUFFIXES))}).")

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        """The image's path in the folder."""
        return self._names[index].encode(errors="surrogateescape").decode(errors="replace")

    def load(self, index: int, rng: np.random.Generator) -> tuple[bytes, str]:
        """Get the file's bytes; the text is empty."""
        try:
            return (self._folder / self._names[index]).read_bytes(), ""
        except OSError as error:
            raise SampleError(f"unreadable: {error.strerror}") from error


def open_images(
    source: str, image_column: str = "image", caption_column: str = "caption"
) -> Source:
    """Open a folder of images, a table of pairs or a pattern of tars."""
    path = Path(source).expanduser()
    if path.is_dir():
        return FolderImages(path)
    if source.endswith((".csv", ".tsv", ".jsonl", ".ndjson")):
        from clip_jax.data.sources.table import TableConfig, TableSource

        return TableSource(
            TableConfig(path=source, image_column=image_column, caption_column=caption_column)
        )
    if source.endswith((".tar", ".tar.gz", ".tgz")):
        from clip_jax.data.sources.tar import TarConfig, TarSource

        return TarSource(TarConfig(path=source))
    raise ValueError(
        f"no images at {source}; it takes a folder, a .csv, .tsv or .jsonl, or tars "
        "(data/{00000..00041}.tar)."
    )


# ------------------------------------------------------------------------------------- search


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The images of an embedded folder that are closest to a text or an image."""

    model: Path  # the model that embedded them
    embeddings: Path  # folder that `clip-jax embed` wrote
    text: str = ""  # what to look for, in words
    image: Path | None = None  # what to look for, as an image
    top: int = 10  # how many to return
    index: Literal["exact", "usearch"] = "exact"  # usearch: approximate, for very many (an extra)
    sheet: Path | None = None  # picture of what was found

    def __post_init__(self) -> None:
        if bool(self.text.strip()) == bool(self.image):
            raise ValueError("search needs one of --text and --image, and no empty text.")
        if self.top < 1:
            raise ValueError(f"top={self.top} must be at least 1.")


def search(config: SearchConfig) -> list[dict[str, Any]]:
    """Return `key`, `similarity` (cosine) and `index` in the source of the best, best first."""
    embeddings = Embeddings(config.embeddings)
    model = load(config.model)
    width = embeddings.vectors.shape[1]
    if width != model.config.embed_dim:
        raise ValueError(
            f"{config.embeddings} has vectors of {width} dimensions, {config.model} makes "
            f"{model.config.embed_dim}; search with the model that embedded the images."
        )
    if config.image:
        query = _unit(model.encode_image(model.preprocess([config.image])))[0]
    else:
        query = _unit(model.encode_text(model.tokenize([config.text], truncate=True)))[0]
    find = embeddings.exact if config.index == "exact" else embeddings.approximate
    results: list[dict[str, Any]] = []
    for row, similarity in zip(*find(query, config.top), strict=True):
        index, key = embeddings.row(int(row))
        results.append({"key": key, "similarity": float(similarity), "index": index})
    if config.sheet:
        told = json.loads((config.embeddings / "embed.json").read_text())
        source = open_images(told["source"], told["image_column"], told["caption_column"])
        rng = np.random.default_rng(0)
        tiles = [center_crop(_rgb(source.load(x["index"], rng)[0]), TILE) for x in results]
        lines = [[f"{x['similarity']:.3f}", x["key"][-24:]] for x in results]
        contact_sheet(config.sheet, tiles, lines, columns=5, title=config.text)
    return results
