"""Tokens and layers of both towers; gradients reach the pixels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.clip import CLIP, CLIPConfig, l2_normalize
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

TINY = CLIPConfig(
    embed_dim=16,
    vision=ViTConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2),
    text=TextConfig(vocab_size=520, context_length=10, width=32, depth=2, num_heads=2),
    dtype="float32",
)
TOKENS = jnp.array([[518, 5, 6, 519, 0, 0, 0, 0, 0, 0], [518, 7, 519, 0, 0, 0, 0, 0, 0, 0]])


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("layer", "norm"))
def run(model, method, *args, **options):
    return getattr(model, method)(*args, **options)


@pytest.fixture(scope="module")
def params():
    return run(CLIP(TINY), "init", jax.random.key(0))


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 16, 16, 3))


def shallower(config, params, tower, depth):
    """The same model with a tower's last blocks taken away, and what is left of `params`."""
    field = {"visual": "vision", "text": "text"}[tower]
    part = dataclasses.replace(getattr(config, field), depth=depth)
    blocks = jax.tree.map(lambda x: x[:depth], params[tower]["transformer"])
    params = params | {tower: params[tower] | {"transformer": blocks}}
    return CLIP(dataclasses.replace(config, **{field: part})), params


@pytest.mark.parametrize("pool", ["class_token", "map"])
def test_pooled_image_tokens_are_the_features_of_a_tower_that_ends_there(images, pool):
    config = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, pool=pool))
    model = CLIP(config)
    params = run(model, "init", jax.random.key(0))
    for layer, depth in ((-1, 2), (0, 1), (-2, 1)):
        states = run(model, "image_tokens", params, images, layer=layer)
        assert states.shape == (2, 5, 32)
        ended, fewer = shallower(config, params, "visual", depth)
        features = run(ended, "encode_image", fewer, images)
        np.testing.assert_allclose(run(model, "pool_image", params, states), features, atol=1e-5)


def test_text_tokens_are_causal_and_their_end_is_the_feature(params):
    model = CLIP(TINY)
    for layer, depth in ((-1, 2), (0, 1), (-2, 1)):
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
    np.testing.assert_allclose(normed, (plain - mean) / np.sqrt(variance + 1e-5), atol=1e-5)


def test_vmap_over_images_is_the_batch(params, images):
    model = CLIP(TINY)
    one = jax.jit(jax.vmap(lambda image: model.encode_image(params, image[None])[0]))
    features = run(model, "encode_image", params, images)
    np.testing.assert_allclose(one(images), features, atol=1e-5)


def test_following_the_gradient_of_the_pixels_raises_the_similarity(params, images):
    """Guidance: the image moves towards a text."""
    model = CLIP(TINY)
    text = l2_normalize(run(model, "encode_text", params, TOKENS[:1]))[0]

    @jax.jit
    @jax.value_and_grad
    def similarity(image):
        return l2_normalize(model.encode_image(params, image[None]))[0] @ text

    image, seen = images[0], []
    for _ in range(12):
        value, gradient = similarity(image)
        seen.append(float(value))
        image = image + 0.5 * gradient / jnp.linalg.norm(gradient)
    assert np.all(np.diff(seen) > 0)
    assert seen[-1] > seen[0] + 0.1


def test_what_does_not_exist_is_said(params, images):
    with pytest.raises(ValueError, match="layer=2: the vision tower has 2 blocks"):
        CLIP(TINY).image_tokens(params, images, 2)
    with pytest.raises(ValueError, match="layer=-3: the text tower has 2 blocks"):
        CLIP(TINY).text_tokens(params, TOKENS, -3)
    resnet = ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=4, num_heads=2)
    model = CLIP(dataclasses.replace(TINY, vision=resnet))
    with pytest.raises(ValueError, match="vision transformer, not a ResNet"):
        model.image_tokens(run(model, "init", jax.random.key(0)), jnp.zeros((1, 32, 32, 3)))
