"""Use a finished model: zero-shot labels for images, a folder embedded, a folder searched."""

import functools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from PIL import Image

from clip_jax.data.embeddings import Embeddings
from clip_jax.data.images import ImageError, ImageLike, center_crop, decode
from clip_jax.data.sources import SampleError
from clip_jax.data.sources.images import Images, absolute, image_files, open_images
from clip_jax.evals.pictures import contact_sheet
from clip_jax.load import Model, load
from clip_jax.metrics import Display, replace_text

DTYPE = Literal["float32", "bfloat16"]
TILE = 112  # pixels of a picture on a contact sheet
SHEET = 240  # pictures on a sheet at most


# ------------------------------------------------------------------------------------ predict


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Which of your labels fits each image, by the nearest text."""

    model: Path  # a run's work directory, a model folder, or a foreign file
    images: tuple[Path, ...] = ()  # files, or folders of them
    labels: tuple[str, ...] = ()  # the classes to choose from
    template: str = "a photo of a {}."  # sentence around each label; {} alone: the label as it is
    sheet: Path | None = None  # picture of the images (the first 240) with their best labels
    batch_size: int = 64  # images at a time
    dtype: DTYPE = "float32"  # of the computation

    def __post_init__(self) -> None:
        check_labels(self.labels, self.template)


def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """Return for each readable image its path and all labels with probabilities, best first.

    Unreadable images are named on standard error. ValueError if no image is left.
    """
    paths = list(image_files(config.images))
    if not paths:
        given = ", ".join(map(str, config.images)) or "nothing"
        raise ValueError(f"no images in {given}; --images takes files and folders of images.")
    model = load(config.model, dtype=config.dtype)
    classes = embed_labels(model, config.labels, config.template)
    results, tiles = [], []
    for read, features, skipped in _embedded(
        model, paths, lambda path: path, config.batch_size, keep=config.sheet is not None
    ):
        for path, reason in skipped:
            print(f"skipped {path}: {reason}", file=sys.stderr)
        shares = probabilities(model, features, classes)
        for (path, tile), row in zip(read, shares, strict=True):
            best = sorted(zip(row, config.labels, strict=True), key=lambda x: -x[0])
            labels = [{"label": label, "probability": float(share)} for share, label in best]
            results.append({"image": str(path), "labels": labels})
            tiles += [tile] if len(tiles) < SHEET else []
    if not results:
        raise ValueError(f"none of the {len(paths)} images could be read.")
    if config.sheet:
        lines = [
            [
                Path(result["image"]).name,
                *(f"{x['label']} {x['probability']:.0%}" for x in result["labels"][:3]),
            ]
            for result in results[:SHEET]
        ]
        title = "" if len(results) <= SHEET else f"the first {SHEET} of {len(results)} images"
        contact_sheet(config.sheet, tiles, lines, title=title)
    return results


def check_labels(labels: Sequence[str], template: str) -> None:
    """Raise ValueError if there is no label, an empty one, or no place for it in the template."""
    if not labels or not all(label.strip() for label in labels):
        raise ValueError(f"labels={list(labels)}: give at least one label and none empty.")
    if "{}" not in template:
        raise ValueError(f"template={template!r} has no {{}} where the label goes.")


def embed_labels(
    model: Model, labels: Sequence[str], template: str
) -> Float[np.ndarray, "classes E"]:
    """Embed each label in its sentence, at unit length."""
    prompts = [template.replace("{}", label) for label in labels]
    return unit(model.encode_text(model.tokenize(prompts, truncate=True)))


def probabilities(
    model: Model, images: Float[np.ndarray, "B E"], classes: Float[np.ndarray, "classes E"]
) -> Float[np.ndarray, "B classes"]:
    """Softmax of the scaled similarities of unit-length embeddings."""
    logits = images @ classes.T * float(np.exp(model.params["logit_scale"]))
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def unit(features: Any) -> Float[np.ndarray, "B E"]:
    """Scale rows to unit length."""
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
            features = unit(model.encode_image(pixels, batch_size=batch_size))
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
    source = open_images(config.source, config.image_column)
    model = load(config.model, dtype=config.dtype)
    _check_manifest(config, model, len(source))
    number, parts = _part(config.part)
    first, end = ((i * len(source)) // parts for i in (number - 1, number))
    starts = range(first, end, config.rows_per_file)
    display = Display(end - first)
    for start in starts:
        stop = min(start + config.rows_per_file, end)
        path = config.output / f"rows-{start:010d}-{stop:010d}.parquet"
        if not path.exists():
            _write_rows(path, model, source, range(start, stop), config.batch_size)
        display.advance(stop - first)
    display.close()
    written = [config.output / f"rows-{s:010d}-{min(s + config.rows_per_file, end):010d}.parquet"
               for s in starts]  # fmt: skip
    metadata = [pq.read_schema(path).metadata for path in written]
    skipped = [line for data in metadata for line in json.loads(data[b"skipped"])]
    count = end - first - len(skipped)
    return {"output": str(config.output), "images": count, "skipped": skipped}


def _write_rows(path: Path, model: Model, source: Images, rows: range, batch_size: int) -> None:
    indices, features, skipped = [], [], []
    for read, found, failed in _embedded(model, rows, source.image, batch_size):
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


def _check_manifest(config: EmbedConfig, model: Model, rows: int) -> None:
    """Say what the folder holds; ValueError if it holds something else already."""
    wanted = {
        "model": os.path.abspath(config.model), "source": absolute(config.source), "rows": rows,
        "dtype": config.dtype, "parts": _part(config.part)[1],
        "rows_per_file": config.rows_per_file, "batch_size": config.batch_size,
        "image_column": config.image_column, "weights": _sample(model),
    }  # fmt: skip
    path = config.output / "embed.json"
    if path.exists():
        there = json.loads(path.read_text())
        if there | {"weights": wanted["weights"]} == wanted != there:
            raise ValueError(
                f"{config.output} holds embeddings of another checkpoint of {config.model}; choose "
                "another output."
            )
        for name, value in wanted.items():
            if there.get(name) != value:
                raise ValueError(
                    f"{config.output} holds embeddings with {name}={there.get(name)!r}, now "
                    f"{value!r}; resume with the same, or choose another output."
                )
        return
    config.output.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(wanted, indent=1))


def _sample(model: Model) -> list[float]:
    """One number of each of the image tower's parameters: it tells models and checkpoints apart."""
    leaves = map(np.asarray, jax.tree.leaves(model.params["visual"]))
    return [float(x.flat[x.size // 2]) for x in leaves]


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
    found = Searcher(load(config.model), config.embeddings)
    results = found.search(config.image or config.text, config.top, config.index)
    if config.sheet:
        tiles = [center_crop(found.picture(x["index"]), TILE) for x in results[:SHEET]]
        lines = [[f"{x['similarity']:.3f}", x["key"]] for x in results]
        title = config.text or str(config.image)
        contact_sheet(config.sheet, tiles, lines, columns=5, title=title)
    return results


class Searcher:
    """An embedded folder beside its model. ValueError if another model embedded it."""

    def __init__(self, model: Model, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._embeddings = Embeddings(folder)
        if not (folder / "embed.json").is_file():
            raise ValueError(f"{folder} has no embed.json; clip-jax embed writes it.")
        self._told = json.loads((folder / "embed.json").read_text())
        sample = _sample(model)
        # Files keep numbers in float32, float16 or bfloat16: the same weights to 1 part in 256.
        if len(sample) != len(self._told["weights"]) or not np.allclose(
            sample, self._told["weights"], rtol=1 / 128, atol=1e-6
        ):
            raise ValueError(
                f"the embeddings in {folder} are another model's: {self._told['model']} made them. "
                "Search with that, or embed the images anew."
            )

    def search(
        self, query: str | Path, top: int, index: Literal["exact", "usearch"] = "exact"
    ) -> list[dict[str, Any]]:
        """Find what is closest to a text, or to the image at a path; see `search`."""
        if isinstance(query, Path):
            features = self._model.encode_image(self._model.preprocess([query]))
        else:
            features = self._model.encode_text(self._model.tokenize([query], truncate=True))
        find = self._embeddings.exact if index == "exact" else self._embeddings.approximate
        results: list[dict[str, Any]] = []
        for row, similarity in zip(*find(unit(features)[0], top), strict=True):
            number, key = self._embeddings.row(int(row))
            results.append({"key": key, "similarity": float(similarity), "index": number})
        return results

    @functools.cached_property
    def _images(self) -> Images:
        try:
            return open_images(self._told["source"], self._told["image_column"])
        except ValueError as error:
            raise ValueError(
                f"the images that {self._folder} was made from are not where they were: {error}"
            ) from error

    def picture(self, index: int) -> Image.Image:
        """Read an image that was found, by its `index`; gray if it is no longer there."""
        try:
            return decode(self._images.image(index))
        except (SampleError, ImageError):
            return Image.new("RGB", (TILE, TILE), "gray")
