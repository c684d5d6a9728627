"""Accumulation, patch dropout, locked towers, remat and attention: what they change, and don't."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import sharding
from clip_jax.losses import SoftmaxConfig
from clip_jax.models import attention
from clip_jax.models.clip import CLIP, split_batch_stats
from clip_jax.optim import OptimConfig, make_optimizer
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import State, compute_loss, encode, jit_step, state_shardings
from tests.models.test_clip import TINY
from tests.test_step import RESNET, assert_close, batch, parameters

LOSS = SoftmaxConfig(mask_same_caption=True)


def changed(config, **vision):
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **vision))


FLIP = changed(TINY, patch_dropout=0.5)
GROUPS = changed(RESNET, batch_norm_group=4)


DESCENT = OptimConfig(learning_rate=1.0, warmup_steps=0, eps=1.0, weight_decay=0.0)


def one_step(config, optim=DESCENT, devices=8, params=None, **options):
    """State and metrics after one step, of plain descent by default, on the host."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    model, optimizer = CLIP(config), make_optimizer(optim, 10)
    shardings = state_shardings(model, optimizer, mesh)
    params = params or parameters(config)
    state = State(jnp.zeros((), jnp.int32), params, optimizer.init(split_batch_stats(params)[0]))
    step = jit_step(model, optim, 10, LOSS, mesh, shardings, **options)
    data = jax.device_put(batch(config), sharding.batch_sharding(mesh))
    return jax.device_get(step(jax.device_put(state, shardings), data))


@functools.cache
def plain(config):
    """One step of descent on one device: what the others are compared with."""
    return one_step(config, devices=1)


@pytest.mark.parametrize(
    ("config", "devices", "chunks"),
    [
        pytest.param(FLIP, 8, 2, id="vit on 8"),
        pytest.param(FLIP, 1, 4, id="vit", marks=pytest.mark.slow),
        pytest.param(GROUPS, 1, 4, id="resnet", marks=pytest.mark.slow),
        pytest.param(GROUPS, 2, 2, id="resnet on 2", marks=pytest.mark.slow),
    ],
)
def test_accumulation_is_the_one_big_batch(config, devices, chunks):
    """Also with patch dropout, and with BatchNorm in groups, whose statistics run on alike."""
    whole, expected = plain(config)
    parts, got = one_step(config, devices=devices, accumulation=chunks)
    assert_close(expected, got)
    moments = whole.opt_state[0].mu, parts.opt_state[0].mu  # a tenth of the gradients
    if config is FLIP:
        assert_close(*moments)
        return
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(moments[0]), jax.tree.leaves(moments[1]), strict=True
    ):  # BatchNorm's rounding, as between meshes
        name = sharding.path_name(path)
        if not name.endswith(("k_proj/bias", "attn/in_proj/bias")):  # their gradient is zero
            assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a), name
    assert_close(whole.params["batch_stats"], parts.params["batch_stats"])


def test_patch_dropout_drops_by_row_and_step_and_seed():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = changed(TINY, patch_dropout=0.75)
    data = {"image": batch(config)["image"][[0] * 4], "text": batch(config)["text"][:4]}

    def images(key, rows):
        find = functools.partial(encode, model=CLIP(config), mesh=mesh, key=key)
        (features, _), _ = jax.jit(find)(parameters(config), {}, data | {"row": rows})
        return np.asarray(features)

    key = jax.random.key(0, impl="threefry2x32")
    first = images(key, jnp.arange(4))
    assert np.abs(first[0] - first[1]).max() > 1e-3  # one image, other patches
    np.testing.assert_allclose(images(key, jnp.arange(4)[::-1]), first[::-1], atol=1e-6)
    assert np.abs(images(jax.random.fold_in(key, 1), jnp.arange(4)) - first).max() > 1e-3


@pytest.mark.slow
def test_the_runs_seed_decides_what_is_dropped():
    steps = plain(FLIP), one_step(FLIP, devices=1, seed=1), plain(TINY)
    assert len({float(metrics["loss"]) for _, metrics in steps}) == 3


def test_a_locked_tower_takes_no_gradient_and_the_other_its_own():
    free, _ = plain(TINY)
    locked, _ = one_step(TINY, dataclasses.replace(DESCENT, locked=("image",)), devices=1)
    before = parameters(TINY)
    jax.tree.map(np.testing.assert_array_equal, locked.params["visual"], before["visual"])
    assert_close(free.params["text"], locked.params["text"], key_bias=1e-5)


@pytest.mark.slow
def test_a_locked_resnet_keeps_its_running_statistics():
    locked, _ = one_step(RESNET, dataclasses.replace(DESCENT, locked=("image",)), devices=1)
    before = parameters(RESNET)
    for name in ("visual", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, locked.params[name], before[name])


@pytest.mark.parametrize(
    "config", [TINY, pytest.param(RESNET, marks=pytest.mark.slow)], ids=["vit", "resnet"]
)
def test_a_skipped_step_changes_nothing_but_the_step(config):
    optim = OptimConfig(warmup_steps=0, skip_norm_ratio=10.0, ema_decay=0.9)
    params = parameters(config)
    params["visual"]["conv1"]["kernel"] = np.full_like(params["visual"]["conv1"]["kernel"], np.nan)
    after, metrics = one_step(config, optim, params=params)
    jax.tree.map(np.testing.assert_array_equal, after.params, params)
    assert int(after.step) == 1
    assert (metrics["skipped_updates"], metrics["skipped_in_a_row"]) == (1, 1)
    assert np.isnan(metrics["grad_norm"])


REMAT = ("none", "dots", "attention", "full")  # cheapest first


@functools.cache
def gradient(remat):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = CLIP(dataclasses.replace(TINY, remat=remat))
    objective = functools.partial(compute_loss, model=model, loss=LOSS, mesh=mesh)
    return jax.jit(jax.grad(objective, has_aux=True)).lower(parameters(TINY), {}, batch(TINY))


def test_every_remat_computes_more_again():
    matmuls = [gradient(remat).as_text().count("stablehlo.dot_general") for remat in REMAT]
    assert matmuls == sorted(set(matmuls))


@pytest.mark.slow
def test_remat_changes_no_gradient():
    expected, *others = (
        gradient(remat).compile()(parameters(TINY), {}, batch(TINY)) for remat in REMAT
    )
    for got in others:
        assert_close(expected, got)


@pytest.mark.parametrize(("length", "dim", "causal"), [(17, 8, False), (130, 16, True)])
def test_splash_is_attention(length, dim, causal):
    """The TPU's kernel, interpreted: values and gradients, lengths and head dims off its grid."""
    rng = np.random.default_rng(0)
    q, k, v, weight = (rng.standard_normal((2, length, 2, dim)).astype(np.float32) for _ in "qkvw")
    mask = jnp.tril(jnp.ones((length, length), bool)) if causal else None

    def total(attend, *inputs):
        return (attend(*inputs, mask) * weight).sum()

    splash = functools.partial(attention.splash, interpret=True)
    expected = jax.jit(jax.value_and_grad(functools.partial(total, attention.xla), (0, 1, 2)))
    got = jax.jit(jax.value_and_grad(functools.partial(total, splash), (0, 1, 2)))
    for a, b in zip(jax.tree.leaves(expected(q, k, v)), jax.tree.leaves(got(q, k, v)), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * np.abs(a).max())


@pytest.mark.slow
def test_a_step_with_splash_on_a_mesh_is_the_same():
    config = dataclasses.replace(TINY, attention="splash")
    _, expected = plain(TINY)
    _, got = one_step(config, devices=2)
    assert_close(expected, got)


def test_cudnn_says_what_it_needs():
    q = jnp.zeros((1, 4, 2, 8), jnp.float32)
    with pytest.raises(ValueError, match=r"set --model\.dtype bfloat16"):
        attention.cudnn(q, q, q, None)


def test_patch_dropout_and_chunks_keep_rows_on_their_devices():
    """What is gathered are features and captions of the loss, never patches."""
    mesh = make_mesh(MeshConfig())
    optim = OptimConfig(warmup_steps=0)
    model, optimizer = CLIP(FLIP), make_optimizer(optim, 10)
    shardings = state_shardings(model, optimizer, mesh)
    params = parameters(FLIP)
    state = jax.eval_shape(lambda: State(jnp.int32(0), params, optimizer.init(params)))
    step = jit_step(model, optim, 10, LOSS, mesh, shardings, accumulation=2)
    text = step.lower(state, batch(FLIP)).compile().as_text()
    gathered = re.findall(r"\w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    dims = {tuple(sorted(int(n) for n in shape.split(",") if n != "1")) for shape in gathered}
    # Vectors, features (by chunks too: [8, 2, 16]), words, patches and projections.
    assert dims <= {(16,), (16, 16), (2, 8, 16), (32, 520), (3, 8, 8, 32), (16, 32)}
    assert {(16,), (32, 520)} < dims
    assert "all-to-all" not in text
    assert "collective-permute" not in text
