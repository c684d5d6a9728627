"""Types of stored embeddings: floats, 8-bit integers and signs. No other file knows them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32, Int, Shaped, UInt8, UInt16

from clip_jax.errors import InputError

Floats = Literal["float32", "float16"]
Store = Literal["float32", "float16", "int8", "binary"]  # from the most precise to the smallest

BLOCK = 65_536  # embeddings of a block
_CHUNK = 2_048  # embeddings converted to float32 at once: they stay in a core's cache
_LEVELS = 255  # steps of int8
_WORD = 16  # signs of a word
_LONGEST = 1.1  # more than a coordinate of a normalised embedding
_ROWS = {"float32": "float32", "float16": "float16", "int8": "int8", "binary": "int8"}


def candidates(store: Store, count: int) -> int:
    """Return how many embeddings are compared again, with the float query, for `count` results."""
    return {"float32": count, "float16": count, "int8": 4 * count}.get(store, 640 + 8 * count)


def narrower(store: Store | None, embedded: Floats) -> Store:
    """Return the store to search, by default the embeddings' own. Raises InputError if that one is
    less precise."""
    order = get_args(Store)
    if store is not None and order.index(store) < order.index(embedded):
        raise InputError(
            f"store={store!r}: the embeddings are stored in {embedded}, which is less precise. "
            f"Leave out --store, or set it to {', '.join(order[order.index(embedded) :])}."
        )
    return store or embedded


@dataclass(frozen=True)
class Block:
    """Consecutive stored embeddings. Those in int8 have a least value and a step per dimension."""

    rows: Shaped[np.ndarray, "B E"]
    ranges: Float32[np.ndarray, "2 E"] | None = None
    signs: tuple[UInt16[np.ndarray, " B"], ...] = ()  # 16 dimensions in each word

    def __len__(self) -> int:
        return len(self.rows)

    def vectors(self, rows: Int[np.ndarray, " n"] | slice) -> Float32[np.ndarray, "n E"]:
        """Return embeddings in float32."""
        values = self.rows[rows].astype(np.float32)
        if self.ranges is None:
            return values
        least, step = self.ranges
        return least + step * (values + 128)

    def products(self, query: Float[np.ndarray, " E"]) -> Float32[np.ndarray, " B"]:
        """Return the products of all embeddings with a float query."""
        if self.rows.dtype == np.float32:
            return self.rows @ query
        constant = np.float32(0)
        if self.ranges is not None:  # (least + step · (code + 128)) · query
            least, step = self.ranges
            constant, query = (least + 128 * step) @ query, step * query
        products = np.empty(len(self), np.float32)
        for start in range(0, len(self), _CHUNK):
            some = slice(start, start + _CHUNK)
            products[some] = self.rows[some].astype(np.float32) @ query
        return products + constant

    def sign_products(
        self, tables: Float32[np.ndarray, "words 65536"]
    ) -> Float32[np.ndarray, " B"]:
        """Return the products of all signs (1 and -1) with the query of `sign_tables`."""
        products = np.zeros(len(self), np.float32)
        for table, words in zip(tables, self.signs, strict=True):
            products += table.take(words)
        return products

    def for_graph(self) -> Shaped[np.ndarray, "B _"]:
        """Return the embeddings for a `graph`: in float32, or their signs as rows of bytes."""
        if self.signs:
            return np.stack(self.signs, axis=1).view(np.uint8)
        return self.vectors(slice(None))


def pack_signs(vectors: Float[np.ndarray, "B E"]) -> UInt8[np.ndarray, "B bytes"]:
    """Return a bit per dimension, which is 1 where a number is positive, and zeros to a word."""
    return np.packbits(np.pad(vectors > 0, ((0, 0), (0, -vectors.shape[1] % _WORD))), axis=1)


def sign_tables(query: Float[np.ndarray, " E"]) -> Float32[np.ndarray, "words 65536"]:
    """Return the products of the query with all values of each word of signs.

    So a float query is compared with signs: one number is read for 16 dimensions.
    """
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    padded = np.pad(query, (0, -len(query) % _WORD)).astype(np.float32).reshape(-1, 2, 8)
    products = padded @ (2 * bits.T.astype(np.float32) - 1)  # of bytes: [words, 2, 256]
    low, high = products[:, 0, None, :], products[:, 1, :, None]  # words are little-endian
    return (low + high).reshape(len(padded), -1)


def _words(width: int) -> int:
    return -(-width // _WORD)


def schema(store: Store, width: int) -> pa.Schema:
    """Return the columns of stored embeddings: index, key, embedding and words of signs."""
    kind = pa.from_numpy_dtype(np.dtype(_ROWS[store]))
    columns = {"index": pa.int64(), "key": pa.string(), "embedding": pa.list_(kind, width)}
    words = _words(width) if store == "binary" else 0
    return pa.schema(columns | {f"signs_{i}": pa.uint16() for i in range(words)})


def encode(table: pa.Table, store: Store) -> tuple[pa.RecordBatch, dict[bytes, bytes]]:
    """Return a store's columns, and the ranges of int8, of a table of float embeddings."""
    vectors = floats(table)
    width, ranges, signs = vectors.shape[1], {}, []
    if _ROWS[store] == "int8":
        least = vectors.min(axis=0, initial=_LONGEST)
        step = np.maximum(vectors.max(axis=0, initial=-_LONGEST) - least, 0) / _LEVELS
        codes = np.rint((vectors - least) / np.where(step, step, 1)) - 128
        rows = codes.astype(np.int8)
        ranges = {b"ranges": np.stack([least, step]).astype(np.float32).tobytes()}
    else:
        rows = vectors.astype(_ROWS[store])
    if store == "binary":
        signs = [*map(pa.array, pack_signs(vectors).view(np.uint16).T.copy())]
    stored = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), width)
    index, key = (table[name].combine_chunks() for name in ("index", "key"))
    batch = pa.record_batch([index, key, stored, *signs], schema=schema(store, width))
    return batch, ranges


def decode(batch: pa.RecordBatch, ranges: Mapping[bytes, bytes] | None, store: Store) -> Block:
    """Return a block without a copy. Raises ValueError if columns or ranges are damaged."""
    kind = batch.schema.field("embedding").type
    width = kind.list_size
    if not batch.schema.equals(schema(store, width)):
        raise ValueError("the columns are not those of the store")
    rows = batch["embedding"].flatten().to_numpy().reshape(-1, width)
    signs = tuple(batch[name].to_numpy() for name in batch.schema.names[3:])
    if _ROWS[store] != "int8":
        return Block(rows)
    content = (ranges or {}).get(b"ranges", b"")
    if len(content) != 2 * width * 4:
        raise ValueError("the ranges of int8 are missing")
    both = np.frombuffer(content, np.float32).reshape(2, width)
    ends = both[0] + both[1] * [[0], [_LEVELS]]
    if len(rows) and not ((np.abs(ends) < _LONGEST).all() and (both[1] >= 0).all()):
        raise ValueError("the ranges of int8 are not those of normalised embeddings")
    return Block(rows, both, signs)


def floats(table: pa.Table) -> Float32[np.ndarray, "B E"]:
    """Return the column of float embeddings in float32."""
    column = table["embedding"]
    flat = column.combine_chunks().flatten().to_numpy()
    return flat.reshape(-1, column.type.list_size).astype(np.float32, copy=False)


def graph(store: Store, width: int) -> dict[str, Any]:
    """Return the type, metric and width of usearch's graph of a store."""
    if store == "binary":
        return {"dtype": "b1", "metric": "hamming", "ndim": _WORD * _words(width)}
    dtype = {"float32": "f32", "float16": "f16"}.get(store, "i8")
    return {"dtype": dtype, "metric": "ip", "ndim": width}


def compared_bytes(store: Store, width: int) -> int:
    """Return the bytes of an embedding that each search reads."""
    return 2 * _words(width) if store == "binary" else width * np.dtype(store).itemsize


def stored_bytes(store: Store, width: int) -> int:
    """Return the bytes of an embedding on disk, without its key and index."""
    signs = compared_bytes(store, width) if store == "binary" else 0
    return signs + width * np.dtype(_ROWS[store]).itemsize


def needed_bytes(store: Store, width: int) -> int:
    """Return the most memory that a search for 10 results needs beside the mapped file."""
    again = 16 * width * candidates(store, 10)  # the best, in float32 and float64
    if store == "binary":
        return again + _words(width) * (4 << _WORD) + 12 * BLOCK
    return again + 4 * width * _CHUNK + 12 * BLOCK
