"""NaFlex: positions of any grid, and padding, which changes nothing in any pool or decoder."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import InputError
from clip_jax.models.clip import CLIP, CLIPConfig, l2_normalize
from clip_jax.models.decoder import CoCaConfig, MaMMUTConfig
from clip_jax.models.generation import GenerationConfig, generate
from clip_jax.models.images import NaFlex, Patches, concatenate, zeros
from clip_jax.models.layers import apart
from clip_jax.models.rotary import RotaryConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig, choose_patches, resize_positions
from tests.conftest import batch, decode_text, parameters

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
# Each way to pool, with a class token or without, below a decoder.
CONFIGS = {
    "class_token": replace(COCA, vision=replace(VISION, pool="class_token")),
    "mean": replace(MAMMUT, vision=replace(VISION, pool="mean", class_token=False)),
    "mean_all": replace(MAMMUT, vision=replace(VISION, pool="mean_all")),
    "map": replace(COCA, vision=replace(VISION, pool="map", class_token=False)),
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


def outputs(model, params, patches, tokens, keys=None):
    """Unit embeddings, and unit states of the captions."""
    out, _ = model.outputs(params, {"image": patches}, {"text": tokens}, ("caption_states",), keys)
    return {name: l2_normalize(x) for name, x in out.items()}


@functools.cache
def setting(config):
    return CLIP(config), jax.tree.map(jnp.asarray, parameters(config)), _tokens(config)


def _tokens(config):
    square = replace(config, vision=replace(config.vision, max_patches=None))
    return jnp.asarray(batch(square)["text"][: len(GRIDS)])


@pytest.mark.parametrize(
    ("name", "dropout"),
    [*((name, 0.0) for name in CONFIGS), ("mean_all", 0.5)],
)
def test_what_stands_in_the_padding_changes_nothing(name, dropout):
    """Outputs and gradients are the same bits, and no gradient reaches the padding."""
    config = CONFIGS[name]
    config = replace(config, vision=replace(config.vision, patch_dropout=dropout))
    model, params, tokens = setting(config)
    keys = jax.random.split(jax.random.key(0), len(GRIDS)) if dropout else None

    @jax.jit
    def loss_and_gradients(params, pixels, patches):
        def loss(params, pixels):
            out = outputs(model, params, replace(patches, pixels=pixels), tokens, keys)
            weights = {n: jnp.cos(jnp.arange(x.size)).reshape(x.shape) for n, x in out.items()}
            return sum((out[name] * weights[name]).sum() for name in out), out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, pixels)

    (clean, dirty) = (images(padding=std) for std in (0.0, 30.0))
    expected = loss_and_gradients(params, clean.pixels, clean)
    found = loss_and_gradients(params, dirty.pixels, dirty)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    gradient = np.asarray(found[1][1])
    padding = np.arange(LENGTH) >= clean.length[:, None]
    assert not gradient[padding].any()
    reached = (gradient != 0).any(-1).sum(1)
    np.testing.assert_array_equal(reached, [12, 4, 4, 4] if dropout else clean.length)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_lengths_agree(config):
    """L, L + 64, and an image alone without padding."""
    model, params, tokens = setting(config)
    run = jax.jit(functools.partial(outputs, model))
    expected = run(params, images(), tokens)
    longer = run(params, images(length=LENGTH + 64, padding=1.0), tokens)
    for name in expected:
        np.testing.assert_allclose(longer[name], expected[name], rtol=0, atol=1e-6)
    alone = run(params, images(GRIDS[1:2], 9), tokens[1:2])
    for name in expected:
        np.testing.assert_allclose(alone[name], expected[name][1:2], rtol=0, atol=1e-6)
    unlike = np.linalg.norm(expected["image"] - expected["image"].mean(0), axis=1)
    assert unlike.min() > 0.01
    empty = run(params, zeros(NaFlex(LENGTH, PATCH), len(GRIDS)), tokens)
    assert all(np.isfinite(x).all() for x in empty.values())


@pytest.mark.parametrize(
    ("name", "method"),
    [("class_token", "greedy"), ("map", "beams"), ("mean_all", "greedy"), ("queries", "beams")],
)
def test_captions_are_generated_alike_at_every_length(name, method):
    """By the cache, which keeps each image's number of tokens; rows share an image in beams."""
    model, params, _ = setting(CONFIGS[name])
    written = GenerationConfig(method=method, beams=3, max_length=8, min_length=6)

    @jax.jit
    def run(params, patches):
        return generate(model, params, model.encode_image_and_tokens(params, patches)[1], written)

    expected = run(params, images())
    np.testing.assert_array_equal(run(params, images(padding=30.0)), expected)
    longer = run(params, images(length=LENGTH + 64, padding=1.0))
    np.testing.assert_array_equal(longer, expected)
    assert len(np.unique(expected, axis=0)) > 1


@pytest.mark.parametrize("name", ["map", "mean_all"])
def test_token_by_token_gives_the_same_logits(name):
    model, params, tokens = setting(CONFIGS[name])
    patches = images(padding=30.0)
    _, image_tokens = jax.jit(model.encode_image_and_tokens)(params, patches)
    expected = jax.jit(functools.partial(decode_text, model))(params, tokens, image_tokens)
    separate, step = apart(params), jax.jit(model.decode_next)
    cache, logits = model.empty_cache(*tokens.shape), []
    for place in range(tokens.shape[1] - 1):
        image = image_tokens if place == 0 else None
        last, cache = step(separate, tokens[:, place], image, cache, jnp.int32(place))
        logits.append(last)
    unit = np.finfo(np.float32).eps * np.abs(expected).max()
    np.testing.assert_allclose(jnp.stack(logits, axis=1), expected, rtol=0, atol=8 * unit)


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


def test_heads_of_a_pooling_that_a_tower_lacks_are_any_number():
    """EVA pools its class token; PE core's pooling divides the width by its heads."""
    sizes = {"width": 48, "num_heads": 4, "pool_heads": 5}
    assert RotaryConfig(pool="class_token", **sizes).width == 48
    with pytest.raises(InputError, match=r"width=48 must be a multiple of vision.pool_heads=5"):
        RotaryConfig(pool="map", **sizes)
