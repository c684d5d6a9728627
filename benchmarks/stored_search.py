"""Measure search in embeddings that are stored in float16, int8 or by signs.

    python benchmarks/stored_search.py icons EMBEDDINGS
    python benchmarks/stored_search.py clustered FOLDER [ROWS] [WIDTH]

`icons` reads a folder that `clip-jax embed icons` wrote, and removes equal embeddings. Queries are
300 of these, whose own row does not count, and the 300 names of studies/icons/names.txt as
texts. It prints recall@10 against exact float32, bytes per embedding and queries per second of
CPU time; then the same of usearch's types and of sentence-transformers' `quantize_embeddings` with
its `semantic_search_usearch`, which rescores the best 44.

`clustered` writes random embeddings around ROWS / 100 centers, and searches them in int8 and by
signs. It compares the largest memory of a search, beside the mapped file, with the stated one.
"""

import argparse
import functools
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clip_jax.inference.embed import Manifest, path_of
from clip_jax.inference.search import Embeddings
from clip_jax.inference.stored import stored_bytes

ROWS, WIDTH, FILE = 10_000_000, 64, 100_000
IMAGES, TOP, SEARCHES = 300, 10, 10
NAMES = Path(__file__).parents[1] / "studies/icons/names.txt"


def write(folder: Path, rows: range, vectors: np.ndarray) -> None:
    index = pa.array(range(rows.start, rows.stop), pa.int64())
    flat = pa.array(vectors.ravel())
    columns = {
        "index": index,
        "key": pc.cast(index, pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
    }
    table = pa.table(columns).replace_schema_metadata({"skipped": "[]"})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path_of(folder, rows), compression="none", write_page_checksum=True)


def opened(folder: Path, rows: int, width: int, store) -> Embeddings:
    manifest = Manifest(
        model="icons",
        source="",
        rows=rows,
        dtype="float32",
        parts=1,
        rows_per_file=FILE,
        batch_size=1,
        image_column="",
        weights=[],
    )
    return Embeddings(folder, manifest, width, store)


# ---------------------------------------------------------------------------- icons


def distinct(folder: Path) -> np.ndarray:
    columns = [pq.read_table(x)["embedding"] for x in sorted(folder.glob("rows-*.parquet"))]
    vectors = np.concatenate([np.stack(x.to_numpy()) for x in columns])
    _, rows = np.unique(vectors, axis=0, return_index=True)
    return vectors[np.sort(rows)]


def encoded_texts() -> np.ndarray:
    import clip_jax

    model = clip_jax.load("icons")
    names = [f"{line.split(',')[0]} icon" for line in NAMES.read_text().splitlines() if line]
    texts = np.asarray(model.encode_text(model.tokenize(names, truncate=True)))
    return texts / np.linalg.norm(texts, axis=1, keepdims=True)


class Queries:
    """Queries with the exact nearest rows; images do not find themselves."""

    def __init__(self, vectors: np.ndarray) -> None:
        own = np.random.default_rng(0).choice(len(vectors), IMAGES, replace=False)
        self.sets = {"images": (vectors[own], own)}
        texts = encoded_texts()
        self.sets["texts"] = (texts, np.full(len(texts), -1))
        self.exact = {}
        for name, (queries, own) in self.sets.items():
            rows = []
            for query, row in zip(queries, own, strict=True):
                products = vectors @ query
                if row >= 0:
                    products[row] = -np.inf
                rows.append({*np.argpartition(-products, TOP)[:TOP].tolist()})
            self.exact[name] = rows

    def measure(self, name: str, size: float, find: Callable[[np.ndarray], np.ndarray]) -> None:
        """Print recall and speed of a function from one query to the nearest 11 rows."""
        shares, seconds, count = {}, 0.0, 0
        for kind, (queries, own) in self.sets.items():
            hits = []
            for query, row, exact in zip(queries, own, self.exact[kind], strict=True):
                start = time.process_time()
                rows = find(query)
                seconds += time.process_time() - start
                count += 1
                results = [x for x in rows.tolist() if x != row][:TOP]
                hits.append(len(exact & {*results}) / TOP)
            shares[kind] = f"{np.mean(hits):7.1%}"
        recalls = " ".join(shares.values())
        print(f"{name:<40} {size:7.0f} {recalls} {count / seconds:9.0f}", flush=True)


def icons(folder: Path) -> None:
    vectors = distinct(folder)
    rows, width = vectors.shape
    print(f"{rows} distinct embeddings of width {width}")
    copy = folder / "distinct"
    for start in range(0, rows, FILE):
        some = range(start, min(start + FILE, rows))
        write(copy, some, vectors[some.start : some.stop])
    queries = Queries(vectors)
    print(f"{'':<40} bytes  images  texts  queries/s")
    for store in ("float32", "float16", "int8", "binary"):
        embeddings = opened(copy, rows, width, store)
        find = functools.partial(lambda of, query: of.exact(query, TOP + 1)[0], embeddings)
        queries.measure(store, stored_bytes(store, width), find)
    with_usearch(queries, vectors)
    with_sentence_transformers(queries, vectors)


def with_usearch(queries: Queries, vectors: np.ndarray) -> None:
    from usearch.index import Index

    bits = np.packbits(vectors > 0, axis=1)
    width = vectors.shape[1]
    for dtype, metric, values in (("i8", "ip", vectors), ("b1", "hamming", bits)):
        graph = Index(ndim=width, metric=metric, dtype=dtype)
        start = time.process_time()
        graph.add(np.arange(len(values)), values, threads=1)
        print(f"usearch {dtype}: built in {time.process_time() - start:.0f} s of CPU time")
        size = graph.serialized_length / len(values)
        packed = (lambda x: np.packbits(x > 0)) if dtype == "b1" else (lambda x: x)
        for exact in (False, True):

            def find(query, graph=graph, packed=packed, exact=exact):
                return graph.search(packed(query), TOP + 1, exact=exact, threads=1).keys

            name = f"usearch {dtype}, {'all compared' if exact else 'graph'}"
            queries.measure(name, size, find)


def with_sentence_transformers(queries: Queries, vectors: np.ndarray) -> None:
    from sentence_transformers.util.quantization import (
        quantize_embeddings,
        semantic_search_usearch,
    )

    ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)])
    for precision in ("int8", "binary"):
        corpus = quantize_embeddings(vectors, precision, ranges=ranges)
        _, index = semantic_search_usearch(
            vectors[:1],
            corpus_embeddings=corpus,
            corpus_precision=precision,
            ranges=ranges,
            rescore=False,
            output_index=True,
        )[::2]
        for rescore in (False, True):

            def find(query, index=index, precision=precision, rescore=rescore):
                lists, _ = semantic_search_usearch(
                    query[None],
                    corpus_index=index,
                    corpus_precision=precision,
                    top_k=TOP + 1,
                    ranges=ranges,
                    rescore=rescore,
                    exact=True,
                )
                return np.array([x["corpus_id"] for x in lists[0]])

            name = f"sentence-transformers {precision}{', rescored' if rescore else ''}"
            queries.measure(name, corpus.nbytes / len(corpus), find)


# ---------------------------------------------------------------------------- clustered


def clustered(folder: Path, rows: int, width: int) -> None:
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((rows // 100, width), np.float32)
    for start in range(0, rows, FILE):
        some = range(start, min(start + FILE, rows))
        if path_of(folder, some).exists():
            continue
        noise = 0.5 * rng.standard_normal((len(some), width), np.float32)
        vectors = centers[rng.integers(len(centers), size=len(some))] + noise
        write(folder, some, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    for store in ("binary", "int8"):
        start = time.process_time()
        opened(folder, rows, width, store)  # written
        seconds = time.process_time() - start
        embeddings = opened(folder, rows, width, store)
        about = json.loads((folder / f"search/{store}.json").read_text())
        queries = centers[:SEARCHES] + 0.5 * rng.standard_normal((SEARCHES, width), np.float32)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        times = []
        for query in queries:
            start = time.process_time()
            embeddings.exact(query, TOP)
            times.append(time.process_time() - start)
        tracemalloc.start()
        embeddings.exact(queries[0], TOP)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        size = os.path.getsize(folder / f"search/{store}.arrow")
        print(
            f"{store}: written in {seconds:.0f} s of CPU time, {size / 2**20:.0f} MiB with keys; "
            f"{about['recall']}; {np.median(times):.2f} s of CPU time a query; reads "
            f"{about['bytes_read'] / 2**20:.0f} MiB; needs {about['bytes_needed'] / 2**20:.1f} MiB "
            f"as stated, {peak / 2**20:.1f} MiB as measured",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["icons", "clustered"], help="which measurement")
    parser.add_argument("folder", type=Path, help="embeddings of icons, or a folder to write")
    parser.add_argument("rows", nargs="?", type=int, default=ROWS, help="clustered embeddings")
    parser.add_argument("width", nargs="?", type=int, default=WIDTH, help="their width")
    args = parser.parse_args()
    if args.what == "icons":
        icons(args.folder)
    else:
        clustered(args.folder, args.rows, args.width)


if __name__ == "__main__":
    main()
