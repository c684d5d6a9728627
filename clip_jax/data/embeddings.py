"""Nearest neighbours among the embeddings that `clip-jax embed` wrote."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from clip_jax import files
from clip_jax.files import Place
from clip_jax.refused import Refused

BLOCK = 65_536  # vectors whose similarities are in memory at a time

Nearest = tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]  # rows and similarities, best first


def nearest(
    vectors: Float[np.ndarray, "B E"], query: Float[np.ndarray, " E"], count: int
) -> Nearest:
    """Find the rows with the largest products; of equal ones the earlier row wins."""
    rows, similarities = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK] @ query
        worst = np.partition(block, -count)[-count] if len(block) > count else -np.inf
        good = np.flatnonzero(block >= worst)
        rows.append(start + good)
        similarities.append(block[good])
    row, similarity = np.concatenate(rows), np.concatenate(similarities)
    order = np.lexsort((row, -similarity))[:count]
    return row[order], similarity[order]


def read_rows(path: Place) -> pa.Table:
    """Read one file that `clip-jax embed` wrote: `index`, `key`, `embedding`. Refused if it is
    damaged."""
    try:
        with files.open_file(path) as file:
            table = pq.read_table(file, page_checksum_verification=True)
        return table.select(["index", "key", "embedding"])
    except (pa.ArrowException, OSError, KeyError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise Refused(
            f"{path} is damaged ({why}); delete it and run the same clip-jax embed again, which "
            "makes only what is missing."
        ) from error


def skipped_in(path: Place) -> list[dict[str, str]] | None:
    """Return what `clip-jax embed` left out of a file, and why; None if the file is damaged."""
    try:
        with files.open_file(path) as file:
            return json.loads((pq.read_schema(file).metadata or {})[b"skipped"])
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return None


def _count(path: Place) -> int:
    try:
        with files.open_file(path) as file:
            return pq.read_metadata(file).num_rows
    except (pa.ArrowException, OSError):
        return read_rows(path).num_rows  # which names the file that is damaged


class Embeddings:
    """A folder of `rows-*.parquet`. The first use lays the vectors out in one file, which is mapped
    from disk from then on; it is made anew when the folder has changed."""

    def __init__(self, folder: Place) -> None:
        paths = sorted(folder.glob("rows-*.parquet"))
        if not paths:
            raise Refused(f"no embeddings in {folder}; clip-jax embed writes them.")
        listed = zip(paths, files.stats([str(path) for path in paths]), strict=True)
        stamp = [[path.name, *(stat or ())] for path, stat in listed]
        self._cache = files.beside(folder, "search")
        self.vectors: Float[np.ndarray, "B E"]
        try:
            self._open(stamp)
        except (OSError, ValueError, pa.ArrowException):  # none, of other files, or damaged
            self._lay_out(paths, stamp)
            self._open(stamp)

    def _open(self, stamp: list) -> None:
        if json.loads((self._cache / "files.json").read_text()) != stamp:
            raise ValueError("the folder has changed")
        self.vectors = np.load(self._cache / "vectors.npy", mmap_mode="r")
        with pa.memory_map(str(self._cache / "rows.arrow")) as file:
            self._rows = pa.ipc.open_file(file).read_all()

    def _lay_out(self, paths: list[Place], stamp: list) -> None:
        counts = [_count(path) for path in paths]
        width = read_rows(paths[0])["embedding"].type.list_size
        for name in ("files.json", "index.usearch"):  # what is about to be out of date
            files.remove(self._cache / name)
        names = []
        with files.written_whole(self._cache / "vectors.npy") as partial:
            vectors = np.lib.format.open_memmap(partial, "w+", np.float32, (sum(counts), width))
            start = 0
            for path, count in zip(paths, counts, strict=True):
                table = read_rows(path)
                flat = table["embedding"].combine_chunks().flatten()
                vectors[start : start + count] = flat.to_numpy().reshape(count, width)
                names.append(table.select(["index", "key"]).replace_schema_metadata(None))
                start += count
            vectors.flush()
            del vectors
        table = pa.concat_tables(names)
        with (
            files.written_whole(self._cache / "rows.arrow") as partial,
            pa.ipc.new_file(str(partial), table.schema) as writer,
        ):
            writer.write_table(table)
        files.write_whole(self._cache / "files.json", json.dumps(stamp))

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
            raise Refused(
                "--index usearch needs the package: pip install 'clip-jax-pods[search]'"
            ) from error
        path = self._cache / "index.usearch"
        if not path.exists():
            index = Index(ndim=self.vectors.shape[1], metric="ip", dtype="f32")
            index.add(np.arange(len(self)), self.vectors)
            with files.written_whole(path) as partial:
                index.save(str(partial))
        index = Index.restore(str(path), view=True)
        matches = index.search(query, min(count, len(self)))
        return matches.keys.astype(np.int64), (1 - matches.distances).astype(np.float32)
