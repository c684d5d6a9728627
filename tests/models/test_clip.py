"""The towers: counts against the published tables, causality, pooling, remat, a golden tree;
tokens and layers of both, and gradients that reach the pixels."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models import layers
from clip_jax.models.clip import CLIP, CLIPConfig, Params, l2_normalize
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from tests.conftest import RESNET, TINY, assert_close, parameter_tree, parameters

HERE = Path(__file__).parent


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


@functools.cache
def lowered(config: CLIPConfig) -> jax.stages.Lowered:
    """Gradients of some function of the image features, by every parameter of the image tower."""
    model, shape = CLIP(config), (2, config.vision.image_size, config.vision.image_size, 3)
    params = jax.eval_shape(model.init, jax.random.key(0))
    gradients = jax.grad(lambda p, images: (model.encode_image(p, images) ** 2).sum())
    return jax.jit(gradients).lower(params, jax.ShapeDtypeStruct(shape, np.float32))


@functools.cache
def compiled(config: CLIPConfig) -> jax.stages.Compiled:
    return lowered(config).compile()


def image_grads(config: CLIPConfig) -> Params:
    size = config.vision.image_size
    images = np.random.default_rng(0).standard_normal((2, size, size, 3), np.float32)
    return jax.device_get(compiled(config)(parameters(config), images))["visual"]


@pytest.mark.parametrize("sums", [layers._sums, layers._flat_sums])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_gradients_of_a_linear_map_are_exact(dtype, bound, sums, monkeypatch):
    """As a TPU and as a CPU sums them; in bfloat16 the results alone are rounded."""
    monkeypatch.setattr(layers, "_flat_sums", sums)
    rng = np.random.default_rng(0)
    shapes = (2, 50, 24), (24, 5, 8), (5, 8), (2, 50, 40)
    x, kernel, bias, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    y, back = jax.vjp(layers.affine, x, kernel, bias)
    got = y, *back(dy)
    axes = kernel.shape, bias.shape
    x, kernel, bias, dy = (np.float64(a) for a in (x, kernel, bias, dy))
    kernel, bias = kernel.reshape(24, 40), bias.reshape(40)
    dkernel, dbias = np.einsum("BLD,BLF->DF", x, dy), dy.sum((0, 1))
    expected = x @ kernel + bias, dy @ kernel.T, dkernel.reshape(axes[0]), dbias.reshape(axes[1])
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        assert np.abs(np.float64(a) - b).max() <= bound * np.abs(b).max()


def test_the_tree_of_parameters_is_the_public_format():
    assert parameter_tree() == json.loads((HERE.parent / "golden/parameter_tree.json").read_text())


def test_text_is_causal_unless_it_is_not(params):
    tokens = jnp.array([[518, 5, 6, 519, 0, 0, 0, 0, 0, 0]])

    def moved(**options):
        """Positions that the embedding depends on."""
        model = CLIP(dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, **options)))

        @jax.jit
        @jax.grad
        def by_position(embedding):
            text = params["text"] | {"positional_embedding": embedding}
            return model.encode_text(params | {"text": text}, tokens).sum()

        return np.abs(by_position(params["text"]["positional_embedding"])).max(axis=1) > 0

    # End of text stands at position 3: what comes after has no influence, all before has.
    assert moved().tolist() == [True] * 4 + [False] * 6
    assert moved(causal=False, pool="last").all()


@pytest.mark.parametrize(
    "config",
    [
        vision(pool="mean", pre_norm=False, image_size=18, activation="gelu", mlp_ratio=3.5),
        vision(
            pool="map", class_token=False, pre_norm=False, patch_bias=True, layer_scale=0.1,
        ),
    ],
    ids=["mean, cropped", "map, layer_scale"],
)  # fmt: skip
def test_options_run_and_reach_every_parameter(config):
    for path, grad in jax.tree_util.tree_leaves_with_path(image_grads(config)):
        assert np.abs(grad).max() > 0, path


REMAT = ("none", "hidden", "residual", "attention", "full")  # cheapest first


def test_every_remat_computes_more_again():
    texts = [lowered(dataclasses.replace(TINY, remat=remat)).as_text() for remat in REMAT]
    matmuls = [text.count("stablehlo.dot_general") for text in texts]
    assert matmuls == sorted(set(matmuls))


@pytest.mark.parametrize("remat", ["hidden", "full"])
def test_remat_changes_nothing(remat):
    plain, again = image_grads(TINY), image_grads(dataclasses.replace(TINY, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, again)


def test_unrolled_layers_are_no_loop_and_change_nothing():
    """Nor does recomputation go away, which nothing but the loop kept apart."""
    unrolled = dataclasses.replace(TINY, unroll=2)
    again = dataclasses.replace(unrolled, remat="full")
    assert_close(image_grads(TINY), image_grads(again))
    assert "stablehlo.while" in lowered(TINY).as_text()
    assert "stablehlo.while" not in lowered(again).as_text()
    matmuls = [compiled(config).as_text().count(" dot(") for config in (unrolled, again)]
    assert matmuls[0] < matmuls[1]


def test_bfloat16_computes_close_to_float32_and_keeps_float32_parameters(params, images):
    model16 = CLIP(dataclasses.replace(TINY, dtype="bfloat16"))
    drawn = jax.eval_shape(model16.init, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(drawn)} == {jnp.dtype("float32")}
    exact = run(CLIP(TINY), "encode_image", params, images)
    rounded = run(model16, "encode_image", params, images)
    assert rounded.dtype == jnp.float32
    difference = np.linalg.norm(exact - rounded) / np.linalg.norm(exact)
    assert 1e-6 < difference < 2e-2


def test_initialisation_has_the_papers_scales():
    config = dataclasses.replace(
        TINY,
        vision=ViTConfig(image_size=32, patch_size=8, width=128, depth=4, num_heads=2),
        text=TextConfig(vocab_size=2000, width=128, depth=4, num_heads=2),
    )
    params = jax.jit(CLIP(config).init)(jax.random.key(0))
    text, visual = params["text"], params["visual"]
    block, image_block = text["transformer"]["resblocks"], visual["transformer"]["resblocks"]
    width, depth = 128, 4
    expected = {
        "token": (text["token_embedding"], 0.02),
        "positions": (text["positional_embedding"], 0.01),
        "in_proj": (block["attn"]["in_proj"]["kernel"], width**-0.5),
        "out_proj": (block["attn"]["out_proj"]["kernel"], width**-0.5 * (2 * depth) ** -0.5),
        "c_fc": (block["mlp"]["c_fc"]["kernel"], (2 * width) ** -0.5),
        "c_proj": (block["mlp"]["c_proj"]["kernel"], width**-0.5 * (2 * depth) ** -0.5),
        "text_projection": (text["text_projection"], width**-0.5),
        "proj": (visual["proj"], width**-0.5),
        # A uniform on ±a has standard deviation a/√3.
        "conv1": (visual["conv1"]["kernel"], (3 * 64) ** -0.5 / 3**0.5),
        "image in_proj": (image_block["attn"]["in_proj"]["kernel"], (6 / 512 / 3) ** 0.5),
        "image c_proj": (image_block["mlp"]["c_proj"]["kernel"], 512**-0.5 / 3**0.5),
    }
    for name, (x, deviation) in expected.items():
        assert np.std(x) == pytest.approx(deviation, rel=0.05), name
    assert float(jnp.exp(params["logit_scale"])) == pytest.approx(1 / 0.07)
    assert not np.any(block["attn"]["in_proj"]["bias"])


# ------------------------------------------------------------------ tokens and layers


def shallower(config, params, tower, depth):
    """The same model with a tower's last blocks taken away, and what is left of `params`."""
    field = {"visual": "vision", "text": "text"}[tower]
    part = dataclasses.replace(getattr(config, field), depth=depth)
    blocks = jax.tree.map(lambda x: x[:depth], params[tower]["transformer"])
    params = params | {tower: params[tower] | {"transformer": blocks}}
    return CLIP(dataclasses.replace(config, **{field: part})), params


@pytest.mark.parametrize("pool", ["class_token", "map"])
def test_pooled_image_tokens_are_the_features_of_a_tower_that_ends_there(images, pool):
    config = vision(pool=pool)
    model, params = CLIP(config), parameters(config)
    for layer, depth in ((-1, 2), (0, 1)):
        states = run(model, "image_tokens", params, images, layer=layer)
        assert states.shape == (2, 5, 32)
        ended, fewer = shallower(config, params, "visual", depth)
        features = run(ended, "encode_image", fewer, images)
        np.testing.assert_allclose(run(model, "pool_image", params, states), features, atol=1e-5)


def test_text_tokens_are_causal_and_their_end_is_the_feature(params):
    model = CLIP(TINY)
    for layer, depth in ((-1, 2), (-2, 1)):
        states = run(model, "text_tokens", params, TOKENS, layer=layer, norm=True)
        assert states.shape == (2, 10, 32)
        ended, fewer = shallower(TINY, params, "text", depth)
        features = run(ended, "encode_text", fewer, TOKENS)
        at_end = states[np.arange(2), [3, 2]] @ params["text"]["text_projection"]
        np.testing.assert_allclose(at_end, features, atol=1e-5)
    last, again = (
        run(model, "text_tokens", params, tokens, layer=-1, norm=True)
        for tokens in (TOKENS, TOKENS.at[:, 3:].set(9))
    )
    np.testing.assert_allclose(again[:, :3], last[:, :3], atol=1e-6)
    assert np.abs(again[:, 3:] - last[:, 3:]).max() > 1e-3


def test_norm_is_the_towers_own(params, images):
    model = CLIP(TINY)
    plain, normed = (
        run(model, "image_tokens", params, images, layer=1, norm=norm) for norm in (False, True)
    )
    mean, variance = plain.mean(-1, keepdims=True), plain.var(-1, keepdims=True)
    expected = (plain - mean) / np.sqrt(variance + 1e-5) + params["visual"]["ln_post"]["bias"]
    np.testing.assert_allclose(normed, expected, atol=1e-5)


def test_following_the_gradient_of_the_pixels_raises_the_similarity(params, images):
    """Guidance: each image moves towards a text; vmap over images is the batch."""
    model = CLIP(TINY)
    text = l2_normalize(run(model, "encode_text", params, TOKENS[:1]))[0]

    @jax.jit
    @jax.vmap
    @jax.value_and_grad
    def similarity(image):
        return l2_normalize(model.encode_image(params, image[None]))[0] @ text

    seen = []
    for _ in range(12):
        value, gradient = similarity(images)
        seen.append(value)
        images = images + 0.5 * l2_normalize(gradient.reshape(2, -1)).reshape(gradient.shape)
    features = run(model, "encode_image", params, images)
    np.testing.assert_allclose(similarity(images)[0], l2_normalize(features) @ text, atol=1e-5)
    assert np.all(np.diff(seen, axis=0) > 0)
    assert np.all(seen[-1] > seen[0] + 0.1)


def test_wrong_shapes_and_layers_are_named(params, images):
    model = CLIP(TINY)
    with pytest.raises(ValueError, match=r"vision.image_size=16"):
        model.encode_image(params, jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match=r"text.context_length=10"):
        model.encode_text(params, jnp.zeros((1, 11), jnp.int32))
    with pytest.raises(ValueError, match=r"vision.num_heads=5"):
        ViTConfig(num_heads=5)
    with pytest.raises(ValueError, match="layer=2: the vision tower has 2 blocks"):
        model.image_tokens(params, images, 2)
    with pytest.raises(ValueError, match="layer=-3: the text tower has 2 blocks"):
        model.text_tokens(params, TOKENS, -3)
    with pytest.raises(ValueError, match="vision transformer, not a ResNet"):
        CLIP(RESNET).image_tokens(params, jnp.zeros((1, 32, 32, 3)))
