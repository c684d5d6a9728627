"""Nearest neighbours among the embeddings that `clip-jax embed` wrote."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

BLOCK = 65_536  # vectors whose similarities are in memory at a time

Nearest = tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]  # rows and similarities, best first


def nearest(
    vectors: Float[np.ndarray, "B E"], query: Float[np.ndarray, " E"], count: int
) -> Nearest:
    """Find the rows with the largest products; of equal ones the earlier row wins."""
    rows, similarities = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for start in range(0, len(vectors), BLOCK):
        found = vectors[start : start + BLOCK] @ query
        worst = np.partition(found, -count)[-count] if len(found) > count else -np.inf
        good = np.flatnonzero(found >= worst)
        rows.append(start + good)
        similarities.append(found[good])
    row, similarity = np.concatenate(rows), np.concatenate(similarities)
    order = np.lexsort((row, -similarity))[:count]
    return row[order], similarity[order]


class Embeddings:
    """A folder of `rows-*.parquet`. The first use lays the vectors out in one file, which is mapped
    from disk from then on; it is made anew when the folder has changed."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("rows-*.parquet"))
        if not files:
            raise ValueError(f"no embeddings in {folder}; clip-jax embed writes them.")
        stats = [path.stat() for path in files]
        stamp = [[p.name, s.st_size, s.st_mtime_ns] for p, s in zip(files, stats, strict=True)]
        self._cache = folder / "search"
        told = self._cache / "files.json"
        if not told.exists() or json.loads(told.read_text()) != stamp:
            self._lay_out(files, stamp)
        self.vectors: Float[np.ndarray, "B E"] = np.load(self._cache / "vectors.npy", mmap_mode="r")
        with pa.memory_map(str(self._cache / "rows.arrow")) as file:
            self._rows = pa.ipc.open_file(file).read_all()

    def _lay_out(self, files: list[Path], stamp: list) -> None:
        counts = [pq.read_metadata(path).num_rows for path in files]
        width = pq.read_schema(files[0]).field("embedding").type.list_size
        self._cache.mkdir(exist_ok=True)
        for name in ("files.json", "index.usearch"):  # what is about to be out of date
            (self._cache / name).unlink(missing_ok=True)
        unfinished = self._cache / f"vectors.{os.getpid()}.npy"
        vectors = np.lib.format.open_memmap(unfinished, "w+", np.float32, (sum(counts), width))
        start, names = 0, []
        for path, count in zip(files, counts, strict=True):
            table = pq.read_table(path)
            flat = table["embedding"].combine_chunks().flatten()
            vectors[start : start + count] = flat.to_numpy().reshape(count, width)
            names.append(table.select(["index", "key"]).replace_schema_metadata(None))
            start += count
        vectors.flush()
        del vectors
        os.replace(unfinished, self._cache / "vectors.npy")
        unfinished = self._cache / f"rows.{os.getpid()}.arrow"
        table = pa.concat_tables(names)
        with pa.ipc.new_file(str(unfinished), table.schema) as writer:
            writer.write_table(table)
        os.replace(unfinished, self._cache / "rows.arrow")
        unfinished = self._cache / f"files.{os.getpid()}.json"
        unfinished.write_text(json.dumps(stamp))
        os.replace(unfinished, self._cache / "files.json")

    def __len__(self) -> int:
        return len(self.vectors)

    def row(self, row: int) -> tuple[int, str]:
        """Return a row's index in the source and its key."""
        return self._rows["index"][row].as_py(), self._rows["key"][row].as_py()

    def exact(self, query: Float[np.ndarray, " E"], count: int) -> Nearest:
        """Compare with every vector."""
        return nearest(self.vectors, query, count)

    def approximate(self, query: Float[np.ndarray, " E"], count: int) -> Nearest:
        """Ask usearch's graph, which the first use builds."""
        try:
            from usearch.index import Index
        except ImportError as error:
            raise ValueError(
                "--index usearch needs the package: pip install 'clip-jax-pods[search]'"
            ) from error
        path = self._cache / "index.usearch"
        if not path.exists():
            index = Index(ndim=self.vectors.shape[1], metric="ip", dtype="f32")
            index.add(np.arange(len(self)), self.vectors)
            unfinished = path.with_suffix(f".{os.getpid()}")
            index.save(str(unfinished))
            os.replace(unfinished, path)
        index = Index.restore(str(path), view=True)
        matches = index.search(query, min(count, len(self)))
        return matches.keys.astype(np.int64), (1 - matches.distances).astype(np.float32)
