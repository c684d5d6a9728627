"""Time exact search over 1,000,000 embeddings of width 512, and compare with NumPy's top 10.

    python benchmarks/search.py

The embeddings are random directions in ten Parquet files. Writing the search file is timed once,
then five queries, each with opening that file.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_jax.inference.embed import Manifest, path_of
from clip_jax.inference.search import Embeddings

FILES, ROWS, WIDTH, QUERIES = 10, 100_000, 512, 5


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(FILES):
            x = rng.standard_normal((ROWS, WIDTH), dtype=np.float32)
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            index = np.arange(i * ROWS, (i + 1) * ROWS)
            columns = {
                "index": pa.array(index),
                "key": pa.array([f"{row:07d}.jpg" for row in index]),
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), WIDTH),
            }
            table = pa.table(columns).replace_schema_metadata({"skipped": "[]"})
            path = path_of(folder, range(i * ROWS, (i + 1) * ROWS))
            pq.write_table(table, path, compression="none")
        manifest = Manifest(
            model="",
            source="",
            rows=FILES * ROWS,
            dtype="float32",
            parts=1,
            rows_per_file=ROWS,
            batch_size=1,
            image_column="",
            weights=[],
        )
        start = time.perf_counter()
        Embeddings(folder, manifest, WIDTH)
        print(f"written, once     {time.perf_counter() - start:6.2f} s")
        for _ in range(QUERIES):
            query = rng.standard_normal(WIDTH, dtype=np.float32)
            query /= np.linalg.norm(query)
            start = time.perf_counter()
            embeddings = Embeddings(folder, manifest, WIDTH)
            rows, _ = embeddings.exact(query, 10)
            keys = [embeddings.row(int(row))[1] for row in rows]
            seconds = time.perf_counter() - start
            similarities = np.concatenate([x.rows @ query for x in embeddings.blocks])
            expected = np.argsort(-similarities, kind="stable")[:10]
            assert np.array_equal(rows, expected)
            print(f"opened, searched  {seconds:6.2f} s  best {keys[0]}, same top 10 as NumPy")


if __name__ == "__main__":
    main()
