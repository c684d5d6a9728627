"""Stored augmentations and embeddings: both layouts, released ones, damage."""

import dataclasses
import gzip
import io
import json
from unittest import mock

import numpy as np
import pytest

from clip_jax.data import reinforced
from clip_jax.data.augment import Augmentation
from clip_jax.data.reinforced import (
    Reinforcement,
    from_features,
    from_members,
    to_features,
    to_members,
)
from clip_jax.data.sources import SampleError
from clip_jax.models.inputs import StoredInput

WIDTHS = (40, 24)
AUGMENTATIONS = (
    Augmentation((3, 4, 30, 20), True, ((1, -0.3), None)),
    Augmentation((0, 0, 8, 8), False, None),
)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def rows(count, seed=0):
    rng = np.random.default_rng([count, seed])
    return np.concatenate([unit(rng.normal(size=(count, width))) for width in WIDTHS], axis=1)


STORED = Reinforcement(AUGMENTATIONS, 32, rows(2), ("a", "zwölf", "c"), rows(1), rows(3))


def npz(**arrays):
    np.savez_compressed(file := io.BytesIO(), **arrays)
    return file.getvalue()


def paug(*augmentations, **more):
    return json.dumps({"param_aug": augmentations} | more).encode()


def check_equal(a, b, **tolerance):
    assert (a.augmentations, a.size, a.synthetic) == (b.augmentations, b.size, b.synthetic)
    for name in ("image", "text", "synthetic_text"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype == np.float32
        np.testing.assert_allclose(x, y, **tolerance)


# ------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "tar"])
def test_what_is_written_is_read(dtype):
    """Equal bytes for equal content; the embeddings within the rounding of their type."""
    if dtype == "tar":
        written = to_members(STORED)
        assert written == to_members(STORED)
        assert set(written) == {"paug.json", "syn.json", "npz"}
        read = from_members(written, 1)
    else:
        written = to_features(STORED, dtype, WIDTHS)
        assert written == to_features(STORED, dtype, WIDTHS)
        width = {"float32": 4 * 64, "float16": 2 * 64, "int8": 64 + 2 * 4}[dtype]
        assert [len(row) for row in written["image_emb"]] == [width, width]
        read = from_features(written, 1)
    exact = {"rtol": 0, "atol": 0}
    about = {"rtol": 2**-11, "atol": 0.005 if dtype == "int8" else 1e-7}
    check_equal(read, STORED, **(exact if dtype == "float32" else about))


def test_the_origin_of_embeddings_is_stored_and_compared_by_name():
    origins = ({"image": {"resolution": 16, "weights": "12ab"}}, {"image": {"resolution": 32}})
    stored = dataclasses.replace(STORED, origins=origins)
    read = from_features(to_features(stored, "int8", WIDTHS), 1)
    assert read is not None
    assert read.origins == origins
    for of, origin, problem in (
        ("image", {"resolution": 16, "weights": "12ab"}, ""),
        ("image", {"resolution": 32, "weights": "12ac"}, "resolution 16, but need 32"),
        ("image", {"resolution": 16, "weights": "12ac"}, "weights 12ab, but need 12ac"),
        ("text", {"tokenizer": "34cd"}, "tokenizer unknown, but need 34cd"),
    ):
        needed = StoredInput(of, WIDTHS, (*origin.items(),))
        assert read.misfit(needed) == problem
        if problem:
            with pytest.raises(SampleError, match=f"stored embeddings have {problem}"):
                read.check(rows(1), needed)
    unknown = from_features(to_features(STORED, "int8", WIDTHS), 1)
    assert unknown is not None
    needed = StoredInput("image", WIDTHS, (("weights", "12ab"),))
    assert unknown.misfit(needed) == "weights unknown, but need 12ab"
    damaged = to_features(stored, "int8", WIDTHS)
    damaged["emb"] = [b'{"dtype": "int8", "widths": [40, 24], "origins": [[1]]}']
    with pytest.raises(SampleError, match="reinforcement"):
        from_features(damaged, 1)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_widths_of_teachers_are_stored_and_compared_one_by_one(dtype):
    """Of unknown ones, as from tars, only the sum."""
    known, unknown = (from_features(to_features(STORED, dtype, x), 1) for x in (WIDTHS, ()))
    check_equal(unknown, STORED, rtol=2**-11, atol=0.005 if dtype == "int8" else 1e-7)
    for widths in (WIDTHS, (24, 40), (64,), (40,)):
        assert known.fits(widths) == (widths == WIDTHS)
        assert unknown.fits(widths) == (sum(widths) == 64)


def test_what_is_absent_is_not_written():
    for empty in (from_features({"image": [b"x"]}), from_members({"image": b"x"}, 1)):
        assert empty is None
    assert to_features(Reinforcement(), "int8", WIDTHS) == to_members(Reinforcement()) == {}
    captions = Reinforcement(synthetic=("a", "b"))
    read = from_members(to_members(captions), 1), from_features(to_features(captions, "int8", ()))
    for one in read:
        check_equal(one, captions)
        assert one.image.shape == one.synthetic_text.shape == (0, 0)
    plain = Reinforcement((Augmentation((0, 0, 8, 8)),) * 2, image=rows(2))
    assert json.loads(to_members(plain)["paug.json"]) == {"param_aug": [[[0, 0, 8, 8]]] * 2}


@pytest.mark.parametrize("outliers", [0, 1, 3, 30])
@pytest.mark.parametrize("width", [8, 768, 4096])
def test_int8_keeps_the_direction_of_each_teachers_row(width, outliers):
    """Also if a few values have nearly all of the length."""
    rng = np.random.default_rng(0)
    original = rng.normal(size=(50, 2 * width)) * rng.choice([0.1, 1, 3], 2 * width)
    for at in range(outliers):
        original[:, [at % width, width + at % width]] = 10 * np.sqrt(width) * rng.normal()
    parts = unit(original.reshape(50, 2, width))
    original = np.concatenate([1e-3 * parts[:, 0], 10 * parts[:, 1]], axis=1)  # scale per teacher
    augmentations = (Augmentation(),) * 50
    features = to_features(Reinforcement(augmentations, image=original), "int8", (width, width))
    read = from_features(features)
    assert read is not None
    pairs = zip(np.split(original, 2, axis=1), np.split(read.image, 2, axis=1), strict=True)
    for x, y in pairs:
        assert (unit(x) * unit(y)).sum(axis=1).min() > 0.999
        np.testing.assert_allclose(*(np.linalg.norm(z, axis=1) for z in (x, y)), rtol=5e-3)


def test_a_row_of_zeros_stays_one():
    zeros = Reinforcement((Augmentation(),), image=np.zeros((1, 64), np.float32))
    read = from_features(to_features(zeros, "int8", WIDTHS))
    assert read is not None
    np.testing.assert_array_equal(read.image, 0)


# ---------------------------------------------------------------------------------- released sets


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            [[1, 2, 3, 4], [[5, 0.5], [10, 4.0]]],
            Augmentation((1, 2, 3, 4), None, ((5, 0.5), (10, 4.0))),
        ),
        ([[1, 2, 3, 4], True, [[0, 0]]], Augmentation((1, 2, 3, 4), True, ((0, 0.0),))),
        ([[1, 2, 3, 4], False], Augmentation((1, 2, 3, 4), False)),
        ([False, None], Augmentation(None, False, None)),
        ([[1, 2, 3, 4], None], Augmentation((1, 2, 3, 4), None, None)),
        ([[1, 2, 3, 4], [None, [3, -9.5]]], Augmentation((1, 2, 3, 4), None, (None, (3, -9.5)))),
        ([], Augmentation()),
    ],
)
def test_fields_are_known_by_their_types(fields, expected):
    inside = json.dumps({"param_aug": json.dumps([fields])}).encode()  # JSON in JSON
    for member in (paug(fields), inside, json.dumps(inside.decode()).encode()):
        read = from_members({"paug.json": member}, 1)
        assert read is not None
        assert read.augmentations == (expected,)


@pytest.mark.parametrize(
    "fields",
    [
        [[1, 2, 3, 4], [5, 6, 7, 8]],  # a crop, and erasing
        [None, [1, 2, 3, 4], [[0, 0]]],  # mixed images
        [7, [1, 2, 3, 4]], [[1, 2], [[0, 0]]], [[1, 2, 3.5, 4]], [True, [1, 2, 3, 4]],
        [[[14, 0]]], [[[-1, 0]]], [[[True, 0]]], [[[1.0, 0]]], [[["ShearX", 0]]], [[[1]]],
        [[[1, None]]], [[[1, float("nan")]]], [[[3, 1e300]]], [[[10, 9]]], [[[10, -1e9]]],
        [224], [[[1, 0]], [[1, 0]]],
    ],
)  # fmt: skip
def test_other_fields_are_refused(fields):
    with pytest.raises(SampleError, match=r"augmentation: .* is not \[\[top, left"):
        from_members({"paug.json": paug(fields)}, 1)


def test_arrays_of_synthetic_captions_of_old_and_new_sets():
    new = {
        "syn.json": json.dumps({"x": 1, "syn_text": ["a"], "syn_text_b": ["b", "c"]}).encode(),
        "npz": npz(text_emb=rows(2), syn_text_emb=rows(1), syn_text_b_emb=rows(2, 1), other=[1]),
    }
    read = from_members(new, 2)
    assert read is not None
    assert read.synthetic == ("a", "b", "c")
    np.testing.assert_array_equal(read.text, rows(2))
    np.testing.assert_array_equal(read.synthetic_text, [*rows(1), *rows(2, 1)])
    old = {
        "syn.json": json.dumps({"syn_text": ["a", "b", "c"]}).encode(),
        "npz": npz(text_emb=rows(5).astype(np.float16)),
    }
    read = from_members(old, 2)
    assert read is not None
    np.testing.assert_array_equal(read.text, rows(5).astype(np.float16)[:2])
    np.testing.assert_array_equal(read.synthetic_text, rows(5).astype(np.float16)[2:])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"paug.json": b"{"}, "JSON"),
        ({"paug.json": b"[]"}, "TypeError"),
        ({"paug.json": b"[" * 100_000}, "Recursion"),
        ({"syn.json": b"[]", "npz": b"x"}, "reinforcement"),
        ({"syn.json": b'{"syn_text": [7]}'}, "caption is int"),
        ({"npz": b"PK\3\4 is no archive"}, "BadZipFile"),
        ({"npz": npz(image_emb=np.array([{}]))}, "pickle"),
        ({"npz": npz(image_emb=rows(2))}, r"image_emb has shape \(2, 64\); .* of \(0, 64\)"),
        ({"npz": npz(text_emb=rows(1))}, r"text_emb has shape \(1, 64\); .* of \(2, 64\)"),
        ({"npz": npz(text_emb=rows(3))}, r"syn_text_emb has shape \(1, 64\)"),
        ({"npz": npz(text_emb=np.full((2, 3), np.inf))}, "finite"),
        ({"paug.json": paug([]), "npz": npz(text_emb=rows(2), image_emb=rows(1)[:, 1:])}, "of "),
        ({"paug.json": paug([], size=0)}, "size 0 is not"),
        ({"paug.json": paug([], size="8")}, "size '8' is not"),
        ({"pth.gz": b"\x1f\x8b is no gzip"}, "decompressing"),
    ],
)
def test_damaged_members_are_samples_with_a_reason(members, message):
    with pytest.raises(SampleError, match=message):
        from_members(members, 2)


@mock.patch.object(reinforced, "_MAX_BYTES", 1000)
def test_members_are_unpacked_up_to_a_limit():
    with pytest.raises(SampleError, match="more than 1000 bytes"):
        from_members({"npz": npz(text_emb=np.zeros(1000))}, 1)
    with pytest.raises(SampleError, match="damaged zip"):
        from_members({"pth.gz": gzip.compress(bytes(2000))}, 1)


def test_no_mutation_raises_anything_but_a_sample_error():
    rng, failures = np.random.default_rng(0), 0
    for trial in range(300):
        members = to_members(STORED)
        features = to_features(STORED, "int8", WIDTHS)
        name = list(members)[trial % 3]
        for _ in range(3):
            data = bytearray(members[name])
            data[rng.integers(len(data))] = rng.integers(256)
            members[name] = bytes(data)
            row = list(features)[trial % len(features)]
            features[row] = [features[row][0][: rng.integers(60)], *features[row][1:]]
        for read in (lambda: from_members(members, 1), lambda: from_features(features, 1)):  # noqa: B023
            try:
                read()
            except SampleError:
                failures += 1
    assert failures > 250
