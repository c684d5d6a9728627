"""Embeddings in Parquet: laid out in one file, and the nearest of them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.inference.search import Embeddings, nearest


def write(path, count):
    vectors = np.random.default_rng(0).standard_normal((count, 4)).astype(np.float32)
    columns = {
        "index": range(count),
        "key": [f"{i}.png" for i in range(count)],
        "embedding": pa.array([*vectors], pa.list_(pa.float32(), 4)),
    }
    pq.write_table(pa.table(columns), path, write_page_checksum=True)


def test_what_searching_keeps_is_made_anew_when_damaged_or_when_the_folder_has_changed(tmp_path):
    write(tmp_path / "rows-0.parquet", 200)
    expected = np.concatenate(Embeddings(tmp_path).blocks)
    assert len(expected) == 200
    path = tmp_path / "search/rows.arrow"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    np.testing.assert_array_equal(np.concatenate(Embeddings(tmp_path).blocks), expected)
    (tmp_path / "search/index.usearch").write_bytes(b"of 200")
    write(tmp_path / "rows-1.parquet", 30)
    assert len(Embeddings(tmp_path)) == 230
    assert Embeddings(tmp_path).row(203) == (3, "3.png")
    assert not (tmp_path / "search/index.usearch").exists()


@pytest.mark.parametrize("count", [1, 10, 500])
def test_blocks_find_what_one_product_finds(count):
    rng = np.random.default_rng(count)
    vectors = rng.integers(-2, 3, (300, 3)).astype(np.float32)  # with many ties
    query = rng.integers(-2, 3, 3).astype(np.float32)
    rows, similarities = nearest(np.split(vectors, (64, 128, 200)), query, count)
    expected = np.argsort(-(vectors @ query), kind="stable")[:count]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(similarities, (vectors @ query)[expected])
