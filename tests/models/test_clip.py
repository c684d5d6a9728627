"""The towers: golden trees, what a pool sees, initialisation; tokens and layers of both, and
gradients that reach the pixels."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn

from clip_jax.models import layers
from clip_jax.models.clip import CLIP, CLIPConfig, Params, l2_normalize
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import Masked, ViTConfig
from clip_jax.sharding import path_name
from tests.conftest import COCA, DECODERS, RESNET, TINY, parameter_tree, parameters

GOLDEN = Path(__file__).parent.parent / "golden"


def vision(**options) -> CLIPConfig:
    return dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, **options))


TOKENS = jnp.array([[518, 5, 6, 519, 0, 0, 0, 0, 0, 0], [518, 7, 519, 0, 0, 0, 0, 0, 0, 0]])


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("layer", "norm"))
def run(model, method, *args, **options):
    return getattr(model, method)(*args, **options)


@pytest.fixture(scope="module")
def params():
    return parameters(TINY)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 16, 16, 3))


def image_grads(config: CLIPConfig) -> Params:
    """Gradients of some function of the image features, by the image tower's parameters."""
    model, size = CLIP(config), config.vision.image_size
    images = np.random.default_rng(0).standard_normal((2, size, size, 3), np.float32)
    gradients = jax.grad(lambda p, images: (model.encode_image(p, images) ** 2).sum())
    return jax.device_get(jax.jit(gradients)(parameters(config), images))["visual"]


@pytest.mark.parametrize("sums", [layers._sums, layers._flat_sums])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_gradients_of_a_linear_map_are_exact(dtype, bound, sums, monkeypatch):
    """As a TPU and as a CPU sums them; in bfloat16 the results alone are rounded."""
    monkeypatch.setattr(layers, "_flat_sums", sums)
    rng = np.random.default_rng(0)
    shapes = (2, 50, 24), (24, 5, 8), (5, 8), (2, 50, 40)
    inputs = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    y, back = jax.vjp(layers.affine, *inputs[:3])
    got = y, *back(inputs[3])
    x, kernel, bias, dy = (np.float64(a) for a in inputs)
    kernel = kernel.reshape(24, 40)
    weights = np.einsum("BLD,BLF->DF", x, dy), dy.sum((0, 1))
    for a, b in zip(got, (x @ kernel + bias.ravel(), dy @ kernel.T, *weights), strict=True):
        assert a.dtype == dtype
        assert np.abs(np.float64(a).reshape(b.shape) - b).max() <= bound * np.abs(b).max()


def test_gelu_in_bfloat16_errs_no_more_than_rounding():
    """Its value and its slope, against float64; float32 keeps the error function."""
    drawn = 2 * np.random.default_rng(0).standard_normal(20_000)
    x = jnp.asarray([*drawn, -1e38, -40, -5, 0, 5, 40, 1e38], jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    area, density = scipy.stats.norm.cdf(wide), scipy.stats.norm.pdf(wide)
    for ours, exact in zip(
        jax.jit(jax.vmap(jax.value_and_grad(layers.gelu)))(x),
        (wide * area, area + wide * density),
        strict=True,
    ):
        rounded = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64)
        got = np.asarray(ours, np.float64)
        errors = [np.linalg.norm(y[:-7] - exact[:-7]) for y in (got, rounded)]
        assert errors[0] <= 1.01 * errors[1]
        np.testing.assert_allclose(got[-7:], exact[-7:], rtol=4e-3, atol=1e-5)
    single = jnp.asarray(drawn, jnp.float32)
    np.testing.assert_array_equal(layers.gelu(single), nn.gelu(single, approximate=False))


def test_the_trees_of_parameters_are_the_public_format():
    assert parameter_tree() == json.loads((GOLDEN / "parameter_tree.json").read_text())
    decoders = {name: parameter_tree(config) for name, config in DECODERS.items()}
    assert decoders == json.loads((GOLDEN / "decoder_trees.json").read_text())


@pytest.mark.parametrize(
    ("config", "options", "seen"),
    [
        (TINY, {}, range(4)),
        (TINY, {"pool": "eos", "eos_token_id": 5}, range(2)),
        (TINY, {"causal": False, "pool": "last"}, range(10)),
        (COCA, {}, (0, 1, 2, 3, 10)),
        (COCA, {"correct_class_mask": False}, (0, 1, 2, 3, 4, 10)),
    ],
)
def test_a_text_is_embedded_from_the_positions_that_its_pool_sees(config, options, seen):
    """End of text is at position 3, padding follows; a class token, at 10, sees no padding."""
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, **options))
    model, params, tokens = CLIP(config), parameters(config), TOKENS[:1]

    @jax.jit
    @jax.grad
    def by_position(positions):
        text = params["text"] | {"positional_embedding": positions}
        return (model.encode_text(params | {"text": text}, tokens) ** 2).sum()

    moved = np.abs(by_position(params["text"]["positional_embedding"])).max(axis=1)
    assert np.flatnonzero(moved).tolist() == [*seen]


@pytest.mark.parametrize(
    "config",
    [
        vision(pool="mean", pre_norm=False, image_size=18, activation="gelu", mlp_ratio=3.5),
        vision(pool="map", class_token=False, pre_norm=False, patch_bias=True, layer_scale=0.1),
    ],
    ids=["mean, cropped", "map, layer_scale"],
)
def test_options_run_and_reach_every_parameter(config):
    for path, grad in jax.tree_util.tree_leaves_with_path(image_grads(config)):
        assert np.abs(grad).max() > 0, path


def test_bfloat16_computes_close_to_float32_and_keeps_float32_parameters(params, images):
    model16 = CLIP(dataclasses.replace(TINY, dtype="bfloat16"))
    drawn = jax.eval_shape(model16.init, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(drawn)} == {jnp.dtype("float32")}
    exact = run(CLIP(TINY), "encode_image", params, images)
    rounded = run(model16, "encode_image", params, images)
    assert rounded.dtype == jnp.float32
    difference = np.linalg.norm(exact - rounded) / np.linalg.norm(exact)
    assert 1e-6 < difference < 2e-2
    x = jnp.asarray(50 + images.reshape(4, -1), jnp.bfloat16)  # whose mean bfloat16 would round
    y, _ = layers.LayerNorm().init_with_output(jax.random.key(0), x)
    x = np.float64(x)
    expected = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    assert np.abs(np.float64(y) - expected).max() < 0.01


def test_initialisation_has_the_papers_scales():
    width, depth = 128, 4
    config = dataclasses.replace(
        TINY,
        vision=ViTConfig(image_size=32, patch_size=8, width=width, depth=depth, num_heads=2),
        text=TextConfig(vocab_size=2000, width=width, depth=depth, num_heads=2),
    )
    params = jax.jit(CLIP(config).init)(jax.random.key(0))
    flat = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    expected = {
        "text/token_embedding": 0.02,
        "text/positional_embedding": 0.01,
        "text/transformer/resblocks/attn/in_proj/kernel": width**-0.5,
        "text/transformer/resblocks/attn/out_proj/kernel": width**-0.5 * (2 * depth) ** -0.5,
        "text/transformer/resblocks/mlp/c_fc/kernel": (2 * width) ** -0.5,
        "text/transformer/resblocks/mlp/c_proj/kernel": width**-0.5 * (2 * depth) ** -0.5,
        "text/text_projection": width**-0.5,
        "visual/proj": width**-0.5,
        # A uniform on ±a has standard deviation a/√3.
        "visual/conv1/kernel": (3 * 64) ** -0.5 / 3**0.5,
        "visual/transformer/resblocks/attn/in_proj/kernel": (6 / 512 / 3) ** 0.5,
        "visual/transformer/resblocks/mlp/c_proj/kernel": 512**-0.5 / 3**0.5,
    }
    for name, deviation in expected.items():
        assert np.std(flat[name]) == pytest.approx(deviation, rel=0.05), name
    assert float(jnp.exp(params["logit_scale"])) == pytest.approx(1 / 0.07)
    assert not np.any(flat["text/transformer/resblocks/attn/in_proj/bias"])


# ------------------------------------------------------------------ tokens and layers


def shallower(config, params, tower, depth):
    """The same model with a tower's last blocks taken away, and what is left of `params`."""
    field = {"visual": "vision", "text": "text"}[tower]
    part = dataclasses.replace(getattr(config, field), depth=depth)
    blocks = jax.tree.map(lambda x: x[:depth], params[tower]["transformer"])
    params = params | {tower: params[tower] | {"transformer": blocks}}
    return CLIP(dataclasses.replace(config, **{field: part})), params


def test_the_normed_class_token_is_the_feature_of_a_tower_that_ends_there(images, params):
    model = CLIP(TINY)
    for layer, depth in ((-1, 2), (0, 1)):
        states = run(model, "image_tokens", params, images, layer=layer, norm=True)
        assert states.shape == (2, 5, 32)
        ended, fewer = shallower(TINY, params, "visual", depth)
        features = run(ended, "encode_image", fewer, images)
        pooled = states[:, 0] @ params["visual"]["proj"]
        np.testing.assert_allclose(pooled, features, atol=1e-5)


def test_pooled_and_patches_are_the_embedding_and_the_normed_states(images, params):
    pooled, patches = run(CLIP(TINY), "pooled_and_patches", params, images)
    np.testing.assert_allclose(pooled, run(CLIP(TINY), "encode_image", params, images), atol=1e-6)
    states = run(CLIP(TINY), "image_tokens", params, images, norm=True)
    np.testing.assert_allclose(patches, states[:, 1:], atol=1e-6)


@pytest.mark.parametrize("side", [8, 24, 32])
def test_images_of_another_size_are_those_of_the_model_fitted_to_it(side, params):
    fitted = vision(image_size=side)
    path = TINY.vision.positions_path
    *_, name = path.split("/")
    table = fitted.vision.fit({path: params["visual"][name]}, TINY.vision)[path]
    images = jax.random.normal(jax.random.key(2), (2, side, side, 3))
    got = run(CLIP(TINY), "pooled_and_patches", params, images)
    params = params | {"visual": params["visual"] | {name: table}}
    expected = run(CLIP(fitted), "pooled_and_patches", params, images)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, expected)


def test_masked_patches_are_not_seen_and_their_positions_are(images, params):
    """The states depend on the token, on where it is, and on the patches that are seen."""
    token = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    patches = np.array([[True, False, False, True], [False, False, True, False]])

    def states(images, patches=patches, token=token):
        masked = Masked(jnp.asarray(patches), jnp.asarray(token))
        return run(CLIP(TINY), "pooled_and_patches", params, images, masked)[1]

    expected = states(images)
    hidden = images.at[0, :8, :8].add(1.0).at[0, 8:, 8:].add(1.0).at[1, 8:, :8].add(1.0)
    np.testing.assert_array_equal(states(hidden), expected)
    for other in (
        states(images.at[:, :8, 8:].add(1.0)),
        states(images, token=2 * token),
        states(images, patches=np.roll(patches, 1, axis=1)),
    ):
        assert (np.abs(other - expected).max((1, 2)) > 1e-2).all()
    assert (expected[0, 0] != expected[0, 3]).any()


def test_the_end_of_normed_text_tokens_is_the_feature_of_a_tower_that_ends_there(params):
    model = CLIP(TINY)
    for layer, depth in ((-1, 2), (-2, 1)):
        states = run(model, "text_tokens", params, TOKENS, layer=layer, norm=True)
        assert states.shape == (2, 10, 32)
        ended, fewer = shallower(TINY, params, "text", depth)
        features = run(ended, "encode_text", fewer, TOKENS)
        at_end = states[np.arange(2), [3, 2]] @ params["text"]["text_projection"]
        np.testing.assert_allclose(at_end, features, atol=1e-5)


def test_a_step_along_the_gradient_of_the_pixels_raises_the_similarity(params, images):
    """Guidance, by as much as the gradient says; vmap over images is the batch."""
    model, params = CLIP(TINY), jax.tree.map(jnp.asarray, params)
    text = l2_normalize(run(model, "encode_text", params, TOKENS[:1]))[0]

    @jax.jit
    @jax.vmap
    @jax.value_and_grad
    def similarity(image):
        return l2_normalize(model.encode_image(params, image[None]))[0] @ text

    before, gradient = similarity(images)
    features = run(model, "encode_image", params, images)
    np.testing.assert_allclose(before, l2_normalize(features) @ text, atol=1e-5)
    squares = jnp.square(gradient).sum((1, 2, 3), keepdims=True)
    after, _ = similarity(images + 1e-3 * gradient / squares)
    np.testing.assert_allclose(after - before, 1e-3, rtol=0.02)


def test_wrong_shapes_and_layers_are_named(params, images):
    model = CLIP(TINY)
    with pytest.raises(ValueError, match=r"vision.image_size=16"):
        model.encode_image(params, jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match=r"text.context_length=10"):
        model.encode_text(params, jnp.zeros((1, 11), jnp.int32))
    with pytest.raises(ValueError, match=r"vision.num_heads=5"):
        ViTConfig(num_heads=5)
    with pytest.raises(ValueError, match="layer=2: the tower has 2 blocks"):
        model.image_tokens(params, images, 2)
    with pytest.raises(ValueError, match="layer=-3: the tower has 2 blocks"):
        model.text_tokens(params, TOKENS, -3)
    with pytest.raises(ValueError, match="vision transformer, not a ResNet"):
        CLIP(RESNET).image_tokens(params, jnp.zeros((1, 32, 32, 3)))
