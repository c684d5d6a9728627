"""Cached accumulation gives the gradients of the one big batch."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.losses import SoftmaxConfig, cached_value_and_grad, contrastive_loss

AXES = ("data", "fsdp")
BATCH, PIXELS, TOKENS, EMBED = 64, 24, 8, 16


def make_mesh(size: int) -> Mesh:
    devices = np.array(jax.devices()[:size]).reshape(-1, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)


KEY = jax.random.key(1, impl="threefry2x32")  # the same under vmap


def setting(mesh: Mesh) -> tuple[dict, dict]:
    draw = np.random.default_rng(0).normal
    params = {
        "image": draw(size=(PIXELS, 32)),
        "image_out": draw(size=(32, EMBED)),
        "text": draw(size=(TOKENS, EMBED)),
        "logit_scale": np.log(10.0),
    }
    batch = {"image": draw(size=(BATCH, PIXELS)), "text": draw(size=(BATCH, TOKENS))}
    params, batch = jax.tree.map(lambda a: np.asarray(a, np.float32), (params, batch))
    batch["row"] = np.arange(BATCH)
    rows, whole = NamedSharding(mesh, P(AXES)), NamedSharding(mesh, P())
    return jax.device_put(params, whole), jax.device_put(batch, rows)


@jax.checkpoint
def encode(params: dict, chunk: dict) -> Any:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, chunk["row"])
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (PIXELS,)))(keys)  # patch dropout
    hidden = jnp.tanh(jnp.where(keep, chunk["image"], 0) @ params["image"])
    features = hidden @ params["image_out"], jnp.tanh(chunk["text"]) @ params["text"]
    return features, {"running_mean": hidden.mean(0)}


def loss_for(mesh: Mesh, form: str) -> Any:
    def loss_fn(params: dict, *features: jax.Array) -> Any:
        image, text = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in features)
        scale = jnp.exp(params["logit_scale"])
        config = SoftmaxConfig(form=form, block_size=7)
        return contrastive_loss(config, image, text, scale, mesh=mesh, axes=AXES)

    return loss_fn


def cached(mesh: Mesh, form: str, num_chunks: int, group_size: int) -> Any:
    def f(params: dict, batch: dict) -> Any:
        return cached_value_and_grad(
            encode, loss_for(mesh, form), params, batch, num_chunks, group_size=group_size
        )

    return jax.jit(f)


@pytest.mark.parametrize(
    ("devices", "num_chunks", "group_size"), [(1, 8, 1), (8, 1, 1), (8, 8, 1), (8, 2, 4)]
)
def test_equals_one_big_batch(devices: int, num_chunks: int, group_size: int) -> None:
    mesh = make_mesh(devices)
    params, batch = setting(mesh)

    def big(params: dict) -> Any:
        chunk_of_row = np.arange(BATCH) // group_size % num_chunks
        features, means = [jnp.zeros((BATCH, EMBED))] * 2, []
        for chunk in range(num_chunks):
            rows = np.flatnonzero(chunk_of_row == chunk)
            part = {name: a[rows] for name, a in batch.items()}
            found, statistics = encode(params, part)
            means.append(statistics["running_mean"])
            features = [a.at[rows].set(b) for a, b in zip(features, found, strict=True)]
        loss, metrics = loss_for(mesh, "ring")(params, *features)
        return loss, (metrics, {"running_mean": sum(means) / num_chunks})

    want = jax.jit(jax.value_and_grad(big, has_aux=True))(params)
    got = cached(mesh, "ring", num_chunks, group_size)(params, batch)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_devices_keep_their_rows() -> None:
    mesh = make_mesh(8)
    params, batch = setting(mesh)
    text = cached(mesh, "dense", 4, 2).lower(params, batch).compile().as_text()
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    gathered = set(re.findall(r"(\w+\[[\d,]*\])\S* all-gather(?:-start)?\(", text))
    assert gathered <= {f"f32[{BATCH},{EMBED}]", f"s32[{BATCH}]", f"f32[{BATCH}]"}, gathered


def test_uneven_chunks_are_refused() -> None:
    params, batch = {"logit_scale": 0.0}, {"image": jnp.zeros((12, 2))}
    with pytest.raises(ValueError, match="12 does not divide into 8 chunks"):
        cached_value_and_grad(encode, lambda p, *f: (0, {}), params, batch, 8)
