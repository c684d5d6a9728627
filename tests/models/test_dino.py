"""Image towers of DINOv2 and DINOv3: sizes, positions, and what they cannot be."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import InputError
from clip_jax.models import attention, zoo
from clip_jax.models.clip import CLIP, count
from clip_jax.models.dino import TOWERS, DinoConfig
from tests.conftest import FAMILIES

SMALL = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2}
LEARNED = DinoConfig(**SMALL, positions="learned", resizing="plain", registers=0, biases="qkv")

# In millions, of timm 1.0.31 (DINOv2) and of the papers' tables.
PARAMETERS = {
    "DINOv2-S-14": 22.06,
    "DINOv2-B-14": 86.58,
    "DINOv2-L-14": 304.37,
    "DINOv2-g-14": 1136.48,
    "DINOv3-S-16": 21.60,
    "DINOv3-S-16-plus": 28.69,
    "DINOv3-B-16": 85.66,
    "DINOv3-L-16": 303.13,
    "DINOv3-H-16-plus": 840.59,
    "DINOv3-7B-16": 6716.03,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name):
    config = zoo.get(name)
    assert config.vision == TOWERS[name]
    params = jax.eval_shape(CLIP(config).init, jax.random.key(0))
    assert count(params["visual"]) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.005)


def test_operations_are_those_of_timms_cards():
    """`timm/vit_base_patch14_dinov2.lvd142m` and giant, at 518 pixels; with the norms' elements."""
    for name, expected in (("DINOv2-B-14", 151.7), ("DINOv2-g-14", 1784.2)):
        operations = TOWERS[name].operations(TOWERS[name].width)
        assert operations.macs / 1e9 == pytest.approx(expected, rel=1e-3)


def test_registers_are_tokens_without_positions():
    tower = TOWERS["DINOv2-B-14-reg4"]
    assert (tower.extra_tokens, tower.extra_positions) == (5, 1)
    assert tower.attention_tokens == 37**2 + 5
    assert TOWERS["DINOv3-B-16"].extra_positions == 0


def test_scores_depend_on_the_offset_of_two_patches_alone():
    """And those of the class token and of registers on no position."""
    tower = DinoConfig(**SMALL)
    rotation = attention.Rotation(*map(jnp.asarray, tower.rotation()))
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 16))
    qkv = np.tile(np.stack([q, k, k])[:, None], (1, 2, 1)).reshape(-1)
    qkv = jnp.asarray(np.tile(qkv, (1, tower.attention_tokens, 1)), jnp.float32)
    turned = attention.rotate(qkv, 2, rotation, tower.head_width // 2)
    q, k, v = attention.split_heads(turned, 2)
    scores = np.einsum("LK,TK->LT", q[0, :, 0], k[0, :, 0])
    np.testing.assert_allclose(v, qkv.reshape(*q.shape[:2], 3, 2, -1)[:, :, 2])
    extra = tower.extra_tokens
    np.testing.assert_allclose(scores[:extra, :extra], scores[0, 0], rtol=1e-5)
    of_patches = scores[extra:, extra:].reshape(4, 4, 4, 4)
    np.testing.assert_allclose(of_patches[0, 0, 1, 2], of_patches[2, 1, 3, 3], rtol=1e-4)
    assert abs(of_patches[0, 0, 1, 2] - of_patches[0, 0, 2, 1]) > 1e-2


def test_gradients_of_rotated_halves_go_back_by_the_same_angles():
    tower = DinoConfig(**SMALL)
    rotation = attention.Rotation(*map(jnp.asarray, tower.rotation()))
    rng = np.random.default_rng(0)
    x, dy = jnp.asarray(rng.normal(size=(2, 1, tower.attention_tokens, 96)), jnp.float32)

    def rotate(x):
        return attention.rotate(x, 2, rotation, 8)

    y, back = jax.vjp(rotate, x)
    (dx,) = back(dy)
    np.testing.assert_allclose((y * dy).sum(), (x * dx).sum(), rtol=1e-4)
    np.testing.assert_allclose(jnp.square(y).sum(), jnp.square(x).sum(), rtol=1e-5)


def test_constant_positions_stay_constant_at_any_size():
    """The kernel's weights sum to 1; of the same size, it is the identity. A step agrees."""
    grid = np.full((16, 3), 2.5, np.float32)
    for side in (2, 3, 4, 7):
        np.testing.assert_allclose(LEARNED.resize_grid(grid, side), np.full((side**2, 3), 2.5))
    rng = np.random.default_rng(0)
    grid = rng.normal(size=(16, 3))
    np.testing.assert_allclose(LEARNED.resize_grid(grid, 4), grid, atol=1e-12)
    in_a_step = jax.jit(lambda grid: LEARNED.resize_grid(grid, 7))(jnp.float32(grid))
    np.testing.assert_allclose(in_a_step, LEARNED.resize_grid(grid, 7), atol=1e-5)


def test_settings_that_it_cannot_have_are_named():
    with pytest.raises(InputError, match=r"max_patches=64.*DinoConfig needs None"):
        DinoConfig(max_patches=64)
    with pytest.raises(InputError, match="heads of a multiple of 4"):
        DinoConfig(**SMALL | {"width": 36})
    with pytest.raises(InputError, match="this model has a Dino"):
        LEARNED.with_max_patches(16)


def test_a_tower_with_rotary_positions_has_no_table():
    config = FAMILIES["dinov3"]
    params = jax.eval_shape(CLIP(config).init, jax.random.key(0))["visual"]
    assert "positional_embedding" not in params
    assert "bias" not in params["transformer"]["resblocks"]["attn"]["in_proj"]
    larger = replace(config.vision, image_size=64)
    assert larger.fit(params, config.vision) is params
