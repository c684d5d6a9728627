"""Diagnostics against their definitions in float64, for sizes that no mesh divides."""

import jax
import numpy as np
import pytest

from clip_jax import sharding
from clip_jax.evals import alignment as diag


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    images = unit(rng.standard_normal((53, 12)) + 0.5)
    return images, unit(images + 0.7 * rng.standard_normal((53, 12)))


@pytest.fixture(params=[1, 8])
def mesh(request):
    return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[: request.param])


def textbook_loss(images, texts, scale):
    logits = scale * images.astype(np.float64) @ texts.T.astype(np.float64)
    sums = [np.log(np.exp(logits).sum(axis=axis)) for axis in (0, 1)]
    return float((sum(sums) / 2 - np.diag(logits)).mean())


def test_info_nce_is_the_mean_of_full_pools(pairs, mesh):
    images, texts = pairs
    expected = np.mean([
        textbook_loss(images[a : a + 13], texts[a : a + 13], 10.0) for a in (0, 13, 26, 39)
    ])  # fmt: skip
    found = diag.info_nce(images, texts, 10.0, mesh, pool=13)
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(expected - textbook_loss(images[39:], texts[39:], 10.0)) > 1e-3


def test_chance_is_the_logarithm_of_the_pool(mesh):
    same = np.broadcast_to(unit(np.ones((1, 12))), (26, 12)).copy()
    assert diag.info_nce(same, same, 10.0, mesh, pool=13) == pytest.approx(np.log(13), rel=1e-5)
    assert diag.uniformity(same, mesh) == pytest.approx(0, abs=1e-5)


def test_the_others_are_as_defined(pairs, mesh, monkeypatch):
    monkeypatch.setattr(diag, "_CHUNK", 3)
    images, texts = (x.astype(np.float64) for x in pairs)
    i, j = np.triu_indices(53, 1)
    values = diag.diagnostics(*pairs, 10.0, mesh, pool=53)
    for name, x in (("image", images), ("text", texts)):
        distances = np.square(x[i] - x[j]).sum(1)
        expected = np.log(np.exp(-2 * distances).mean())
        assert values[f"uniformity/{name}"] == pytest.approx(expected, rel=1e-5)
    assert values["alignment"] == pytest.approx(np.square(images - texts).sum(1).mean(), rel=1e-5)
    gap = np.linalg.norm(images.mean(0) - texts.mean(0))
    assert values["modality_gap"] == pytest.approx(gap, rel=1e-5)
    assert values["info_nce"] == pytest.approx(textbook_loss(images, texts, 10.0), rel=1e-5)


def test_a_pool_that_is_not_filled_is_an_error(pairs, mesh):
    with pytest.raises(ValueError, match="pool=54 needs 2 <= pool <= the 53 pairs"):
        diag.info_nce(*pairs, 10.0, mesh, pool=54)
