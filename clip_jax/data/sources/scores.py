"""Numbers beside the pairs, such as a CLIP score: columns of Parquet and Arrow files."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64

from clip_jax.data.sources import files


def numbers(path: str, table: pa.Table, column: str) -> Float64[np.ndarray, " N"]:
    """Get a column as float64, NaN where it is empty. ValueError if it holds no numbers."""
    _check(path, table.schema, [column])
    try:
        return table[column].cast(pa.float64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        kind = table[column].type
        raise ValueError(f"column {column!r} of {path} is {kind}, no numbers") from error


def of_parquet(path: str, column: str) -> Float64[np.ndarray, " N"]:
    """Read one column of a file. ValueError if the file or the column is not usable."""
    return numbers(path, _read(path, [column]), column)


def beside_tar(shard: str, keys: Sequence[str], column: str) -> Float64[np.ndarray, " N"]:
    """Read the column of img2dataset's Parquet file beside a tar, for these members.

    NaN for members of which it says nothing. ValueError if the file or the column is not usable.
    """
    path = f"{shard.removesuffix('.tar')}.parquet"
    table = _read(path, ["key", column])
    found = dict(zip(table["key"].to_pylist(), numbers(path, table, column), strict=True))
    return np.array([found.get(key, np.nan) for key in keys], np.float64)


def _read(path: str, columns: list[str]) -> pa.Table:
    try:
        with files.open_file(path) as source:
            file = pq.ParquetFile(source)
            _check(path, file.schema_arrow, columns)
            return file.read(columns)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{columns[-1]!r} is to be read from {path}: {error}") from error


def _check(path: str, schema: pa.Schema, columns: list[str]) -> None:
    for name in columns:
        if name not in schema.names:
            has = ", ".join(map(repr, schema.names))
            raise ValueError(f"{path} has no column {name!r}, only {has}")
