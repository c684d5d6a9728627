"""NaFlex: positions of any grid, and padding, which changes nothing in any pool."""

import functools
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import InputError
from clip_jax.models import attention
from clip_jax.models.clip import CLIP, CLIPConfig, l2_normalize
from clip_jax.models.decoder import CoCaConfig, MaMMUTConfig
from clip_jax.models.images import NaFlex, Patches, concatenate, split_tokens, zeros
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.rotary import RotaryConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig, choose_patches, resize_positions
from tests.conftest import parameters

# ------------------------------------------------------------------ positions

SHAPES = [
    *((1, 1), (1, 2), (5, 1), (1, 33), (33, 1), (1, 300), (300, 1), (2, 150), (100, 3)),
    *((16, 16), (16, 8), (8, 16), (7, 7), (17, 17), (15, 17), (17, 15), (32, 9), (9, 32)),
]


@pytest.mark.parametrize("side", [1, 2, 7, 16])
def test_positions_are_resized_as_by_jax(side):
    """Of a table with std 1; all grids at once, whatever is padding."""
    table = np.random.default_rng(side).standard_normal((side * side, 6), np.float32)
    resized = jax.jit(resize_positions, static_argnums=2)(table, np.array(SHAPES, np.int32), 310)
    assert resized.shape == (len(SHAPES), 310, 6)
    assert np.isfinite(resized).all()
    square = table.reshape(side, side, 6)

    @jax.jit
    def largest(scale):  # of which each grid is the upper left corner: one program for all
        return jax.image.scale_and_translate(
            square,
            (300, 300, 6),
            (0, 1),
            scale,
            jnp.zeros(2),
            "linear",
            antialias=True,
            precision=jax.lax.Precision.HIGHEST,
        )

    for (rows, columns), ours in zip(SHAPES, resized, strict=True):
        expected = largest(jnp.array([rows, columns]) / side)[:rows, :columns].reshape(-1, 6)
        np.testing.assert_allclose(ours[: len(expected)], expected, rtol=0, atol=1e-5)
        if (rows, columns) == (side, side):
            np.testing.assert_array_equal(ours[: len(expected)], table)


def test_positions_are_resized_in_float32():
    """Also of a table in bfloat16; a row that pads the batch has finite ones."""
    table = np.random.default_rng(0).standard_normal((16, 5), np.float32)
    table, grid = jnp.asarray(table, jnp.bfloat16), jnp.array([(3, 5), (0, 0)], jnp.int32)
    resized = resize_positions(table, grid, 20)
    assert resized.dtype == jnp.float32
    exact = resize_positions(table.astype(jnp.float32), grid, 20)
    np.testing.assert_array_equal(resized, exact)
    assert jnp.abs(exact - exact.astype(jnp.bfloat16)).max() > 1e-4
    assert np.isfinite(exact).all()


# ------------------------------------------------------------------ padding

PATCH, LENGTH = 4, 24
GRIDS = [(4, 6), (1, 9), (7, 1), (3, 3)]  # of which the first has no padding

VISION = ViTConfig(
    image_size=16,
    patch_size=PATCH,
    max_patches=LENGTH,
    width=32,
    depth=2,
    num_heads=2,
    pool_queries=4,
    pool_heads=2,
)
COCA = CLIPConfig(
    embed_dim=32,
    vision=VISION,
    text=TextConfig(
        vocab_size=520, context_length=10, width=32, depth=1, num_heads=2, pool="class_token"
    ),
    decoder=CoCaConfig(depth=1, num_heads=4),
    dtype="float32",
)
MAMMUT = replace(
    COCA,
    text=replace(COCA.text, pool="mean", causal=False, projection=False, depth=2),
    decoder=MaMMUTConfig(cross_every=2, first_mlp=False),
)
# Pools with a class token and without; others, with what decoders attend to, are in tests/mesh.
CONFIGS = {
    "mean": replace(MAMMUT, vision=replace(VISION, pool="mean", class_token=False)),
    "mean_all": replace(MAMMUT, vision=replace(VISION, pool="mean_all")),
    "map_class_token": replace(MAMMUT, vision=replace(VISION, pool="map")),
    "queries": replace(COCA, vision=replace(VISION, pool="queries")),
}


def images(grids=GRIDS, length=LENGTH, padding=0.0):
    """Normalised patches, the same ones for a grid at every length; `padding` is its std."""
    batches = []
    for grid in grids:
        rng = np.random.default_rng(grid)
        count = grid[0] * grid[1]
        width = 3 * PATCH**2
        own = rng.standard_normal((1, count, width), np.float32)
        rest = padding * rng.standard_normal((1, length - count, width), np.float32)
        pixels = np.concatenate([own, rest], axis=1)
        batches.append(Patches(pixels, np.array([grid], np.int32), np.array([count], np.int32)))
    return concatenate(batches)


def outputs(model, params, patches, keys=None):
    """Unit embeddings; without patch dropout also the states that a decoder attends to."""
    if keys is not None:
        text = jnp.zeros((len(keys), 10), jnp.int32)
        out, _ = model.outputs(params, {"image": patches}, {"text": text}, (), keys)
        return {"image": l2_normalize(out["image"])}
    features, tokens = model.encode_image_and_tokens(params, patches)
    states, length = split_tokens(tokens)
    if length is not None:
        is_valid = jnp.arange(states.shape[1]) < length[:, None]
        states = jnp.where(is_valid[..., None], states, 0)
    return {"image": l2_normalize(features), "states": states}


@functools.cache
def setting(config):
    return CLIP(config), jax.tree.map(jnp.asarray, parameters(config))


@pytest.mark.parametrize(
    ("name", "dropout"),
    [("mean", 0.0), ("map_class_token", 0.0), ("queries", 0.0), ("mean_all", 0.5)],
)
def test_padding_changes_nothing(name, dropout):
    """Whatever it contains, outputs and gradients are the same bits, and no gradient reaches it. An
    image alone, in a shorter sequence without any, has the same outputs."""
    config = CONFIGS[name]
    config = replace(config, vision=replace(config.vision, patch_dropout=dropout))
    model, params = setting(config)
    keys = jax.random.split(jax.random.key(0), len(GRIDS)) if dropout else None

    @jax.jit
    def loss_and_gradients(visual, pixels, patches):
        def loss(visual, pixels):
            every, inputs = params | {"visual": visual}, replace(patches, pixels=pixels)
            out = outputs(model, every, inputs, keys)
            weights = {n: jnp.cos(jnp.arange(x.size)).reshape(x.shape) for n, x in out.items()}
            return sum((out[name] * weights[name]).sum() for name in out), out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(visual, pixels)

    (clean, dirty) = (images(padding=std) for std in (0.0, 30.0))
    expected = loss_and_gradients(params["visual"], clean.pixels, clean)
    found = loss_and_gradients(params["visual"], dirty.pixels, dirty)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    gradient = np.asarray(found[1][1])
    padding = np.arange(LENGTH) >= clean.length[:, None]
    assert not gradient[padding].any()
    reached = (gradient != 0).any(-1).sum(1)
    np.testing.assert_array_equal(reached, [12, 4, 4, 4] if dropout else clean.length)

    (_, together), _ = expected
    unlike = np.linalg.norm(together["image"] - together["image"].mean(0), axis=1)
    assert unlike.min() > 0.01
    if not dropout:
        alone = jax.jit(functools.partial(outputs, model))(params, images(GRIDS[1:2], 9))
        for kind, x in alone.items():
            others = together[kind][1:2, : x.shape[1]]
            np.testing.assert_allclose(x, others, rtol=0, atol=1e-6 * max(1, np.abs(x).max()))
        empty = zeros(NaFlex(LENGTH, PATCH), len(GRIDS))
        (_, nothing), _ = loss_and_gradients(params["visual"], jnp.float32(empty.pixels), empty)
        assert all(np.isfinite(x).all() for x in nothing.values())


def test_patch_dropout_keeps_each_images_own_share():
    """Of its valid patches, each once and equally often; an image keeps at least one."""
    lengths, draws, kept = np.array([24, 9, 7, 1], np.int32), 400, 12

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, len(lengths))
        return choose_patches(keys, LENGTH, kept, jnp.asarray(lengths))

    chosen, counts = jax.vmap(draw)(jax.random.split(jax.random.key(0), draws))
    assert chosen.shape == (draws, len(lengths), kept)
    for i, (length, count) in enumerate(zip(lengths, (12, 4, 4, 1), strict=True)):
        np.testing.assert_array_equal(counts[:, i], count)  # halves go to the even number
        valid = np.sort(chosen[:, i, :count], axis=1)
        assert valid.max() < length
        assert (np.diff(valid, axis=1) > 0).all()
        often = np.bincount(valid.ravel(), minlength=length) / draws
        np.testing.assert_allclose(often, count / length, atol=0.1)


# ------------------------------------------------------------------ attention maps


@pytest.mark.parametrize("pool", ["class_token", "mean", "mean_all", "map", "queries"])
def test_shares_of_patches_are_the_rollout_from_what_is_pooled(pool):
    """Against the paper's matrix product, of the first query where there are queries."""
    config = replace(VISION, max_patches=None, pool=pool)
    rng = np.random.default_rng(0)
    blocks, pools = (rng.dirichlet(np.ones(17), size) for size in ((2, 3, 17), (3, 4)))
    weights = {"transformer": {"resblocks": {"attn": {"weights": (jnp.asarray(blocks),)}}}}
    recorded = {"weights": (jnp.asarray(pools),)}
    weights["attn_pool"] = {"attn": recorded} if pool == "queries" else recorded
    pooled = {"class_token": np.eye(17)[0], "mean": np.arange(17) > 0, "mean_all": np.ones(17)}
    first, second = (blocks + np.eye(17)) / 2
    for image in range(3):
        start = pooled.get(pool, pools[image, 0])
        expected = start / start.sum() @ second[image] @ first[image]
        found = config.patch_attention(weights, None)
        np.testing.assert_allclose(found[image], expected[1:], rtol=1e-5)


def test_attention_maps_do_not_see_padding():
    """Whatever it contains; it has no share itself, and only the class token has another."""
    model, params = setting(CONFIGS["map_class_token"])
    compute = jax.jit(model.patch_attention)
    clean, dirty = (np.asarray(compute(params, images(padding=std))) for std in (0.0, 30.0))
    np.testing.assert_array_equal(clean, dirty)
    is_valid = np.arange(LENGTH) < images().length[:, None]
    assert ((clean > 0) == is_valid).all()
    assert np.ptp(clean[0]) > 1e-3
    assert ((clean.sum(1) > 0.5) & (clean.sum(1) < 1)).all()


def test_attention_weights_are_computed_for_maps_only():
    model, params = setting(CONFIGS["queries"])
    with mock.patch.object(attention, "weights", autospec=True, side_effect=attention.weights) as x:
        jax.eval_shape(model.encode_image, params, images())
        x.assert_not_called()
        jax.eval_shape(model.patch_attention, params, images())
    assert x.call_count >= 2  # of the blocks and of the pool


def test_a_tower_without_patches_has_no_attention_maps():
    with pytest.raises(InputError, match="this model has a ResNet"):
        ResNetConfig().patch_attention({}, None)


def test_heads_of_a_pooling_that_a_tower_lacks_are_any_number():
    """EVA pools its class token; PE core's pooling divides the width by its heads."""
    sizes = {"width": 48, "num_heads": 4, "pool_heads": 5}
    assert RotaryConfig(pool="class_token", **sizes).width == 48
    with pytest.raises(InputError, match=r"width=48 must be a multiple of vision.pool_heads=5"):
        RotaryConfig(pool="map", **sizes)
