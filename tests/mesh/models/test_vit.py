"""Padding of NaFlex images changes neither the outputs nor the gradients of a captioner."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.clip import CLIP, l2_normalize
from clip_jax.models.generation import GenerationConfig, generate
from clip_jax.models.images import Patches
from tests.conftest import MAMMUT, NAFLEX_COCA, batch, parameters

# Captioners whose decoder attends to the patches, not to the queries of a pool.
CAPTIONERS = {
    "class_token": replace(NAFLEX_COCA, vision=replace(NAFLEX_COCA.vision, pool="class_token")),
    "map": replace(NAFLEX_COCA, vision=replace(NAFLEX_COCA.vision, pool="map", class_token=False)),
    "mean_all": replace(MAMMUT, vision=replace(MAMMUT.vision, image_size=32, max_patches=24)),
}


@pytest.mark.parametrize("name", CAPTIONERS)
def test_padding_changes_nothing_in_captions(name):
    """Outputs and gradients are bitwise equal whatever the padding contains, and its own gradient
    is zero. An image alone, without padding, has the same outputs."""
    config = CAPTIONERS[name]
    model, params = CLIP(config), jax.tree.map(jnp.asarray, parameters(config))
    data = batch(config, 8)
    clean, tokens = model.normalize(jax.tree.map(jnp.asarray, data["image"])), data["text"]
    count = clean.pixels.shape[1]
    padding = np.arange(count) >= np.asarray(clean.length)[:, None]
    noise = 30 * np.random.default_rng(0).standard_normal(clean.pixels.shape, np.float32)
    dirty = jnp.where(padding.reshape(8, count, *[1] * (noise.ndim - 2)), noise, clean.pixels)

    def outputs(params, patches, tokens):
        needs = ("caption_states",)
        out, _ = model.outputs(params, {"image": patches}, {"text": tokens}, needs)
        return {kind: l2_normalize(x) for kind, x in out.items()}

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss_and_gradients(params, pixels):
        out = outputs(params, replace(clean, pixels=pixels), tokens)
        weights = {kind: jnp.cos(jnp.arange(x.size)).reshape(x.shape) for kind, x in out.items()}
        return sum((out[kind] * weights[kind]).sum() for kind in out), out

    expected = loss_and_gradients(params, clean.pixels)
    got = loss_and_gradients(params, dirty)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    gradient = np.asarray(got[1][1])
    assert not gradient[padding].any()
    reached = (gradient != 0).reshape(8, count, -1).any(-1).sum(1)
    np.testing.assert_array_equal(reached, clean.length)

    (_, together), _ = expected
    valid = int(clean.length[5])
    single = Patches(clean.pixels[5:6, :valid], clean.grid[5:6], clean.length[5:6])
    alone = jax.jit(outputs)(params, single, tokens[5:6])
    for kind, x in alone.items():
        np.testing.assert_allclose(x, together[kind][5:6], rtol=0, atol=1e-6)


def test_captions_are_generated_alike_at_every_length():
    """The decoder's cache has each image's number of tokens. The beams of an image share it."""
    config = CAPTIONERS["map"]
    model, params = CLIP(config), jax.tree.map(jnp.asarray, parameters(config))
    written = GenerationConfig(method="beams", beams=3, max_length=8, min_length=6)
    images = model.normalize(jax.tree.map(jnp.asarray, batch(config, 8)["image"]))
    count, more = images.pixels.shape[1], 64
    padding = np.arange(count + more) >= np.asarray(images.length)[:, None]
    noise = 30 * np.random.default_rng(0).standard_normal((*padding.shape, 192), np.float32)
    shape = (*padding.shape, *images.pixels.shape[2:])
    widths = [(0, 0), (0, more), *[(0, 0)] * (images.pixels.ndim - 2)]
    padded = np.pad(np.asarray(images.pixels), widths)
    pixels = np.where(
        padding.reshape(*padding.shape, *[1] * (len(shape) - 2)), noise.reshape(shape), padded
    )

    @jax.jit
    def run(params, patches):
        return generate(model, params, model.encode_image_and_tokens(params, patches)[1], written)

    expected = run(params, images)
    np.testing.assert_array_equal(run(params, replace(images, pixels=pixels)), expected)
    assert len(np.unique(expected, axis=0)) > 1
