"""Position embeddings of images of any aspect ratio, against JAX's own resizing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.vit import resize_positions

GRIDS = [
    *((1, 1), (1, 2), (5, 1), (1, 33), (33, 1), (1, 300), (300, 1), (2, 150), (100, 3)),
    *((16, 16), (16, 8), (8, 16), (7, 7), (17, 17), (15, 17), (17, 15), (32, 9), (9, 32)),
]


@pytest.mark.parametrize("side", [1, 2, 7, 16])
def test_positions_are_resized_as_by_jax(side):
    """Of a table with std 1; all grids at once, whatever is padding."""
    table = np.random.default_rng(side).standard_normal((side * side, 6), np.float32)
    resized = jax.jit(resize_positions, static_argnums=2)(table, np.array(GRIDS, np.int32), 310)
    assert resized.shape == (len(GRIDS), 310, 6)
    assert np.isfinite(resized).all()
    square = table.reshape(side, side, 6)

    @jax.jit
    def largest(scale):  # of which each grid is the upper left corner: one program for all
        return jax.image.scale_and_translate(
            square, (300, 300, 6), (0, 1), scale, jnp.zeros(2), "linear",
            antialias=True, precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip

    for (rows, columns), ours in zip(GRIDS, resized, strict=True):
        expected = largest(jnp.array([rows, columns]) / side)[:rows, :columns].reshape(-1, 6)
        np.testing.assert_allclose(ours[: len(expected)], expected, rtol=0, atol=1e-5)
        if (rows, columns) == (side, side):
            np.testing.assert_array_equal(ours[: len(expected)], table)


def test_positions_are_resized_in_float32():
    """Also of a table in bfloat16; a row that pads the batch has finite ones."""
    table = np.random.default_rng(0).standard_normal((16, 5), np.float32).astype(jnp.bfloat16)
    grid = np.array([(3, 5), (0, 0)], np.int32)
    resized = resize_positions(table, grid, 20)
    assert resized.dtype == jnp.float32
    exact = resize_positions(table.astype(np.float32), grid, 20)
    np.testing.assert_array_equal(resized, exact)
    assert np.abs(exact - exact.astype(jnp.bfloat16).astype(np.float32)).max() > 1e-4
    assert np.isfinite(exact).all()
