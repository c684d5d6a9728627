"""Ranks against a full sort of the whole matrix, on one device and on eight."""

import jax
import numpy as np
import pytest

from clip_jax import sharding
from clip_jax.evals import retrieval


def unit(rng, *shape):
    x = rng.standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def mesh_of(devices, **sizes):
    return sharding.make_mesh(sharding.MeshConfig(**sizes), jax.devices()[:devices])


@pytest.fixture
def task():
    """Sizes that no mesh divides; one to four captions an image, in no order."""
    rng = np.random.default_rng(0)
    images = unit(rng, 37, 16)
    owner = rng.permutation(np.repeat(np.arange(37), rng.integers(1, 5, 37)))
    texts = images[owner] + 0.25 * rng.standard_normal((len(owner), 16)).astype(np.float32)
    return images, texts / np.linalg.norm(texts, axis=1, keepdims=True), owner


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


@pytest.mark.parametrize("mesh", [(1, {}), (8, {}), (8, {"data": 2, "fsdp": 2, "tensor": 2})])
@pytest.mark.parametrize("blocks", [(4_096, 1_024), (3, 8)])
def test_ranks_are_those_of_a_full_sort(task, mesh, blocks, monkeypatch):
    monkeypatch.setattr(retrieval, "_TEXTS", blocks[0])
    monkeypatch.setattr(retrieval, "_IMAGES", blocks[1])
    retrieval._count.clear_cache()
    found = retrieval.ranks(*task, mesh_of(mesh[0], **mesh[1]))
    retrieval._count.clear_cache()
    for ours, theirs in zip(found, sorted_ranks(*task), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert len(np.unique(ours)) > 1  # neither solved nor constant


def test_recall_and_median(task):
    values = retrieval.retrieval(*task, mesh_of(8))
    by_text, by_image = sorted_ranks(*task)
    for name, found in (("image_retrieval", by_text), ("text_retrieval", by_image)):
        assert values[f"{name}_median_rank"] == np.median(found)
        for k in (1, 5, 10):
            assert values[f"{name}_recall@{k}"] == pytest.approx((found <= k).mean())


def test_features_that_are_all_the_same_retrieve_nothing():
    same = np.broadcast_to(unit(np.random.default_rng(1), 1, 16), (50, 16)).copy()
    values = retrieval.retrieval(same, same, np.arange(50), mesh_of(8))
    assert values["image_retrieval_recall@10"] == values["text_retrieval_recall@10"] == 0


def test_wrong_indices_are_explained(task):
    images, texts, owner = task
    with pytest.raises(ValueError, match="image 37 has no caption"):
        retrieval.ranks(np.concatenate([images, images[:1]]), texts, owner, mesh_of(1))
    with pytest.raises(ValueError, match="0 to 36"):
        retrieval.ranks(images, texts, owner + 1, mesh_of(1))
    with pytest.raises(ValueError, match="as many image indices"):
        retrieval.ranks(images, texts[1:], owner, mesh_of(1))
