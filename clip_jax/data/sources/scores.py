"""Numeric columns beside the pairs, such as CLIP scores, in Parquet and Arrow files."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64

from clip_jax.data.sources import check_column
from clip_jax.errors import InputError
from clip_jax.storage import files


def numbers(path: str, table: pa.Table, column: str) -> Float64[np.ndarray, " N"]:
    """Return a column as float64, with NaN for empty cells. Raises InputError if not numeric."""
    check_column(path, column, table.schema.names)
    try:
        return table[column].cast(pa.float64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        kind = table[column].type
        raise InputError(
            f"column {column!r} of {path} has the type {kind}, not numbers; choose another column"
        ) from error


def beside_tar(shard: str, keys: Sequence[str], column: str) -> Float64[np.ndarray, " N"]:
    """Read a column of img2dataset's Parquet file beside a tar, for the members with these keys.

    Members that are not in it get NaN. Raises InputError if the file or the column is not usable.
    """
    path = f"{shard.removesuffix('.tar')}.parquet"
    table = read_parquet(path, ["key", column])
    by_key = dict(zip(table["key"].to_pylist(), numbers(path, table, column), strict=True))
    return np.array([by_key.get(key, np.nan) for key in keys], np.float64)


def read_parquet(path: str, columns: list[str]) -> pa.Table:
    """Read columns of a file. Raises InputError if the file or a column is not usable."""
    try:
        with files.open_file(path) as source:
            file = pq.ParquetFile(source)
            for column in columns:
                check_column(path, column, file.schema_arrow.names)
            return file.read(columns)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"column {columns[-1]!r} cannot be read from {path}: {error}") from error
