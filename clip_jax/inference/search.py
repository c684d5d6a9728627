"""Search embedded images by text or image."""

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
from clip_jax.errors import InputError, check_picture, check_ranges, needing
from clip_jax.evals.pictures import contact_sheet
from clip_jax.inference.embed import KEYS, path_of, read_manifest, rows_of_files, sample
from clip_jax.inference.loading import Model, load, unit
from clip_jax.models.layers import DType
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

BLOCK = 65_536  # embeddings compared at once
TILE = 112  # side of an image on a contact sheet, in pixels
SHEET = 240  # most images on a contact sheet

Method = Literal["exact", "usearch"]
Nearest = tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]  # rows and similarities, best first


def nearest(
    blocks: Iterable[Float[np.ndarray, "B E"]], query: Float[np.ndarray, " E"], count: int
) -> Nearest:
    """Return the rows with the largest products with `query`; ties go to earlier rows."""
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
    """Read `index`, `key`, `embedding` of a file. Raises InputError if it is damaged."""
    try:
        with files.open_file(path) as file:
            table = pq.read_table(file, page_checksum_verification=True)
        return table.select(["index", "key", "embedding"])
    except (pa.ArrowException, OSError, KeyError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{path} is damaged ({why}); delete it and run the same clip-jax embed command again, "
            "which computes only missing files."
        ) from error


class Embeddings:
    """Embeddings of a folder of `rows-*.parquet`, copied to one Arrow file on first use.

    The copy is memory-mapped, and renewed when the folder has changed.
    """

    def __init__(self, folder: AnyPath) -> None:
        paths = sorted(folder.glob("rows-*.parquet"))
        if not paths:
            raise InputError(f"no embeddings in {folder}; write them by clip-jax embed.")
        stats = files.stats([str(path) for path in paths])
        stamp = json.dumps([(x.name, *(stat or ())) for x, stat in zip(paths, stats, strict=True)])
        self._cache = files.beside(folder, "search")
        try:
            self._rows = self._open(stamp)
        except (OSError, ValueError, pa.ArrowException):  # missing, outdated or damaged
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
        files.remove(self._cache / "index.usearch")  # it is outdated, too
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
        """Return the nearest rows by comparison with every embedding."""
        return nearest(self.blocks, query, count)

    def approximate(self, query: Float[np.ndarray, " E"], count: int) -> Nearest:
        """Return the nearest rows by usearch's graph index, which the first use builds."""
        with needing(
            "--index usearch needs the package usearch: pip install 'clip-jax-pods[search]'"
        ):
            from usearch.index import Index
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
    """Search embedded images by text or by image."""

    model: AnyPath  # Model that embedded the images; other weights are an error.
    embeddings: AnyPath  # Folder that `clip-jax embed` wrote.
    text: str = ""  # Text query. Empty: --image is the query.
    image: AnyPath | None = None  # Image query. None: --text is the query.
    top: int = 10  # Number of results.
    index: Method = "exact"  # Search method. exact: all embeddings; usearch: approximate.
    sheet: AnyPath | None = None  # Picture to write, of up to 240 results. None: no picture.
    # Patches per image of a NaFlex model (sequence length). None: as embedded, or the model's own.
    tokens: int | None = None

    def __post_init__(self) -> None:
        if bool(self.text.strip()) == bool(self.image):
            raise InputError("search needs a non-empty --text or --image, and not both.")
        check_ranges(self, top="[1, inf)", tokens="[1, inf)")
        check_picture(self.sheet, "sheet")


def search(config: SearchConfig) -> list[dict[str, Any]]:
    """Return `key`, cosine `similarity` and `index` in the source of the results, best first."""
    files.check_destination(config.sheet, "--sheet", folder=False)
    searcher = Searcher(load_for(config.embeddings, config.model, config.tokens), config.embeddings)
    results = searcher.search(config.image or config.text, config.top, config.index)
    if config.sheet:
        tiles = [center_crop(searcher.picture(x["index"]), TILE) for x in results[:SHEET]]
        lines = [[f"{x['similarity']:.3f}", x["key"]] for x in results]
        title = config.text or str(config.image)
        contact_sheet(config.sheet, tiles, lines, columns=5, title=title)
    return results


def load_for(
    embeddings: AnyPath | None, model: AnyPath, tokens: int | None, dtype: DType = "float32"
) -> Model:
    """Load a model, of NaFlex by default at the sequence length of the embeddings to search."""
    loaded = load(model, tokens=tokens, dtype=dtype)
    manifest = read_manifest(embeddings) if embeddings and loaded.tokens and not tokens else None
    return loaded.with_tokens(manifest.tokens) if manifest and manifest.tokens else loaded


class Searcher:
    """Search with loaded model and embeddings. Raises InputError if another model embedded them."""

    def __init__(self, model: Model, folder: AnyPath) -> None:
        self._model, self._folder = model, folder
        manifest = read_manifest(folder)
        if manifest is None:
            raise InputError(
                f"no embeddings in {folder} (embed.json); write them by clip-jax embed."
            )
        self._manifest = manifest
        self._check_files()
        own = sample(model)
        # Files may round weights to bfloat16, which is precise to 1 part in 256.
        if len(own) != len(manifest.weights) or not np.allclose(
            own, manifest.weights, rtol=1 / 128, atol=1e-6
        ):
            raise InputError(
                f"the embeddings in {folder} are another model's: {manifest.model} made them. "
                "Search with that model, or embed the images again."
            )
        if model.tokens != manifest.tokens:
            raise InputError(
                f"the embeddings in {folder} have tokens={manifest.tokens}, this model has tokens="
                f"{model.tokens} (None: fixed resolution). Leave out --tokens or set it to the "
                "embeddings', or embed the images again."
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
                f"{listed(missing)}. Run the same clip-jax embed command again (every worker) to "
                "compute them."
            )

    def search(
        self, query: str | AnyPath, top: int, index: Method = "exact"
    ) -> list[dict[str, Any]]:
        """Return the results for a text or for the image at a path; see `search`."""
        if isinstance(query, str):
            features = self._model.encode_text(self._model.tokenize([query], truncate=True))
        else:
            features = self._model.encode_image(self._model.preprocess([query]))
        return self.closest(unit(features)[0], top, index)

    def closest(
        self, features: Float[np.ndarray, " E"], top: int, index: Method = "exact"
    ) -> list[dict[str, Any]]:
        """Return the results for a normalised embedding; see `search`."""
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
                f"the images embedded in {self._folder} have moved; bring them back: {error}"
            ) from error
        names = digest(images, keys=KEYS)
        if len(images) != manifest.rows or names != (manifest.digest or names):
            raise InputError(
                f"{manifest.source} has other images than {self._folder} was made from, or in "
                "another order; restore them, or embed them again."
            )
        return images

    def picture(self, index: int) -> Image.Image:
        """Read an image by its `index` in a result; gray if it cannot be read."""
        try:
            return decode(self._images.image(index))
        except (SampleError, ImageError):
            return Image.new("RGB", (TILE, TILE), "gray")
