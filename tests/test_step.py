"""One step: the same on every mesh, the same as ever (golden), and learning something; what
accumulation, patch dropout, locked towers, remat and attention change, and don't."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import sharding
from clip_jax.losses import SigmoidConfig, SoftmaxConfig
from clip_jax.models.clip import CLIP, split_batch_stats
from clip_jax.optim import OptimConfig
from clip_jax.pods.exchanges import collectives
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program, Recipe, compute_loss, encode
from tests.conftest import (
    COCA,
    GOLDEN_LOSS,
    MAMMUT,
    MESHES,
    OPTIM,
    RESNET,
    TINY,
    assert_close,
    batch,
    parameters,
    step_on,
    sums_of_step,
)

GOLDEN = Path(__file__).parent / "golden/step.json"
LONG, SLOW = [pytest.mark.long], [pytest.mark.slow]
SIGLIP = dataclasses.replace(TINY, init_logit_bias=-10.0)
MAMMUT = dataclasses.replace(MAMMUT, init_logit_bias=-10.0)


def gradients_on(config, loss, mesh):
    """Loss and gradients, on the host."""
    model = CLIP(config)
    params = parameters(config)
    params = jax.device_put(params, sharding.param_shardings(config, params, mesh))
    data = jax.device_put(batch(config), sharding.batch_sharding(mesh))
    objective = functools.partial(compute_loss, model=model, loss=loss, mesh=mesh)
    objective = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (value, _), grads = objective(*split_batch_stats(params), data)
    return jax.device_get((value, grads))


@functools.cache
def reference(function, config, loss):
    return function(config, loss, make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize(
    ("config", "loss", "mesh"),
    [
        pytest.param(
            config, loss, mesh, id=f"{name}-{mesh}",
            marks=(LONG if mesh == "2x2x2" else SLOW) if config.decoder else [],
        )
        for name, config, loss in [
            ("vit", TINY, SoftmaxConfig(mask_same_caption=True)),
            ("siglip", SIGLIP, SigmoidConfig()),
            ("coca", COCA, SoftmaxConfig(mask_same_caption=True)),
            ("mammut", MAMMUT, SigmoidConfig(form="ring")),
        ]
        for mesh in MESHES
    ],
)  # fmt: skip
def test_every_mesh_gives_the_same_loss_and_gradients(config, loss, mesh):
    value, grads = reference(gradients_on, config, loss)
    got_value, got_grads = gradients_on(config, loss, make_mesh(MESHES[mesh]))
    np.testing.assert_allclose(got_value, value, rtol=1e-5)
    assert_close(grads, got_grads)


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["2x2x2"])
def test_a_resnet_is_the_same_on_a_mesh_up_to_batch_norms_rounding(mesh):
    """BatchNorm's gradient is a difference of large sums: it costs one digit of float32."""
    value, grads = reference(gradients_on, RESNET, SoftmaxConfig())
    got_value, got_grads = gradients_on(RESNET, SoftmaxConfig(), make_mesh(MESHES[mesh]))
    np.testing.assert_allclose(got_value, value, rtol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(got_grads), strict=True
    ):
        name = sharding.path_name(path)
        if not name.endswith(("k_proj/bias", "attn/in_proj/bias")):  # their gradient is zero
            assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a), name


@pytest.mark.long
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_takes_the_same_step(mesh):
    loss = SoftmaxConfig(mask_same_caption=True)
    params, metrics = reference(step_on, TINY, loss)
    got_params, got_metrics = step_on(TINY, loss, make_mesh(MESHES[mesh]))
    # Adam scales whatever is not zero, rounding too, up to at most one learning rate.
    assert_close(params, got_params, key_bias=OPTIM.learning_rate)
    assert_close(metrics, got_metrics)


def test_the_golden_step():
    """The numbers of one step, held to what they were. Regenerate only with a reason."""
    expected = json.loads(GOLDEN.read_text())
    got = sums_of_step(*reference(step_on, TINY, GOLDEN_LOSS))
    assert got["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    assert got["parameters"] == pytest.approx(expected["parameters"], rel=1e-5)


def test_a_batch_is_learned_by_heart():
    """Sixty steps on one batch bring the loss from chance to nearly nothing."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optim = OptimConfig(learning_rate=3e-3, warmup_steps=5, clip_norm=1.0)
    loss = SoftmaxConfig(mask_same_caption=True)
    recipe = Recipe(model=TINY, loss=loss, optim=optim, steps=60, batch_size=16)
    program = Program(recipe, mesh)
    state = program.init()
    losses = []
    for step in range(60):
        state, metrics = program.step(state, program.place(batch(TINY), step))
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2
    assert losses[-1] < 0.2
    assert int(state.step) == 60


@pytest.mark.long
def test_the_logit_scale_is_capped():
    config = dataclasses.replace(TINY, init_logit_scale=99.99)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optim = OptimConfig(learning_rate=1.0, warmup_steps=0, max_logit_scale=100.0)
    recipe = Recipe(model=config, loss=SoftmaxConfig(), optim=optim, steps=10, batch_size=16)
    program = Program(recipe, mesh)
    _, metrics = program.step(program.init(), program.place(batch(config)))
    assert float(metrics["logit_scale"]) <= 100.001


# ------------------------------------------------------------------ options

LOSS = SoftmaxConfig(mask_same_caption=True)


def changed(config, **vision):
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **vision))


FLIP = changed(TINY, patch_dropout=0.5)
FLIP_COCA = changed(COCA, patch_dropout=0.5)
GROUPS = changed(RESNET, batch_norm_group=4)


DESCENT = OptimConfig(learning_rate=1.0, warmup_steps=0, eps=1.0, weight_decay=0.0)


def one_step(config, optim=DESCENT, devices=8, params=None, **options):
    """State and metrics after one step, of plain descent by default, on the host."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    recipe = Recipe(model=config, loss=LOSS, optim=optim, steps=10, batch_size=16, **options)
    program = Program(recipe, mesh)
    state = program.init(params or parameters(config))
    return jax.device_get(program.step(state, program.place(batch(config))))


@functools.cache
def plain(config):
    """One step of descent on one device: what the others are compared with."""
    return one_step(config, devices=1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "devices", "chunks"),
    [
        pytest.param(FLIP, 8, 2, id="vit on 8"),
        pytest.param(FLIP, 1, 4, id="vit", marks=pytest.mark.slow),
        pytest.param(FLIP_COCA, 8, 2, id="coca on 8", marks=pytest.mark.slow),
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
    if config is not GROUPS:
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


@pytest.mark.long
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


@pytest.mark.long
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


DEEP = dataclasses.replace(
    TINY, vision=dataclasses.replace(TINY.vision, depth=3),
    text=dataclasses.replace(TINY.text, depth=2),
)  # fmt: skip


@functools.cache
def unrolled(unroll, remat):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = CLIP(dataclasses.replace(DEEP, unroll=unroll, remat=remat))
    objective = functools.partial(compute_loss, model=model, loss=LOSS, mesh=mesh)
    objective = jax.value_and_grad(objective, has_aux=True)
    return jax.jit(objective).lower(parameters(DEEP), {}, batch(DEEP))


REMAT = ("none", "hidden", "residual", "attention", "full")  # cheapest first


@functools.cache
def gradient(remat):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = CLIP(dataclasses.replace(TINY, remat=remat))
    objective = functools.partial(compute_loss, model=model, loss=LOSS, mesh=mesh)
    return jax.jit(jax.grad(objective, has_aux=True)).lower(parameters(TINY), {}, batch(TINY))


def test_every_remat_computes_more_again():
    matmuls = [gradient(remat).as_text().count("stablehlo.dot_general") for remat in REMAT]
    assert matmuls == sorted(set(matmuls))


@pytest.mark.long
def test_unrolled_layers_are_no_loop_and_change_nothing():
    """Nor does recomputation go away, which nothing but the loop kept apart."""
    (value, *_), grads = unrolled(1, "full").compile()(parameters(DEEP), {}, batch(DEEP))
    (got, *_), others = unrolled(3, "full").compile()(parameters(DEEP), {}, batch(DEEP))
    np.testing.assert_allclose(got, value, rtol=1e-5)
    assert_close(grads, others)
    assert "stablehlo.while" in unrolled(1, "full").as_text()
    assert "stablehlo.while" not in unrolled(3, "full").as_text()
    again = [unrolled(3, x).compile().as_text().count(" dot(") for x in ("none", "full")]
    assert again[0] < again[1]


@pytest.mark.slow
def test_remat_changes_no_gradient():
    expected, *others = (
        gradient(remat).compile()(parameters(TINY), {}, batch(TINY)) for remat in REMAT
    )
    for got in others:
        assert_close(expected, got)


@pytest.mark.long
@pytest.mark.parametrize(
    ("backend", "devices"), [("short", 8), pytest.param("splash", 2, marks=pytest.mark.slow)]
)
def test_a_step_with_a_kernel_on_a_mesh_is_the_same(backend, devices):
    config = dataclasses.replace(TINY, attention=backend)
    before, expected = plain(TINY)
    after, got = one_step(config, devices=devices)
    assert_close(expected, got)
    assert_close(before.params, after.params)


@pytest.mark.long
def test_patch_dropout_and_chunks_keep_rows_on_their_devices():
    """What is gathered are features and captions of the loss, never patches."""
    mesh = make_mesh(MeshConfig())
    optim = OptimConfig(warmup_steps=0)
    recipe = Recipe(
        model=FLIP, loss=LOSS, optim=optim, steps=10, batch_size=16, accumulation=2
    )  # fmt: skip
    program = Program(recipe, mesh)
    text = program.step.lower(program.state, program.batch).compile().as_text()
    found = collectives(text, dict(mesh.shape))  # between several devices
    assert {x.kind for x in found} == {"all-gather", "all-reduce"}
    gathered = [shape.dims for x in found if x.kind == "all-gather" for shape in x.shapes]
    dims = {tuple(sorted(n for n in shape if n != 1)) for shape in gathered}
    assert dims == {(16,), (2, 8, 16)}  # numbers of rows and captions; features by chunks
