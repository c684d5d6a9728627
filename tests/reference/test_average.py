"""Averages in the reference implementations: they load there, and give the same features."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.formats import Format, read_weights, write_weights
from clip_jax.inference.average import AverageConfig, average
from tests.convert.conftest import CONFIGS
from tests.reference.parity import random_weights


@pytest.mark.parametrize(
    ("name", "to"), [("vit", "open-clip"), ("vit", "hugging-face"), ("siglip", "hugging-face")]
)
def test_a_soup_loads_elsewhere(name: str, to: Format, tmp_path):
    one, rng = random_weights(CONFIGS[name]), np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (x + rng.normal(0, 0.02, x.shape)).astype(np.float32), one.params
    )
    write_weights(one, tmp_path / "a", "hugging-face")
    write_weights(replace(one, params=params), tmp_path / "b", "hugging-face")
    models = (tmp_path / "a", tmp_path / "b")
    average(AverageConfig(models=models, weights=(1.0, 3.0), output=tmp_path / "soup"))
    bias = [
        read_weights(x).params["text"]["ln_final"]["bias"] for x in (*models, tmp_path / "soup")
    ]
    np.testing.assert_allclose(bias[2], 0.25 * bias[0] + 0.75 * bias[1], rtol=1e-6, atol=1e-8)
    config = ConvertConfig(source=tmp_path / "soup", destination=tmp_path / "x", to=to, verify=True)
    verification = convert(config).verification
    assert verification is not None
    assert verification.passed
