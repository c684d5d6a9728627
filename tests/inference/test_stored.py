"""Types of stored embeddings: what each keeps of a vector, and its products with a float query."""

from typing import get_args

import numpy as np
import pyarrow as pa
import pytest

from clip_jax.errors import InputError
from clip_jax.inference import stored
from clip_jax.inference.stored import Store

STORES = get_args(Store)
ROUNDING = {"float32": 0, "float16": 2**-11, "int8": 1 / 255, "binary": 1 / 255}


def table(vectors):
    rows = range(len(vectors))
    columns = {
        "index": pa.array(rows, pa.int64()),
        "key": pa.array([f"{i}.png" for i in rows], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), len(vectors[0])),
    }
    return pa.table(columns)


def unit_vectors(count, width):
    vectors = np.random.default_rng(width).standard_normal((count, width)) + 0.3
    vectors[:, 0] = 0.5  # a dimension without a range
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("width", [3, 16, 50])
@pytest.mark.parametrize("store", STORES)
def test_products_with_a_float_query_are_those_of_the_stored_vectors(store, width):
    vectors = unit_vectors(2_500, width)  # more than are converted at once
    block = stored.decode(*stored.encode(table(vectors), store), store)
    restored = block.vectors(slice(None))
    assert restored.dtype == np.float32
    assert np.abs(restored - vectors).max() <= ROUNDING[store]
    query = unit_vectors(1, width)[0]
    exact = restored.astype(np.float64) @ query
    np.testing.assert_allclose(block.products(query), exact, atol=1e-6)
    some = np.array([7, 3, 2_400])
    np.testing.assert_array_equal(block.vectors(some), restored[some])


def test_int8_is_within_half_a_step_of_each_dimensions_range():
    vectors = unit_vectors(500, 20)
    block = stored.decode(*stored.encode(table(vectors), "int8"), "int8")
    half = (vectors.max(axis=0) - vectors.min(axis=0)) / 255 / 2
    difference = np.abs(block.vectors(slice(None)) - vectors)
    assert (difference <= half + 1e-7).all()
    np.testing.assert_allclose(difference.max(axis=0), half, rtol=0.05, atol=1e-7)


@pytest.mark.parametrize("width", [3, 16, 17, 160])
def test_signs_are_compared_with_the_float_query(width):
    vectors, query = unit_vectors(300, width), unit_vectors(1, width)[0]
    vectors[5, width // 2] = 0
    block = stored.decode(*stored.encode(table(vectors), "binary"), "binary")
    signs = np.where(vectors > 0, 1.0, -1.0)
    np.testing.assert_allclose(
        block.sign_products(stored.sign_tables(query)), signs @ query, atol=1e-5
    )
    bits = np.unpackbits(block.for_graph(), axis=1)
    np.testing.assert_array_equal(bits[:, :width], vectors > 0)
    assert not bits[:, width:].any()
    np.testing.assert_array_equal(stored.pack_signs(vectors), block.for_graph())


@pytest.mark.parametrize(
    "change",
    [
        lambda x: None,
        lambda x: {},
        lambda x: {b"ranges": x[:-4]},
        lambda x: {b"ranges": x[:4] + b"\x00\x00\xc0\x7f" + x[8:]},  # NaN
        lambda x: {b"ranges": b"\x00\x00\x80\x7f" + x[4:]},  # infinity
        lambda x: {b"ranges": x[:16] + b"\x00\x00\x80\xbf" + x[20:]},  # a step below zero
        lambda x: {b"ranges": x[:16] + b"\x00\x00\x80\x3f" + x[20:]},  # beyond length 1
    ],
)
def test_damaged_ranges_are_noticed(change):
    batch, metadata = stored.encode(table(unit_vectors(9, 4)), "int8")
    stored.decode(batch, metadata, "int8")
    with pytest.raises(ValueError, match="the ranges of int8 are"):
        stored.decode(batch, change(metadata[b"ranges"]), "int8")


def test_columns_of_another_store_are_noticed():
    batch, metadata = stored.encode(table(unit_vectors(9, 4)), "int8")
    with pytest.raises(ValueError, match="columns are not those of the store"):
        stored.decode(batch, metadata, "binary")


def test_a_store_that_is_more_precise_than_the_embeddings_is_refused():
    assert stored.narrower(None, "float16") == "float16"
    assert stored.narrower("int8", "float32") == "int8"
    with pytest.raises(InputError, match=r"stored in float16, which is less precise. Leave out"):
        stored.narrower("float32", "float16")


@pytest.mark.parametrize(("store", "read", "kept"), [
    ("float32", 80, 80), ("float16", 40, 40), ("int8", 20, 20), ("binary", 4, 24),
])  # fmt: skip
def test_bytes_of_an_embedding_are_those_of_its_columns(store, read, kept):
    batch, _ = stored.encode(table(unit_vectors(64, 20)), store)
    assert sum(batch[name].nbytes for name in batch.schema.names[2:]) == 64 * kept
    assert (stored.compared_bytes(store, 20), stored.stored_bytes(store, 20)) == (read, kept)
