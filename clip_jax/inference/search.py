"""Search embedded images by text or image."""

import contextlib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Float32, Int
from PIL import Image

from clip_jax.data.images import ImageError, center_crop, complete, decode
from clip_jax.data.sources import SampleError, StoredSource, digest
from clip_jax.data.sources.any import open_images
from clip_jax.data.sources.shards import listed
from clip_jax.errors import InputError, check_picture, check_ranges, needing
from clip_jax.evals.pictures import contact_sheet
from clip_jax.inference.embed import (
    KEYS,
    Manifest,
    are_unit,
    path_of,
    read_manifest,
    read_skipped,
    sample,
)
from clip_jax.inference.loading import Model, load, unit
from clip_jax.models.layers import DType
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

BLOCK = 65_536  # embeddings compared at once
FEW = 10_000  # embeddings whose graph one thread builds: with several, searches miss some of few
_CHECKS = 1  # version of the checks that the copy of the rows has passed
_EXAMPLES = 5  # missing files that a message names
_ROUNDING = 1e-5  # more than the rounding error of a cosine in float32
TILE = 112  # side of an image on a contact sheet, in pixels
SHEET = 240  # most images on a contact sheet

Method = Literal["exact", "usearch"]
Nearest = tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]  # rows and similarities, best first


def nearest(
    blocks: Iterable[Float[np.ndarray, "_ E"]], query: Float[np.ndarray, " E"], count: int
) -> Nearest:
    """Return the rows with the largest products with `query`; ties go to earlier rows."""
    rows, similarities, start = [np.empty(0, np.int64)], [np.empty(0, np.float32)], 0
    for block in blocks:
        products = block @ query
        worst = np.partition(products, -count)[-count] if len(block) > count else -np.inf
        good = np.flatnonzero(products >= worst - _ROUNDING)
        rows.append(start + good)
        similarities.append(_rounded(block[good], query))
        start += len(block)
    return _ranked(np.concatenate(rows), np.concatenate(similarities), count)


def _rounded(
    embeddings: Float[np.ndarray, "B E"], query: Float[np.ndarray, " E"]
) -> Float32[np.ndarray, " B"]:
    """Return products that are equal for equal rows, unlike those of BLAS in float32."""
    return np.einsum("be,e->b", embeddings, query, dtype=np.float64).astype(np.float32)


def _ranked(
    rows: Int[np.ndarray, " n"], similarities: Float32[np.ndarray, " n"], count: int
) -> Nearest:
    order = np.lexsort((rows, -similarities))[:count]
    return rows[order], similarities[order]


def read_rows(folder: AnyPath, rows: range, width: int) -> pa.Table:
    """Read `index`, `key`, `embedding` of the file of these rows. Raises InputError if it is
    damaged, or has other rows."""
    path = path_of(folder, rows)
    try:
        with files.open_file(path) as file:
            table = pq.read_table(file, page_checksum_verification=True)
        read_skipped(table.schema.metadata, len(table), rows)
        _check_rows(table, rows, width)
    except (pa.ArrowException, OSError, ValueError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{path} is damaged ({why}); delete it and run the same clip-jax embed command again, "
            "which computes only missing files."
        ) from error
    return table.replace_schema_metadata(None)


def _check_rows(table: pa.Table, rows: range, width: int) -> None:
    """Raise ValueError unless all rows are usable embeddings of the model, of the file's rows."""
    kind = pa.list_(pa.float32(), width)
    schema = pa.schema({"index": pa.int64(), "key": pa.string(), "embedding": kind})
    if not table.schema.equals(schema):
        columns = ", ".join(f"{x.name}: {x.type}" for x in table.schema)
        raise ValueError(f"its columns are {columns}; the model's are embedding: {kind}")
    vectors = table["embedding"].combine_chunks().flatten()
    if any(column.null_count for column in (*table.columns, vectors)):
        raise ValueError("it has empty cells")
    index = table["index"].to_numpy()
    if len(index) and not (rows.start <= index[0] and index[-1] < rows.stop):
        raise ValueError(f"it has rows {index[0]} to {index[-1]}")
    if (np.diff(index) <= 0).any():
        raise ValueError("its rows are not in order")
    unusable = np.count_nonzero(~are_unit(vectors.to_numpy().reshape(-1, width)))
    if unusable:
        raise ValueError(f"{unusable} of {len(table)} embeddings are not finite or not of length 1")


class Embeddings:
    """Embeddings of a folder, checked and copied to one Arrow file on first use.

    The copy is memory-mapped, and renewed when a file has changed.
    """

    def __init__(self, folder: AnyPath, manifest: Manifest, width: int) -> None:
        rows = list(manifest.each_file())
        paths = [path_of(folder, some) for some in rows]
        stats = files.stats([str(path) for path in paths])
        names = [(x.name, *(stat or ())) for x, stat in zip(paths, stats, strict=True)]
        stamp = hashlib.sha256(json.dumps([_CHECKS, width, names]).encode()).hexdigest()
        self._cache = files.beside(folder, "search")
        self._index = self._cache / f"{stamp[:24]}.usearch"
        try:
            self._rows = self._open(stamp)
        except (OSError, ValueError, pa.ArrowException):  # missing, outdated or damaged
            self._copy(folder, rows, width, stamp)
            self._rows = self._open(stamp)
        self.blocks: list[Float[np.ndarray, "B E"]] = [
            chunk.flatten().to_numpy().reshape(-1, width)
            for chunk in self._rows["embedding"].chunks
        ]
        self._starts = np.cumsum([0, *map(len, self.blocks)])

    def _open(self, stamp: str) -> pa.Table:
        files.check_kind(self._cache / "rows.arrow")
        with pa.memory_map(str(self._cache / "rows.arrow")) as file:
            table = pa.ipc.open_file(file).read_all()
        if table.schema.metadata != {b"files": stamp.encode()}:
            raise ValueError("the folder has changed")
        return table

    def _copy(self, folder: AnyPath, rows: Sequence[range], width: int, stamp: str) -> None:
        for path in self._cache.glob("*.usearch"):  # they are outdated, too
            files.remove(path)
        schema = read_rows(folder, rows[0], width).schema.with_metadata({"files": stamp})
        with (
            files.written_whole(self._cache / "rows.arrow") as partial,
            pa.ipc.new_file(str(partial), schema) as writer,
        ):
            tables = []
            for some in rows:
                tables.append(read_rows(folder, some, width))
                if sum(map(len, tables)) >= BLOCK or some is rows[-1]:
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
        graph = None
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # missing or damaged
            graph = Index.restore(str(self._index), view=True)
        if graph is None or len(graph) != len(self):
            built = Index(ndim=len(query), metric="ip", dtype="f32")
            threads = 1 if len(self) <= FEW else 0  # 0: all cores
            for block in self.blocks:
                built.add(len(built) + np.arange(len(block)), block, threads=threads)
            with files.written_whole(self._index) as partial:
                built.save(str(partial))
            graph = Index.restore(str(self._index), view=True)
        count = min(count, len(self))
        rows = graph.search(query, count).keys.astype(np.int64)
        if len(rows) < count:  # some rows cannot be reached from where a search begins
            return self.exact(query, count)
        return _ranked(rows, _rounded(self._vectors(rows), query), count)

    def _vectors(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n E"]:
        blocks = np.searchsorted(self._starts, rows, side="right") - 1
        return np.stack(
            [
                self.blocks[block][row - self._starts[block]]
                for row, block in zip(rows, blocks, strict=True)
            ]
        )


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
    # Number of first channels of embeddings (Matryoshka). None: as embedded, or all.
    dim: int | None = None

    def __post_init__(self) -> None:
        if bool(self.text.strip()) == bool(self.image):
            raise InputError("search needs a non-empty --text or --image, and not both.")
        check_ranges(self, top="[1, inf)", tokens="[1, inf)", dim="[1, inf)")
        check_picture(self.sheet, "sheet")


def search(config: SearchConfig) -> list[dict[str, Any]]:
    """Return `key`, cosine `similarity` and `index` in the source of the results, best first."""
    files.check_destination(config.sheet, "--sheet", folder=False)
    model = load_for(config.embeddings, config.model, tokens=config.tokens, dim=config.dim)
    searcher = Searcher(model, config.embeddings)
    try:
        results = searcher.search(config.image or config.text, config.top, config.index)
    except ImageError as error:
        raise InputError(f"--image {config.image}: {error}. Correct the path.") from error
    if config.sheet:
        fit = center_crop if searcher.tokens is None else complete  # what the model saw
        tiles = [fit(searcher.picture(x["index"]), TILE) for x in results[:SHEET]]
        lines = [[f"{x['similarity']:.3f}", x["key"]] for x in results]
        title = config.text or str(config.image)
        contact_sheet(config.sheet, tiles, lines, columns=5, title=title)
    return results


def load_for(
    embeddings: AnyPath | None,
    model: AnyPath,
    *,
    tokens: int | None,
    dim: int | None,
    dtype: DType = "float32",
) -> Model:
    """Load a model, by default with the width of the embeddings to search and, of NaFlex, at their
    sequence length."""
    loaded = load(model, tokens=tokens, dim=dim, dtype=dtype)
    manifest = read_manifest(embeddings) if embeddings else None
    if manifest is None:
        return loaded
    if loaded.tokens and manifest.tokens and not tokens:
        loaded = loaded.with_tokens(manifest.tokens)
    if manifest.dim and manifest.dim < loaded.config.embed_dim and not dim:
        loaded = loaded.with_dim(manifest.dim)
    return loaded


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
        if manifest.dim not in (None, model.config.embed_dim):
            raise InputError(
                f"the embeddings in {folder} have dim={manifest.dim}, this model has dim="
                f"{model.config.embed_dim}. Leave out --dim or set it to the embeddings', or embed "
                "the images again."
            )
        current = sample(model)
        # Files may round weights to bfloat16, which is precise to 1 part in 256.
        if len(current) != len(manifest.weights) or not np.allclose(
            current, manifest.weights, rtol=1 / 128, atol=1e-6
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
        self._embeddings = Embeddings(folder, manifest, model.config.embed_dim)
        if not len(self._embeddings):
            raise InputError(
                f"{folder} has no embeddings: all {manifest.rows} images were skipped. Embed "
                "images that can be read."
            )

    def _check_files(self) -> None:
        """Raise InputError unless the folder has the files of all rows, and no others."""
        manifest, folder = self._manifest, self._folder
        names = sorted(path.name for path in folder.glob("rows-*.parquet"))
        if extra := [name for name in names if not self._is_expected(name)]:
            raise InputError(
                f"{folder} has files that its embed.json does not describe: {listed(extra)}. Move "
                "them to another folder."
            )
        if missing := manifest.files - len(names):
            written = {*names}
            each = (path_of(folder, some).name for some in manifest.each_file())
            examples = list(itertools.islice((x for x in each if x not in written), _EXAMPLES))
            more = f" and {missing - len(examples)} more" if missing > len(examples) else ""
            raise InputError(
                f"{folder} lacks {missing} of {manifest.files} files of embeddings: "
                f"{', '.join(examples)}{more}. Run the same clip-jax embed command again (every "
                "worker) to compute them."
            )

    def _is_expected(self, name: str) -> bool:
        start = re.match(r"rows-(\d{1,18})-", name)
        row = int(start[1]) if start else self._manifest.rows
        if row >= self._manifest.rows:
            return False
        return path_of(self._folder, self._manifest.file_of(row)).name == name

    @property
    def tokens(self) -> int | None:
        """Maximum number of patches per image of a NaFlex model; None: fixed resolution."""
        return self._model.tokens

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
        if not are_unit(features[None])[0]:
            raise InputError(
                "the query's embedding is not finite, or zero; search by another text or image."
            )
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
