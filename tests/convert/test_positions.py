"""Position embeddings at another size of image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.convert.positions import resize_positions
from clip_jax.models.clip import CLIP
from tests.convert.conftest import make_weights


@pytest.mark.parametrize(("name", "size"), [("vit", 24), ("resnet", 96)])
def test_positions_resize(name, size):
    weights = resize_positions(make_weights(name), size)
    assert weights.config.vision.image_size == weights.preprocess.image_size == size
    encode, pixels = CLIP(weights.config).encode_image, jnp.zeros((1, size, size, 3))
    assert jax.eval_shape(encode, weights.params, pixels).shape == (1, 48)


def test_positions_of_another_size_keep_the_class_token():
    before = make_weights("vit")
    after = resize_positions(before, 64)
    old = before.params["visual"]["positional_embedding"]
    new = after.params["visual"]["positional_embedding"]
    np.testing.assert_array_equal(new[0], old[0])
    assert new.shape == (65, 128)
    # Bicubic interpolation keeps means where the image is not near its border.
    assert abs(new[1:].mean() - old[1:].mean()) < 0.05
    np.testing.assert_array_equal(after.params["visual"]["proj"], before.params["visual"]["proj"])
