"""Parquet: row groups, read whole, are the stretches of the order."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.data.sources.parquet import ParquetConfig, ParquetSource


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_row_group_is_a_stretch(compression, tmp_path):
    rng = np.random.default_rng(0)
    images = [{"bytes": rng.bytes(int(rng.integers(10, 3000))), "path": "x"} for _ in range(100)]
    captions = [f"c{i}" for i in range(100)]
    table = pa.table({"n": range(100), "image": images, "caption": captions, "m": ["z" * 50] * 100})
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=30, compression=compression)
    source = ParquetSource(ParquetConfig(path=f"{tmp_path}/0.parquet"))
    assert source.stretches().tolist() == [30, 30, 30, 10]
    assert 0 < source.size(0, 30) < source.size(0, 100) < 200_000
    for first, last in ((0, 30), (30, 60), (90, 100), (65, 80)):
        for i, record in zip(range(first, last), source.fetch(first, last), strict=True):
            assert record.key == source.key(i)
            assert record.load(rng) == source.load(i, rng) == (images[i]["bytes"], captions[i])
