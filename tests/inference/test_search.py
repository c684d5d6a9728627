"""Embeddings in Parquet: checked, laid out in one file, and the nearest of them."""

import json
import os
import re
import shutil
import tracemalloc
from dataclasses import replace
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from usearch.index import Index

from clip_jax.errors import InputError
from clip_jax.inference import search, stored
from clip_jax.inference.embed import EmbedConfig, Manifest, embed, path_of, rows_of_files
from clip_jax.inference.loading import load
from clip_jax.inference.search import Embeddings, Searcher, nearest
from clip_jax.inference.stored import Block
from tests.conftest import write_tiny_model

WIDTH = 4
PER_FILE = 3
IMAGES = 9


def manifest(rows, rows_per_file, parts=1):
    return Manifest(
        model="",
        source="",
        rows=rows,
        dtype="float32",
        parts=parts,
        batch_size=1,
        rows_per_file=rows_per_file,
        image_column="",
        weights=[],
    )


def write(folder, rows, vectors):
    columns = {
        "index": rows,
        "key": [f"{i}.png" for i in rows],
        "embedding": pa.array([*vectors], pa.list_(pa.float32(), vectors.shape[1])),
    }
    table = pa.table(columns).replace_schema_metadata({"skipped": "[]"})
    pq.write_table(table, path_of(folder, rows), write_page_checksum=True)


def unit_vectors(count, width=WIDTH):
    vectors = np.random.default_rng(0).standard_normal((count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def rows_of(embeddings):
    return np.concatenate([block.rows for block in embeddings.blocks])


def test_the_copy_is_made_again_when_it_is_damaged_or_when_the_folder_has_changed(tmp_path):
    """Also the graph of usearch, which would name rows of another folder."""
    write(tmp_path, range(200), unit_vectors(200))
    first = manifest(200, 200)
    expected = rows_of(Embeddings(tmp_path, first, WIDTH))
    assert len(expected) == 200
    copy = tmp_path / "search/float32.arrow"
    for damaged in (copy.read_bytes()[:3_000], b""):
        copy.write_bytes(damaged)
        np.testing.assert_array_equal(rows_of(Embeddings(tmp_path, first, WIDTH)), expected)
    Embeddings(tmp_path, first, WIDTH).approximate(expected[0], 1)
    (graph,) = tmp_path.glob("search/*.usearch")
    for damaged in (graph.read_bytes()[:5_000], b"not a graph", b""):
        graph.write_bytes(damaged)
        rows, similarities = Embeddings(tmp_path, first, WIDTH).approximate(expected[7], 1)
        assert (rows[0], similarities[0]) == (7, pytest.approx(1, abs=1e-6))
    write(tmp_path, range(200, 230), unit_vectors(30))
    longer = Embeddings(tmp_path, manifest(230, 200), WIDTH)
    assert len(longer) == 230
    assert longer.row(203) == (203, "203.png")
    assert not graph.exists()


@pytest.mark.parametrize("per_file", [10, 64, 200])
def test_the_copy_has_large_blocks_and_holds_one_in_memory(per_file, tmp_path, monkeypatch):
    """However many rows a file has: one that copied all at once would run out of memory."""
    rows, block = 400, 64
    monkeypatch.setattr(search, "BLOCK", block)
    vectors = unit_vectors(rows)
    for first in range(0, rows, per_file):
        some = range(first, min(first + per_file, rows))
        write(tmp_path, some, vectors[some.start : some.stop])
    with mock.patch.object(pa, "concat_tables", side_effect=pa.concat_tables) as joined:
        blocks = Embeddings(tmp_path, manifest(rows, per_file), WIDTH).blocks
    np.testing.assert_array_equal(np.concatenate([x.rows for x in blocks]), vectors)
    assert max(map(len, blocks)) <= block
    assert len(blocks) <= 2 * rows / block
    held = [sum(map(len, call.args[0])) for call in joined.call_args_list]
    assert sum(held) == rows
    assert max(held) < block + per_file


@pytest.mark.parametrize("count", [1, 10, 500])
def test_blocks_find_what_one_product_finds(count):
    rng = np.random.default_rng(count)
    vectors = rng.integers(-2, 3, (300, 3)).astype(np.float32)  # with many ties
    query = rng.integers(-2, 3, 3).astype(np.float32)
    rows, similarities = nearest(map(Block, np.split(vectors, (64, 128, 200))), query, count)
    expected = np.argsort(-(vectors @ query), kind="stable")[:count]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(similarities, (vectors @ query)[expected])


@pytest.mark.parametrize("width", [30, 768])
@pytest.mark.parametrize("method", ["exact", "approximate"])
def test_equal_embeddings_are_listed_in_their_order(method, width, tmp_path):
    """Products in float32 differ in the last bit between rows of a block, and a graph's order is
    that of its search."""
    query, *others = unit_vectors(12, width)
    vectors = np.repeat(np.stack(others), 7, axis=0)  # images that occur seven times
    write(tmp_path, range(len(vectors)), vectors)
    embeddings = Embeddings(tmp_path, manifest(len(vectors), 100), width)
    rows, similarities = getattr(embeddings, method)(query, len(vectors))
    exact = np.repeat(np.stack(others).astype(np.float64) @ query, 7)
    np.testing.assert_array_equal(rows, np.argsort(-exact, kind="stable"))
    np.testing.assert_allclose(similarities, exact[rows], atol=1e-7)


def test_a_graph_with_rows_that_a_search_cannot_reach_misses_none(tmp_path):
    vectors = unit_vectors(500, 30)
    write(tmp_path, range(500), vectors)
    embeddings = Embeddings(tmp_path, manifest(500, 500), 30)
    rows, _ = embeddings.approximate(vectors[0], 500)
    assert sorted(rows) == list(range(500))
    sparse = Index(ndim=30, metric="ip", dtype="f32", connectivity=2, expansion_add=2)
    sparse.add(np.arange(500), vectors, threads=1)
    (path,) = tmp_path.rglob("*.usearch")
    sparse.save(str(path))
    assert len(Index.restore(str(path)).search(vectors[0], 500)) < 500
    again = Embeddings(tmp_path, manifest(500, 500), 30)
    np.testing.assert_array_equal(again.approximate(vectors[0], 500)[0], rows)


@pytest.mark.parametrize(("rows", "per_file", "parts"), [(8, 3, 1), (11, 2, 3), (2, 1, 5)])
def test_a_manifest_knows_the_files_of_all_workers(rows, per_file, parts):
    one = manifest(rows, per_file, parts)
    expected = [x for i in range(parts) for x in rows_of_files(rows, i, parts, per_file)]
    assert list(one.each_file()) == expected
    assert one.files == len(expected)


# ------------------------------------------------------------------------- types of embeddings


def clustered(count, width):
    """Return embeddings whose nearest neighbours are clearly nearer than the others."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((count // 12, width))
    vectors = centers[np.arange(count) % len(centers)] + 0.3 * rng.standard_normal((count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("store", ["float16", "int8", "binary"])
def test_a_smaller_copy_states_its_recall_bytes_and_memory(store, tmp_path, capsys, monkeypatch):
    """Also when each block has ranges of its own."""
    monkeypatch.setattr(search, "BLOCK", 500)
    vectors = clustered(2_000, 64)
    write(tmp_path, range(2_000), vectors)
    embeddings = Embeddings(tmp_path, manifest(2_000, 2_000), 64, store)
    assert len(embeddings.blocks) == 4
    line = capsys.readouterr().err
    each = {"float16": 128, "int8": 64, "binary": 72}[store]
    assert f"2000 embeddings in {store}, {each} bytes each: recall@10 against float32 " in line
    about = json.loads((tmp_path / f"search/{store}.json").read_text())
    assert (about["width"], about["store"], about["rows"]) == ("64", store, 2_000)
    assert len(about["weights"]) == 64
    expected = np.argsort(-(vectors @ vectors.T), axis=1)[:, 1:11]
    found = [{*embeddings.exact(x, 11)[0]} for x in vectors[:300]]
    shares = [len(a & {*b}) / 10 for a, b in zip(found, expected, strict=False)]
    stated = float(re.search(r"([\d.]+)% \(64 images", about["recall"])[1]) / 100
    assert stated == pytest.approx(np.mean(shares), abs=0.03)
    assert stated > 0.95
    Embeddings(tmp_path, manifest(2_000, 2_000), 64, store)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("store", ["float32", "float16", "int8", "binary"])
def test_graphs_of_each_type_find_the_nearest(store, tmp_path, capsys):
    vectors = clustered(1_000, 50)
    write(tmp_path, range(1_000), vectors)
    embeddings = Embeddings(tmp_path, manifest(1_000, 1_000), 50, store)
    capsys.readouterr()
    for query in vectors[:20]:
        rows, similarities = embeddings.approximate(query, 10)
        expected, exact = embeddings.exact(query, 10)
        assert len({*rows} & {*expected}) >= 9
        np.testing.assert_allclose(similarities[:5], exact[:5], atol=1e-3)
    line = capsys.readouterr().err
    recall = re.search(rf"in a graph of {store}, \d+ bytes each: .* ([\d.]+)% \(64 images", line)
    assert float(recall[1]) > 90
    assert (tmp_path / f"search/{store}-usearch.json").exists()


@pytest.mark.parametrize("store", ["int8", "binary"])
def test_a_search_needs_the_memory_that_it_states(store, tmp_path, monkeypatch):
    """However many blocks it reads."""
    for module in (search, stored):
        monkeypatch.setattr(module, "BLOCK", 2_000)  # many blocks
    rows, width = 60_000, 32
    write(tmp_path, range(rows), unit_vectors(rows, width))
    embeddings = Embeddings(tmp_path, manifest(rows, rows), width, store)
    query = unit_vectors(1, width)[0]
    embeddings.exact(query, 10)
    tracemalloc.start()
    try:
        embeddings.exact(query, 10)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    about = json.loads((tmp_path / f"search/{store}.json").read_text())
    assert peak < about["bytes_needed"]
    assert about["bytes_read"] == rows * {"int8": 32, "binary": 4}[store]


def test_a_copy_of_another_model_type_or_with_damaged_ranges_is_made_again(tmp_path, capsys):
    vectors = clustered(300, 16)
    write(tmp_path, range(300), vectors)
    first = manifest(300, 300)
    expected = rows_of(Embeddings(tmp_path, first, 16, "int8"))
    copy, other = tmp_path / "search/int8.arrow", tmp_path / "search/float16.arrow"
    content = copy.read_bytes()
    block = Embeddings(tmp_path, first, 16, "int8").blocks[0]
    ranges = block.ranges.tobytes()
    capsys.readouterr()
    copy.write_bytes(content.replace(ranges, b"\xff" * len(ranges)))
    np.testing.assert_array_equal(rows_of(Embeddings(tmp_path, first, 16, "int8")), expected)
    assert "300 embeddings in int8" in capsys.readouterr().err
    Embeddings(tmp_path, replace(first, weights=[1.0]), 16, "int8")
    assert "300 embeddings in int8" in capsys.readouterr().err
    shutil.copy(copy, other)
    assert Embeddings(tmp_path, first, 16, "float16").blocks[0].rows.dtype == np.float16
    assert "300 embeddings in float16" in capsys.readouterr().err


def test_embeddings_stored_in_float16_are_searched(folder, model, tmp_path):
    config = EmbedConfig(
        model=folder / "model",
        source=str(folder / "photos"),
        output=tmp_path,
        rows_per_file=PER_FILE,
        store="float16",
    )
    embed(config)
    kind = pq.read_schema(path_of(tmp_path, range(3))).field("embedding").type
    assert kind == pa.list_(pa.float16(), 16)
    query = folder / "photos/4.png"
    expected = Searcher(model, folder / "embeddings").search(query, 5)
    for store in (None, "int8"):
        results = Searcher(model, tmp_path, store).search(query, 5)
        assert results[0]["index"] == 4
        assert results[0]["similarity"] == pytest.approx(expected[0]["similarity"], abs=5e-3)
    with pytest.raises(InputError, match="stored in float16, which is less precise"):
        Searcher(model, tmp_path, "float32")
    with pytest.raises(InputError, match="holds embeddings with store='float16', now 'float32'"):
        embed(replace(config, store="float32"))


# ------------------------------------------------------------------------- damaged folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and embeddings of nine images in three files."""
    path = tmp_path_factory.mktemp("search")
    write_tiny_model(path / "model")
    (path / "photos").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (IMAGES, 8, 8, 3))):
        Image.fromarray(pixels.astype(np.uint8)).save(path / f"photos/{i}.png")
    config = EmbedConfig(
        model=path / "model",
        source=str(path / "photos"),
        output=path / "embeddings",
        rows_per_file=PER_FILE,
    )
    embed(config)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load(folder / "model")


def with_vectors(change):
    """Return a change of a table's embeddings."""

    def changed(table):
        vectors = np.stack(table["embedding"].to_numpy())
        vectors = change(vectors)
        column = pa.array([*vectors], pa.list_(pa.from_numpy_dtype(vectors.dtype), len(vectors[0])))
        return table.set_column(2, "embedding", column)

    return changed


def with_nan(vectors):
    vectors[1, 2] = np.nan
    return vectors


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_vectors(with_nan), "1 of 3 embeddings are not finite or not of length 1"),
        (with_vectors(lambda x: x * np.inf), "3 of 3 embeddings are not finite"),
        (with_vectors(lambda x: x * 0), "3 of 3 embeddings are not finite or not of length 1"),
        (with_vectors(lambda x: x * 10), "3 of 3 embeddings are not finite or not of length 1"),
        (with_vectors(lambda x: x[:, 1:]), r"embedding: .*\[15\]; the model's .*\[16\]"),
        (with_vectors(lambda x: x.astype(np.float64)), r"double.*\[16\]; the model's .*float"),
        (lambda x: x.slice(1), "2 embedded and 0 skipped images of 3"),
        (lambda x: pa.concat_tables([x, x]), "6 embedded and 0 skipped images of 3"),
        (lambda x: x.take([1, 0, 2]), "its rows are not in order"),
        (lambda x: x.set_column(0, "index", pa.array([0, 1, 2])), "it has rows 0 to 2"),
        (lambda x: x.set_column(1, "key", pa.array(["a", None, "b"])), "it has empty cells"),
        (lambda x: x.set_column(1, "key", pa.array([1, 2, 3])), "key: int64"),
        (lambda x: x.drop_columns(["key"]), "its columns are index: int64, embedding"),
        (lambda x: x.replace_schema_metadata(None), "does not list its skipped images"),
    ],
)
def test_rows_that_are_not_the_models_embeddings_are_refused(change, says, folder, model, tmp_path):
    """Else NaN would hide the other results of its block, and rows be absent or double."""
    damaged = shutil.copytree(folder / "embeddings", tmp_path / "damaged")
    path = path_of(damaged, range(3, 6))
    pq.write_table(change(pq.read_table(path)), path, write_page_checksum=True)
    with pytest.raises(InputError, match=rf"{path} is damaged \(.*{says}.*\); delete it and run"):
        Searcher(model, damaged)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"parts": 0}, "parts=0 must be at least 1"),
        ({"parts": -2}, "parts=-2 must be at least 1"),
        ({"rows": -5}, "rows=-5 must be at least 1"),
        ({"rows_per_file": 0}, "rows_per_file=0 must be at least 1"),
        ({"parts": 10**9}, "does not describe: rows-0000000000-0000000003.parquet, "),
        ({"parts": 10**30}, "must be within 64 bits"),
        ({"rows": 10**12}, "lacks 333333333331 of 333333333334 files .* and 333333333326 more"),
        ({"rows": 10**12, "rows_per_file": 1}, "files that its embed.json does not describe"),
    ],
)
def test_files_are_compared_with_the_manifest_in_bounded_time(
    fields, says, folder, model, tmp_path
):
    damaged = shutil.copytree(folder / "embeddings", tmp_path / "damaged")
    content = json.loads((damaged / "embed.json").read_text()) | fields
    (damaged / "embed.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=says):
        Searcher(model, damaged)


def test_a_file_that_the_manifest_does_not_describe_is_refused(folder, model, tmp_path):
    """Else its rows would be found twice."""
    damaged = shutil.copytree(folder / "embeddings", tmp_path / "damaged")
    for name in ("rows-9.parquet", "rows-0000000000-0000000002.parquet"):
        shutil.copy(path_of(damaged, range(3)), damaged / name)
        with pytest.raises(InputError, match=f"does not describe: {name}. Move them"):
            Searcher(model, damaged)
        (damaged / name).unlink()
    Searcher(model, damaged)


def test_a_folder_whose_images_were_all_skipped_is_refused(folder, model, tmp_path):
    """The graph of usearch takes no search for zero results."""
    empty = shutil.copytree(folder / "embeddings", tmp_path / "empty")
    for first in range(0, IMAGES, PER_FILE):
        path = path_of(empty, range(first, first + PER_FILE))
        table = pq.read_table(path).slice(0, 0)
        skipped = json.dumps([{"key": "a", "reason": "b"}] * PER_FILE)
        pq.write_table(table.replace_schema_metadata({"skipped": skipped}), path)
    with pytest.raises(InputError, match="has no embeddings: all 9 images were skipped"):
        Searcher(model, empty)


@pytest.mark.parametrize("has_digest", [True, False])
def test_images_that_have_changed_since_are_refused(has_digest, folder, model, tmp_path):
    """Older folders lack the digest of the names, so that only another number is noticed."""
    images = shutil.copytree(folder / "photos", tmp_path / "photos")
    embeddings = shutil.copytree(folder / "embeddings", tmp_path / "embeddings")
    content = json.loads((embeddings / "embed.json").read_text()) | {"source": str(images)}
    content |= {} if has_digest else {"digest": ""}
    (embeddings / "embed.json").write_text(json.dumps(content))

    def picture():
        return np.asarray(Searcher(model, embeddings).picture(0))

    with Image.open(images / "0.png") as image:
        np.testing.assert_array_equal(picture(), np.asarray(image))
    (images / "8.png").rename(images / "9.png")
    if has_digest:
        with pytest.raises(InputError, match="has other images than"):
            picture()
    else:
        picture()
    (images / "9.png").unlink()
    with pytest.raises(InputError, match="has other images than"):
        picture()


def test_a_pipe_is_refused_without_opening_it(folder, model, tmp_path):
    """To open one would wait for a writer."""
    damaged = shutil.copytree(folder / "embeddings", tmp_path / "damaged")
    for path in (path_of(damaged, range(3, 6)), damaged / "embed.json"):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(InputError, match=rf"{path} .*a pipe or a device, not a file"):
            Searcher(model, damaged)


@pytest.mark.parametrize("value", [np.nan, 0])
def test_a_query_that_is_not_finite_or_zero_is_refused(value, folder, model):
    """Its similarities would all be NaN or equal."""
    searcher = Searcher(model, folder / "embeddings")
    with pytest.raises(InputError, match="the query's embedding is not finite, or zero"):
        searcher.closest(np.full(model.config.embed_dim, value, np.float32), 1)
