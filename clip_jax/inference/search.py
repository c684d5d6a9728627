"""Search embedded images by text or image."""

import contextlib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from clip_jax.display import say
from clip_jax.errors import InputError, check_picture, check_ranges, needing
from clip_jax.evals.pictures import contact_sheet
from clip_jax.inference import stored
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
from clip_jax.inference.stored import BLOCK, Block, Floats, Store, floats
from clip_jax.models.layers import DType
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

FEW = 10_000  # embeddings whose graph one thread builds: with several, searches miss some of few
_CHECKS = 2  # version of the checks that the copy of the rows has passed
_EXAMPLES = 5  # missing files that a message names
_QUERIES = 64  # embeddings that are queries for the stated recall
_RECALL = 10  # nearest embeddings of each of these
_ROUNDING = 1e-5  # more than the rounding error of a cosine in float32
TILE = 112  # side of an image on a contact sheet, in pixels
SHEET = 240  # most images on a contact sheet

Method = Literal["exact", "usearch"]
Nearest = tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]  # rows and similarities, best first
Find = Callable[[Float[np.ndarray, " E"], int], Nearest]


def nearest(blocks: Iterable[Block], query: Float[np.ndarray, " E"], count: int) -> Nearest:
    """Return the rows with the largest products with `query`; ties go to earlier rows."""
    best, start = _nothing(), 0
    for block in blocks:
        good = _candidates(block.products(query), best, count, _ROUNDING)
        of_block = start + good, _rounded(block.vectors(good), query)
        best = _merged([best, of_block], count)
        start += len(block)
    return best


def nearest_signs(
    blocks: Iterable[Block], query: Float[np.ndarray, " E"], count: int
) -> Int[np.ndarray, " k"]:
    """Return the rows whose signs have the largest products with `query`."""
    best, start, tables = _nothing(), 0, stored.sign_tables(query)
    for block in blocks:
        products = block.sign_products(tables)
        good = _candidates(products, best, count, 0)
        best = _merged([best, (start + good, products[good])], count)
        start += len(block)
    return best[0]


def _nothing() -> Nearest:
    return np.empty(0, np.int64), np.empty(0, np.float32)


def _candidates(
    products: Float[np.ndarray, " B"], best: Nearest, count: int, rounding: float
) -> Int[np.ndarray, " n"]:
    """Return the rows of a block that may be among the `count` best of all blocks."""
    worst = best[1][-1] if len(best[1]) == count else -np.inf
    if len(products) > count:
        worst = max(worst, np.partition(products, -count)[-count])
    return np.flatnonzero(products >= worst - rounding)


def _merged(results: Sequence[tuple[np.ndarray, np.ndarray]], count: int) -> Nearest:
    rows, similarities = map(np.concatenate, zip(*results, strict=True))
    return _ranked(rows, similarities, count)


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


def read_rows(folder: AnyPath, rows: range, width: int, embedded: Floats = "float32") -> pa.Table:
    """Read `index`, `key`, `embedding` of the file of these rows. Raises InputError if it is
    damaged, or has other rows."""
    path = path_of(folder, rows)
    try:
        with files.open_file(path) as file:
            table = pq.read_table(file, page_checksum_verification=True)
        read_skipped(table.schema.metadata, len(table), rows)
        _check_rows(table, rows, stored.schema(embedded, width))
    except (pa.ArrowException, OSError, ValueError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{path} is damaged ({why}); delete it and run the same clip-jax embed command again, "
            "which computes only missing files."
        ) from error
    return table.replace_schema_metadata(None)


def _check_rows(table: pa.Table, rows: range, expected: pa.Schema) -> None:
    """Raise ValueError unless all rows are usable embeddings of the model, of the file's rows."""
    if not table.schema.equals(expected):
        columns = ", ".join(f"{x.name}: {x.type}" for x in table.schema)
        kind = expected.field("embedding").type
        raise ValueError(f"its columns are {columns}; the model's are embedding: {kind}")
    flat = table["embedding"].combine_chunks().flatten()
    if any(column.null_count for column in (*table.columns, flat)):
        raise ValueError("it has empty cells")
    index = table["index"].to_numpy()
    if len(index) and not (rows.start <= index[0] and index[-1] < rows.stop):
        raise ValueError(f"it has rows {index[0]} to {index[-1]}")
    if (np.diff(index) <= 0).any():
        raise ValueError("its rows are not in order")
    unusable = np.count_nonzero(~are_unit(floats(table)))
    if unusable:
        raise ValueError(f"{unusable} of {len(table)} embeddings are not finite or not of length 1")


class _Sample:
    """Embeddings that are queries, with the `index` of the nearest of each but for itself."""

    def __init__(self, tables: Iterable[pa.Table], each: int) -> None:
        """Draw so many rows of each table."""
        some = pa.concat_tables(
            x.take(np.linspace(0, len(x) - 1, min(each, len(x))).astype(int)) for x in tables
        )
        self.vectors = floats(some)
        self._own = some["index"].to_numpy()
        self.nearest = np.empty((len(some), 0), np.int64)
        self._similarities = np.empty((len(some), 0), np.float32)

    def compare(self, table: pa.Table) -> None:
        """Take the nearest from these and earlier embeddings."""
        products = self.vectors @ floats(table).T
        index = np.broadcast_to(table["index"].to_numpy(), products.shape)
        products[index == self._own[:, None]] = -np.inf
        products = np.concatenate([self._similarities, products], axis=1)
        index = np.concatenate([self.nearest, index], axis=1)
        best = np.argpartition(-products, min(_RECALL, products.shape[1]) - 1)[:, :_RECALL]
        self.nearest = np.take_along_axis(index, best, axis=1)
        self._similarities = np.take_along_axis(products, best, axis=1)

    def recall(self, find: Callable[[Float32[np.ndarray, " E"], int], list[int]]) -> float:
        """Return the share of the nearest embeddings that a search by `index` finds."""
        shares = []
        for query, own, nearest in zip(self.vectors, self._own, self.nearest, strict=True):
            exact = {*nearest.tolist()} - {own}
            results = [x for x in find(query, _RECALL + 1) if x != own][:_RECALL]
            shares.append(len(exact & {*results}) / max(1, len(exact)))
        return float(np.mean(shares or [1]))


class Embeddings:
    """Embeddings of a folder, checked and copied to one Arrow file on first use.

    The copy has the type `store`, is memory-mapped, and is renewed when a file has changed. Of
    another type than the folder's, its recall is measured and stated.
    """

    def __init__(
        self, folder: AnyPath, manifest: Manifest, width: int, store: Store | None = None
    ) -> None:
        self.store, self._embedded = stored.narrower(store, manifest.store), manifest.store
        self._folder, self._rows, self._width = folder, list(manifest.each_file()), width
        paths = [path_of(folder, some) for some in self._rows]
        stats = files.stats([str(path) for path in paths])
        names = [(x.name, *(stat or ())) for x, stat in zip(paths, stats, strict=True)]
        weights = hashlib.sha256(json.dumps(manifest.weights).encode()).hexdigest()
        types = [self.store, self._embedded]
        stamp = hashlib.sha256(json.dumps([_CHECKS, width, types, weights, names]).encode())
        self._about = {
            "files": stamp.hexdigest(),
            "model": manifest.model,
            "weights": weights,
            "width": str(width),
            "store": self.store,
        }
        self._cache = files.beside(folder, "search")
        self._path = self._cache / f"{self.store}.arrow"
        self._index = self._cache / f"{self.store}-{stamp.hexdigest()[:24]}.usearch"
        try:
            self._open(self._path)
        except (OSError, ValueError, pa.ArrowException):  # missing, outdated or damaged
            self._copy()
            self._open(self._path)

    def _open(self, path: Path) -> None:
        files.check_kind(path)
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            if reader.schema.metadata != {k.encode(): x.encode() for k, x in self._about.items()}:
                raise ValueError("the folder has changed")
            numbers = range(reader.num_record_batches)
            batches = [reader.get_batch_with_custom_metadata(i) for i in numbers]
        self._batches = [batch for batch, _ in batches]
        self.blocks = [stored.decode(*both, self.store) for both in batches]
        self._starts = np.cumsum([0, *map(len, self.blocks)])

    def _copy(self) -> None:
        old = [*self._cache.glob(f"{self.store}-*.usearch"), self._cache / "rows.arrow"]
        for path in old:  # outdated graphs, and the copy of earlier versions
            files.remove(path)
        sample = self._sample() if self.store != self._embedded else None
        columns = stored.schema(self.store, self._width).with_metadata(self._about)
        with files.written_whole(self._path) as partial:
            with pa.ipc.new_file(str(partial), columns) as writer:
                for table in self._tables():
                    if sample:
                        sample.compare(table)
                    writer.write_batch(*stored.encode(table, self.store))
            if sample:
                self._open(partial)
                self._state(sample)

    def _tables(self) -> Iterator[pa.Table]:
        """Yield all embeddings in tables of at most BLOCK rows."""
        tables = []
        for some in self._rows:
            tables.append(read_rows(self._folder, some, self._width, self._embedded))
            if sum(map(len, tables)) >= BLOCK or some is self._rows[-1]:
                joined = pa.concat_tables(tables)
                yield from (joined.slice(i, BLOCK) for i in range(0, len(joined), BLOCK))
                tables = []

    def _sample(self) -> _Sample:
        """Draw queries from files that are evenly spaced."""
        numbers = sorted({i * len(self._rows) // _QUERIES for i in range(_QUERIES)})
        rows = [self._rows[i] for i in numbers]
        tables = (read_rows(self._folder, x, self._width, self._embedded) for x in rows)
        return _Sample(tables, -(-_QUERIES // len(rows)))

    def _state(self, sample: _Sample) -> None:
        """Show and write recall, bytes and memory of the copy."""
        each = stored.stored_bytes(self.store, self._width)
        read = len(self) * stored.compared_bytes(self.store, self._width)
        needed = stored.needed_bytes(self.store, self._width)
        recall = self._recall(sample, self.exact)
        say(
            f"{len(self)} embeddings in {self.store}, {each} bytes each: {recall}. A search reads "
            f"{read / 2**20:.1f} MiB of a mapped file and needs {needed / 2**20:.1f} MiB beside it."
        )
        values = {"bytes_per_embedding": each, "bytes_read": read, "bytes_needed": needed}
        self._write(self.store, recall=recall, **values)

    def _recall(self, sample: _Sample, find: Find) -> str:
        def indices(query: Float32[np.ndarray, " E"], count: int) -> list[int]:
            return [self.row(int(row))[0] for row in find(query, count)[0]]

        recall, count = sample.recall(indices), len(sample.vectors)
        return f"recall@{_RECALL} against {self._embedded} {recall:.1%} ({count} images as queries)"

    def _write(self, name: str, **values: int | str) -> None:
        about = self._about | {"rows": len(self), "embedded": self._embedded} | values
        files.write_whole(self._cache / f"{name}.json", json.dumps(about, indent=1))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, row: int) -> tuple[int, str]:
        """Return a row's index in the source and its key."""
        block = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch, i = self._batches[block], row - int(self._starts[block])
        return batch["index"][i].as_py(), batch["key"][i].as_py()

    def exact(self, query: Float[np.ndarray, " E"], count: int) -> Nearest:
        """Return the nearest rows by comparison with every stored embedding.

        Of signs, the best are compared again by their int8 embeddings.
        """
        if self.store != "binary":
            return nearest(self.blocks, query, count)
        rows = nearest_signs(self.blocks, query, stored.candidates(self.store, count))
        return self._again(rows, query, count)

    def approximate(self, query: Float[np.ndarray, " E"], count: int) -> Nearest:
        """Return the nearest rows by usearch's graph index, which the first use builds.

        The best are compared again by their stored embeddings.
        """
        return self._by(self._graph, query, count)

    def open_graph(self) -> None:
        """Open the graph, and build it if it is missing or outdated."""
        _ = self._graph

    def _by(self, graph: Any, query: Float[np.ndarray, " E"], count: int) -> Nearest:
        count = min(count, len(self))
        wanted = min(stored.candidates(self.store, count), len(self))
        for_graph = stored.pack_signs(query[None])[0] if self.store == "binary" else query
        rows = graph.search(for_graph, wanted).keys.astype(np.int64)
        if len(rows) < count:  # some rows cannot be reached from where a search begins
            return self.exact(query, count)
        return self._again(rows, query, count)

    @functools.cached_property
    def _graph(self) -> Any:
        with needing(
            "--index usearch needs the package usearch: pip install 'clip-jax-pods[search]'"
        ):
            from usearch.index import Index
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # missing or damaged
            graph = Index.restore(str(self._index), view=True)
            if graph is not None and len(graph) == len(self):
                return graph
        built = Index(**stored.graph(self.store, self._width))
        threads = 1 if len(self) <= FEW else 0  # 0: all cores
        for block in self.blocks:
            vectors = block.for_graph()
            built.add(len(built) + np.arange(len(block)), vectors, threads=threads)
        with files.written_whole(self._index) as partial:
            built.save(str(partial))
        del built
        graph = Index.restore(str(self._index), view=True)
        self._state_graph(graph)
        return graph

    def _state_graph(self, graph: Any) -> None:
        """Show and write recall and bytes of a graph."""
        sample = self._sample()
        for table in self._tables():
            sample.compare(table)
        recall = self._recall(sample, functools.partial(self._by, graph))
        each = self._index.stat().st_size // len(self)
        say(f"{len(self)} embeddings in a graph of {self.store}, {each} bytes each: {recall}.")
        self._write(f"{self.store}-usearch", recall=recall, bytes_per_embedding=each)

    def _again(
        self, rows: Int[np.ndarray, " n"], query: Float[np.ndarray, " E"], count: int
    ) -> Nearest:
        return _ranked(rows, _rounded(self._vectors(rows), query), count)

    def _vectors(self, rows: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n E"]:
        vectors = np.empty((len(rows), self._width), np.float32)
        blocks = np.searchsorted(self._starts, rows, side="right") - 1
        for block in np.unique(blocks):
            of_block = blocks == block
            vectors[of_block] = self.blocks[block].vectors(rows[of_block] - self._starts[block])
        return vectors


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Search embedded images by text or by image."""

    model: AnyPath  # Model that embedded the images; other weights are an error.
    embeddings: AnyPath  # Folder that `clip-jax embed` wrote.
    text: str = ""  # Text query. Empty: --image is the query.
    image: AnyPath | None = None  # Image query. None: --text is the query.
    top: int = 10  # Number of results.
    index: Method = "exact"  # Search method. exact: all embeddings; usearch: approximate.
    # Type of the stored embeddings that are compared; int8 and binary take less memory and find
    # most of the same images. None: as embedded.
    store: Store | None = None
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
    searcher = Searcher(model, config.embeddings, config.store, config.index)
    try:
        results = searcher.search(config.image or config.text, config.top)
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

    def __init__(
        self,
        model: Model,
        folder: AnyPath,
        store: Store | None = None,
        index: Method = "exact",
    ) -> None:
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
        self._embeddings = Embeddings(folder, manifest, model.config.embed_dim, store)
        if not len(self._embeddings):
            raise InputError(
                f"{folder} has no embeddings: all {manifest.rows} images were skipped. Embed "
                "images that can be read."
            )
        self._find = self._embeddings.exact
        if index == "usearch":
            self._embeddings.open_graph()  # here, since servers search from several threads
            self._find = self._embeddings.approximate

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

    def search(self, query: str | AnyPath, top: int) -> list[dict[str, Any]]:
        """Return the results for a text or for the image at a path; see `search`."""
        if isinstance(query, str):
            features = self._model.encode_text(self._model.tokenize([query], truncate=True))
        else:
            features = self._model.encode_image(self._model.preprocess([query]))
        return self.closest(unit(features)[0], top)

    def closest(self, features: Float[np.ndarray, " E"], top: int) -> list[dict[str, Any]]:
        """Return the results for a normalised embedding; see `search`."""
        if not are_unit(features[None])[0]:
            raise InputError(
                "the query's embedding is not finite, or zero; search by another text or image."
            )
        results: list[dict[str, Any]] = []
        for row, similarity in zip(*self._find(features, top), strict=True):
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
