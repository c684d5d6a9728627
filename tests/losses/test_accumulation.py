"""Cached accumulation gives the gradients of the one big batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.losses import SoftmaxConfig, cached_value_and_grad, contrastive_loss
from clip_jax.sharding import BATCH_AXES, MeshConfig, batch_sharding, make_mesh

BATCH, PIXELS, TOKENS, EMBED = 64, 24, 8, 16


def setting() -> tuple[dict, dict]:
    draw = np.random.default_rng(0).normal
    params = {
        "image": draw(size=(PIXELS, 32)),
        "image_out": draw(size=(32, EMBED)),
        "text": draw(size=(TOKENS, EMBED)),
        "logit_scale": np.log(10.0),
    }
    batch = {"image": draw(size=(BATCH, PIXELS)), "text": draw(size=(BATCH, TOKENS))}
    params, batch = jax.tree.map(lambda a: np.asarray(a, np.float32), (params, batch))
    return params, batch | {"row": np.arange(BATCH)}


@jax.checkpoint
def encode(params: dict, chunk: dict) -> Any:
    keep = (5 * chunk["row"][:, None] + 7 * jnp.arange(PIXELS)) % 3 > 0  # like patch dropout
    hidden = jnp.tanh(jnp.where(keep, chunk["image"], 0) @ params["image"])
    features = hidden @ params["image_out"], jnp.tanh(chunk["text"]) @ params["text"]
    return features, {"running_mean": hidden.mean(0)}


@pytest.mark.parametrize(
    ("devices", "num_chunks", "group_size", "form"),
    [(1, 8, 1, "ring"), (8, 2, 4, "dense")],
)
def test_equals_one_big_batch(devices: int, num_chunks: int, group_size: int, form: str) -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    params, batch = setting()
    params = jax.device_put(params, NamedSharding(mesh, P()))
    batch = jax.device_put(batch, batch_sharding(mesh))

    def loss_fn(form: str, params: dict, *features: jax.Array) -> Any:
        image, text = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in features)
        config = SoftmaxConfig(form=form, block_size=7)
        scale = jnp.exp(params["logit_scale"])
        return contrastive_loss(config, image, text, scale, mesh=mesh, axes=BATCH_AXES)

    def big(params: dict) -> Any:
        features, statistics = encode(params, batch)
        loss, metrics = loss_fn("dense", params, *features)
        return loss, (metrics, statistics)

    def parts(params: dict, batch: dict) -> Any:
        loss = functools.partial(loss_fn, form)
        return cached_value_and_grad(encode, loss, params, batch, num_chunks, group_size=group_size)

    got = jax.jit(parts)(params, batch)
    want = jax.jit(jax.value_and_grad(big, has_aux=True))(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_uneven_chunks_are_refused() -> None:
    params, batch = {"logit_scale": 0.0}, {"image": jnp.zeros((12, 2))}
    with pytest.raises(ValueError, match="12 does not divide into 8 chunks"):
        cached_value_and_grad(encode, lambda p, *f: (0, {}), params, batch, 8)
