"""Search an embedded folder by text or image."""

import functools
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int
from PIL import Image

from clip_jax.data.images import ImageError, center_crop, decode
from clip_jax.data.sources import SampleError, StoredSource, digest
from clip_jax.data.sources.any import open_images
from clip_jax.data.sources.shards import listed
from clip_jax.errors import InputError, check_picture, check_ranges
from clip_jax.evals.pictures import contact_sheet
from clip_jax.inference.embed import KEYS, path_of, read_manifest, rows_of_files, sample
from clip_jax.inference.loading import Model, load, unit
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

BLOCK = 65_536  # vectors that are compared at a time
TILE = 112  # pixels of a picture on a contact sheet
SHEET = 240  # pictures on a sheet at most

Method = Literal["exact", "usearch"]
Nearest = tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]  # rows and similarities, best first


def nearest(
    blocks: Iterable[Float[np.ndarray, "B E"]], query: Float[np.ndarray, " E"], count: int
) -> Nearest:
    """Find the rows with the largest products; of equal ones the earlier row wins."""
    rows, similarities, start = [np.empty(0, np.int64)], [np.empty(0, np.float32)], 0
    for block in blocks:
        products = block @ query
        worst = np.partition(products, -count)[-count] if len(block) > count else -np.inf
        good = np.flatnonzero(products >= worst)
        rows.append(start + good)
        similarities.append(products[good])
        start += len(block)
    row, similarity = np.concatenate(rows), np.concatenate(similarities)
    order = np.lexsort((row, -similarity))[:count]
    return row[order], similarity[order]


def read_rows(path: AnyPath) -> pa.Table:
    """Read one file that `clip-jax embed` wrote: `index`, `key`, `embedding`. Raises InputError if
    it is damaged."""
    try:
        with files.open_file(path) as file:
            table = pq.read_table(file, page_checksum_verification=True)
        return table.select(["index", "key", "embedding"])
    except (pa.ArrowException, OSError, KeyError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{path} is damaged ({why}); delete it and run the same clip-jax embed again, which "
            "makes only what is missing."
        ) from error


class Embeddings:
    """A folder of `rows-*.parquet`. The first use copies them to one Arrow file, which is mapped
    from disk from then on; it is made anew when the folder has changed."""

    def __init__(self, folder: AnyPath) -> None:
        paths = sorted(folder.glob("rows-*.parquet"))
        if not paths:
            raise InputError(f"no embeddings in {folder}; clip-jax embed writes them.")
        stats = files.stats([str(path) for path in paths])
        stamp = json.dumps([(x.name, *(stat or ())) for x, stat in zip(paths, stats, strict=True)])
        self._cache = files.beside(folder, "search")
        try:
            self._rows = self._open(stamp)
        except (OSError, ValueError, pa.ArrowException):  # none, of other files, or damaged
            self._copy(paths, stamp)
            self._rows = self._open(stamp)
        chunks, width = self._rows["embedding"].chunks, self._rows["embedding"].type.list_size
        self.blocks: list[Float[np.ndarray, "B E"]] = [
            chunk.flatten().to_numpy().reshape(-1, width) for chunk in chunks
        ]

    def _open(self, stamp: str) -> pa.Table:
        with pa.memory_map(str(self._cache / "rows.arrow")) as file:
            table = pa.ipc.open_file(file).read_all()
        if table.schema.metadata != {b"files": stamp.encode()}:
            raise ValueError("the folder has changed")
        return table

    def _copy(self, paths: list[AnyPath], stamp: str) -> None:
        files.remove(self._cache / "index.usearch")  # of what is out of date
        schema = read_rows(paths[0]).schema.with_metadata({"files": stamp})
        with (
            files.written_whole(self._cache / "rows.arrow") as partial,
            pa.ipc.new_file(str(partial), schema) as writer,
        ):
            tables = []
            for path in paths:
                tables.append(read_rows(path))
                if sum(map(len, tables)) >= BLOCK or path is paths[-1]:
                    writer.write_table(pa.concat_tables(tables).combine_chunks(), BLOCK)
                    tables = []

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, row: int) -> tuple[int, str]:
        """Return a row's index in the source and its key."""
        return self._rows["index"][row].as_py(), self._rows["key"][row].as_py()

    def exact(self, query: Float[np.ndarray, " E"], count: int) -> Nearest:
        """Compare with every vector."""
        return nearest(self.blocks, query, count)

    def approximate(self, query: Float[np.ndarray, " E"], count: int) -> Nearest:
        """Ask usearch's graph, which the first use builds."""
        try:
            from usearch.index import Index
        except ImportError as error:
            raise InputError(
                "--index usearch needs the package: pip install 'clip-jax-pods[search]'"
            ) from error
        path = self._cache / "index.usearch"
        if not path.exists():
            index = Index(ndim=len(query), metric="ip", dtype="f32")
            for block in self.blocks:
                index.add(len(index) + np.arange(len(block)), block)
            with files.written_whole(path) as partial:
                index.save(str(partial))
        index = Index.restore(str(path), view=True)
        matches = index.search(query, min(count, len(self)))
        return matches.keys.astype(np.int64), (1 - matches.distances).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The images of an embedded folder that are closest to a text or an image."""

    model: AnyPath  # the model that embedded them
    embeddings: AnyPath  # folder that `clip-jax embed` wrote
    text: str = ""  # what to look for, in words
    image: AnyPath | None = None  # what to look for, as an image
    top: int = 10  # how many to return
    index: Method = "exact"  # usearch: approximate, for very many (an extra)
    sheet: AnyPath | None = None  # picture of the results, at most 240

    def __post_init__(self) -> None:
        if bool(self.text.strip()) == bool(self.image):
            raise InputError("search needs one of --text and --image, and no empty text.")
        check_ranges(self, top="[1, inf)")
        check_picture(self.sheet, "sheet")


def search(config: SearchConfig) -> list[dict[str, Any]]:
    """Return `key`, `similarity` (cosine) and `index` in the source of the best, best first."""
    files.check_destination(config.sheet, "--sheet", folder=False)
    searcher = Searcher(load(config.model), config.embeddings)
    results = searcher.search(config.image or config.text, config.top, config.index)
    if config.sheet:
        tiles = [center_crop(searcher.picture(x["index"]), TILE) for x in results[:SHEET]]
        lines = [[f"{x['similarity']:.3f}", x["key"]] for x in results]
        title = config.text or str(config.image)
        contact_sheet(config.sheet, tiles, lines, columns=5, title=title)
    return results


class Searcher:
    """An embedded folder beside its model. Raises InputError if another model embedded it."""

    def __init__(self, model: Model, folder: AnyPath) -> None:
        self._model, self._folder = model, folder
        manifest = read_manifest(folder)
        if manifest is None:
            raise InputError(f"no embeddings in {folder} (embed.json); clip-jax embed writes them.")
        self._manifest = manifest
        self._check_files()
        own = sample(model)
        # Files keep numbers in float32, float16 or bfloat16: the same weights to 1 part in 256.
        if len(own) != len(manifest.weights) or not np.allclose(
            own, manifest.weights, rtol=1 / 128, atol=1e-6
        ):
            raise InputError(
                f"the embeddings in {folder} are another model's: {manifest.model} made them. "
                "Search with that, or embed the images anew."
            )
        self._embeddings = Embeddings(folder)

    def _check_files(self) -> None:
        """Raise InputError unless the files hold all rows."""
        manifest = self._manifest
        written = {path.name for path in self._folder.iterdir()}
        rows = (
            rows_of_files(manifest.rows, number, manifest.parts, manifest.rows_per_file)
            for number in range(manifest.parts)
        )
        names = [path_of(self._folder, some).name for some in itertools.chain(*rows)]
        if missing := [name for name in names if name not in written]:
            raise InputError(
                f"{self._folder} lacks {len(missing)} of {len(names)} files of embeddings: "
                f"{listed(missing)}. Run the same clip-jax embed again (each of its parts), which "
                "makes what is missing."
            )

    def search(
        self, query: str | AnyPath, top: int, index: Method = "exact"
    ) -> list[dict[str, Any]]:
        """Find what is closest to a text, or to the image at a path; see `search`."""
        if isinstance(query, str):
            features = self._model.encode_text(self._model.tokenize([query], truncate=True))
        else:
            features = self._model.encode_image(self._model.preprocess([query]))
        return self.closest(unit(features)[0], top, index)

    def closest(
        self, features: Float[np.ndarray, " E"], top: int, index: Method = "exact"
    ) -> list[dict[str, Any]]:
        """Find what is closest to an embedding of unit length; see `search`."""
        find = self._embeddings.exact if index == "exact" else self._embeddings.approximate
        results: list[dict[str, Any]] = []
        for row, similarity in zip(*find(features, top), strict=True):
            number, key = self._embeddings.row(int(row))
            results.append({"key": key, "similarity": float(similarity), "index": number})
        return results

    @functools.cached_property
    def _images(self) -> StoredSource:
        manifest = self._manifest
        try:
            images = open_images(manifest.source, manifest.image_column)
        except InputError as error:
            raise InputError(
                f"the images that {self._folder} was made from are not where they were: {error}"
            ) from error
        names = digest(images, keys=KEYS)
        if len(images) != manifest.rows or names != (manifest.digest or names):
            raise InputError(
                f"{manifest.source} has other images than {self._folder} was made from, or in "
                "another order; bring them back, or embed them anew."
            )
        return images

    def picture(self, index: int) -> Image.Image:
        """Read an image that was found, by its `index`; gray if it is no longer there."""
        try:
            return decode(self._images.image(index))
        except (SampleError, ImageError):
            return Image.new("RGB", (TILE, TILE), "gray")
