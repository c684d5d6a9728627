"""Ranks against a full sort of the whole matrix, on one device and on eight."""

import numpy as np
import pytest

from clip_jax.evals import retrieval
from tests.evals.conftest import mesh_of, unit


@pytest.fixture
def task():
    """Sizes that no mesh divides; one to four captions an image, some far from it; in no order."""
    rng = np.random.default_rng(0)
    images = unit(rng.standard_normal((37, 16)))
    owner = rng.permutation(np.repeat(np.arange(37), rng.integers(1, 5, 37)))
    return images, unit(images[owner] + rng.standard_normal((len(owner), 16))), owner


def sorted_ranks(images, texts, owner):
    scores = texts.astype(np.float64) @ images.T.astype(np.float64)
    by_text = [
        list(np.argsort(-row)).index(own) + 1 for row, own in zip(scores, owner, strict=True)
    ]
    by_image = [
        1 + min(list(np.argsort(-row)).index(t) for t in np.flatnonzero(owner == image))
        for image, row in enumerate(scores.T)
    ]
    return np.array(by_text), np.array(by_image)


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [
        (mesh_of(1), 3),
        (mesh_of(8), 512),
        (mesh_of(8, data=2, fsdp=2, tensor=2), 3),
    ],
)
def test_ranks_and_recalls_are_those_of_a_full_sort(task, mesh, rows, monkeypatch):
    monkeypatch.setattr(retrieval, "_ROWS", rows)
    ours, values = retrieval.ranks(*task, mesh), retrieval.retrieval(*task, mesh)
    names = ("image_retrieval", "text_retrieval")
    for name, some, theirs in zip(names, ours, sorted_ranks(*task), strict=True):
        np.testing.assert_array_equal(some.rank(), theirs)
        assert len(np.unique(theirs)) > 1  # neither solved nor constant
        assert values[f"{name}_median_rank"] == np.median(theirs)
        for k in (1, 5, 10):
            assert values[f"{name}_recall@{k}"] == pytest.approx((theirs <= k).mean())


def test_identical_embeddings_retrieve_at_chance_level():
    same = np.broadcast_to(unit(np.ones((1, 16))), (50, 16)).copy()
    values = retrieval.retrieval(same, same, np.arange(50), mesh_of(8))
    for name in ("image_retrieval", "text_retrieval"):
        assert values[f"{name}_median_rank"] == 25.5
        for k in (1, 5, 10):
            assert values[f"{name}_recall@{k}"] == pytest.approx(k / 50)


def test_equal_candidates_count_by_chance():
    """Of three texts equal to an image, two are its own; another of its own is farther away."""
    images = np.float32([[1, 0], [0, 1]])
    texts = np.float32([[1, 0], [1, 0], [0, 1], [1, 0], [0, 1]])
    owner = np.array([0, 0, 0, 1, 1])
    by_text, by_image = retrieval.ranks(images, texts, owner, mesh_of(1))
    assert [[*x] for x in by_image] == [[0, 0], [1, 1], [2, 1]]
    assert by_image.within(1) == pytest.approx([2 / 3, 1 / 2])
    assert by_image.within(2) == pytest.approx([1, 1])
    assert by_text.rank().tolist() == [1, 1, 2, 2, 1]


@pytest.mark.parametrize("broken", [slice(3, 4), slice(None)])
def test_nan_is_never_retrieved(task, broken):
    """Comparisons with NaN are false, so a count of better candidates alone would be 0."""
    images, texts, owner = task
    images = images.copy()
    images[broken] = np.nan
    for own in retrieval.ranks(images, texts, owner, mesh_of(1)):
        is_finite = np.isfinite(own.rank())
        assert not own.within(100)[~is_finite].any()
        assert not is_finite.all()
    assert not is_finite[broken].any()


def test_an_image_without_a_caption_is_named(task):
    images, texts, owner = task
    with pytest.raises(ValueError, match="image 37 has no caption"):
        retrieval.ranks(np.concatenate([images, images[:1]]), texts, owner, mesh_of(1))
