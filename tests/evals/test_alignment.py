"""Diagnostics against their definitions in float64, for sizes that no mesh divides."""

import numpy as np
import pytest

from clip_jax.evals import alignment as diag
from tests.evals.conftest import mesh_of, unit


def textbook_loss(images, texts, scale):
    logits = scale * images.astype(np.float64) @ texts.T.astype(np.float64)
    sums = [np.log(np.exp(logits).sum(axis=axis)) for axis in (0, 1)]
    return float((sum(sums) / 2 - np.diag(logits)).mean())


@pytest.mark.parametrize("devices", [1, 8])
def test_all_are_as_defined(devices, monkeypatch):
    """InfoNCE is the mean of full pools: of 53 pairs, one is in none."""
    monkeypatch.setattr(diag, "_CHUNK", 3)
    rng = np.random.default_rng(0)
    first = unit(rng.standard_normal((53, 12)) + 0.5)
    pairs = first, unit(first + 0.7 * rng.standard_normal((53, 12)))
    images, texts = (x.astype(np.float64) for x in pairs)
    i, j = np.triu_indices(53, 1)
    values = diag.diagnostics(*pairs, 10.0, mesh_of(devices), pool=13)
    for name, x in (("image", images), ("text", texts)):
        distances = np.square(x[i] - x[j]).sum(1)
        expected = np.log(np.exp(-2 * distances).mean())
        assert values[f"uniformity/{name}"] == pytest.approx(expected, rel=1e-5)
    assert values["alignment"] == pytest.approx(np.square(images - texts).sum(1).mean(), rel=1e-5)
    gap = np.linalg.norm(images.mean(0) - texts.mean(0))
    assert values["modality_gap"] == pytest.approx(gap, rel=1e-5)
    pools = [slice(a, a + 13) for a in (0, 13, 26, 39)]
    expected = np.mean([textbook_loss(images[pool], texts[pool], 10.0) for pool in pools])
    assert values["info_nce"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="pool=54 needs 2 <= pool <= the 53 pairs"):
        diag.info_nce(*pairs, 10.0, mesh_of(8), pool=54)
