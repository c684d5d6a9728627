"""Embeddings in Parquet: laid out in one file, and the nearest of them."""

from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.data import embeddings
from clip_jax.data.embeddings import Embeddings, nearest


def write(path, count):
    flat = pa.array(np.random.default_rng(0).standard_normal(4 * count).astype(np.float32))
    keys = pa.array([f"{i}.png" for i in range(count)])
    columns = {
        "index": pa.array(range(count), pa.int64()),
        "key": keys,
        "embedding": pa.FixedSizeListArray.from_arrays(flat, 4),
    }
    pq.write_table(pa.table(columns), path, write_page_checksum=True)


def test_a_changed_folder_is_laid_out_anew(tmp_path):
    write(tmp_path / "rows-0.parquet", 200)
    assert len(Embeddings(tmp_path)) == 200
    write(tmp_path / "rows-1.parquet", 30)
    assert len(Embeddings(tmp_path)) == 230
    assert Embeddings(tmp_path).row(203) == (3, "3.png")


def test_what_searching_keeps_is_made_anew_when_damaged(tmp_path):
    write(tmp_path / "rows-0.parquet", 200)
    expected = np.array(Embeddings(tmp_path).vectors)
    for name in ("files.json", "vectors.npy", "rows.arrow"):
        path = tmp_path / "search" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        np.testing.assert_array_equal(Embeddings(tmp_path).vectors, expected)


@pytest.mark.parametrize("count", [1, 10, 500])
@mock.patch.object(embeddings, "BLOCK", 64)
def test_blocks_find_what_one_product_finds(count):
    rng = np.random.default_rng(count)
    vectors = rng.integers(-2, 3, (300, 3)).astype(np.float32)  # with many ties
    query = rng.integers(-2, 3, 3).astype(np.float32)
    rows, similarities = nearest(vectors, query, count)
    expected = np.argsort(-(vectors @ query), kind="stable")[:count]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(similarities, (vectors @ query)[expected])
