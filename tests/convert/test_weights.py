"""Position embeddings at another size of image."""

from dataclasses import replace

import numpy as np
import pytest

from clip_jax.convert.weights import resize_positions
from tests.convert.conftest import make_weights


@pytest.mark.parametrize("name", ["vit", "siglip"])  # with a class token, and without
def test_positions_are_resized_bicubically(name):
    """That keeps a quadratic function away from the border. The class token's position stays."""
    weights = make_weights(name)  # 4 x 4 patches
    positions = weights.params["visual"]["positional_embedding"].copy()
    positions[-16:] = np.repeat(np.arange(4.0) ** 2, 4)[:, None]
    visual = weights.params["visual"] | {"positional_embedding": positions}
    after = resize_positions(replace(weights, params=weights.params | {"visual": visual}), 64)
    assert after.config.vision.image_size == after.preprocess.image_size == 64
    resized = after.params["visual"]["positional_embedding"]
    np.testing.assert_array_equal(resized[:-64], positions[:-16])
    middle = resized[-64:].reshape(8, 8, -1)[3:5, 3:5, 0]
    np.testing.assert_allclose(middle, [[1.25**2] * 2, [1.75**2] * 2], rtol=1e-5)
