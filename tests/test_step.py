"""One step: the same on every mesh, the same as ever (golden), and learning something; what
accumulation, patch dropout, locked towers and attention change, and what they don't."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clip_jax import sharding
from clip_jax.errors import InputError
from clip_jax.losses import CaptionConfig, ClassifierConfig, SigmoidConfig, SoftmaxConfig
from clip_jax.models.clip import CLIP
from clip_jax.models.lora import LoRAConfig
from clip_jax.optim import Muon, OptimConfig
from clip_jax.optim.wrappers import averaged
from clip_jax.pods.collectives import collectives
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program, Recipe, State, context, encode
from tests.conftest import (
    COCA,
    FAMILIES,
    GOLDEN_LOSS,
    MESHES,
    NAFLEX_COCA,
    NAFLEX_SIGLIP,
    OPTIM,
    RESNET,
    TINY,
    assert_close,
    batch,
    by_path,
    parameters,
    sums_of_step,
)

CLASSIFIER = ClassifierConfig(classes=("ant", "bee", "cat"))
VISUAL = LoRAConfig(targets=("visual/*",))
# A locked text tower has less to compile.
GUARDED = dataclasses.replace(OPTIM, skip_norm_ratio=10.0, locked=("text",))


def changed(config, **vision):
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **vision))


FLIP_COCA = dataclasses.replace(changed(NAFLEX_COCA, patch_dropout=0.5), init_logit_bias=-10.0)
# The smallest whose norms see enough values that rounding does not matter.
GROUPS = changed(RESNET, batch_norm_group=8, image_size=32, width=4, num_heads=2)
# Beside those of eight devices, with their numbers of devices.
SMALLER_MESHES = {"1": (MeshConfig(), 1), "1x2x2": (MeshConfig(data=1, fsdp=2, tensor=2), 4)}


def recipe(config, **options):
    options = {"objective": (GOLDEN_LOSS,), "optim": OPTIM, "batch_size": 16} | options
    return Recipe(model=config, steps=10, **options)


class Step:
    """A recipe on a mesh, by default of one device, with its compiled step."""

    def __init__(self, config, mesh="1", **options):
        sizes, count = SMALLER_MESHES.get(mesh) or (MESHES[mesh], 8)
        self.config = config
        self.program = Program(recipe(config, **options), make_mesh(sizes, jax.devices()[:count]))
        self.compiled = self.program.step.lower(self.program.state, self.program.batch).compile()

    def start(self, params=None, step=0, frozen=None):
        """A state with all moments zero."""
        shapes = dataclasses.replace(self.program.state, frozen={})
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        state = State(np.int32(step), params or parameters(self.config), state.opt_state)
        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, shapes))
        return self.program.with_frozen(state, frozen)

    def adapted(self, scale=0.1):
        """A state whose arrays to train are random, and the others those of `parameters`."""
        rng, shapes = np.random.default_rng(3), self.program.state.params
        params = jax.tree.map(lambda x: rng.normal(0, scale, x.shape).astype(x.dtype), shapes)
        return self.start(params, frozen={"lora": {"base": parameters(self.config)}})

    def __call__(self, state=None):
        """State and metrics after one more step, on the host."""
        values = batch(self.config, self.program.recipe.batch_size)
        inputs = self.program.put(values | {"label": np.arange(len(values["text"])) % 3})
        return jax.device_get(self.compiled(state or self.start(), inputs))


@functools.cache
def plain():
    """The step of the golden file."""
    return Step(TINY)


def check_equal(expected, got, is_normalised=False):
    """Two steps' metrics, gradients (a tenth of which is the first moment), parameters."""
    (a, metrics), (b, got_metrics) = expected, got
    assert_close(metrics, got_metrics)
    moments = [optax.tree.get(x.opt_state, "mu") for x in (a, b)]
    if not is_normalised:
        assert_close(*moments)
        # Adam scales whatever is not zero, rounding too, up to at most one learning rate.
        assert_close(a.params, b.params, key_bias=OPTIM.learning_rate)
        return
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(moments[0]), jax.tree.leaves(moments[1]), strict=True
    ):  # BatchNorm's gradient is a difference of large sums: it costs one digit of float32
        name = sharding.path_name(path)
        if not name.endswith(("k_proj/bias", "attn/in_proj/bias")):  # their gradient is zero
            assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(x), name
    assert_close(a.params["batch_stats"], b.params["batch_stats"])


def test_the_golden_step():
    """The numbers of one step, held to what they were. Regenerate only with a reason."""
    expected = json.loads((Path(__file__).parent / "golden/step.json").read_text())
    state, metrics = plain()()
    got = sums_of_step(state.params, metrics)
    assert got["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    assert got["parameters"] == pytest.approx(expected["parameters"], rel=1e-5)


def test_a_batch_is_learned_by_heart_from_parameters_drawn():
    """Forty steps on one batch bring the loss from chance to nearly nothing."""
    step, losses = plain(), []
    state = step.program.init()
    for _ in range(40):
        state, metrics = step(state)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2
    assert losses[-1] < 0.2
    assert int(state.step) == 40


def test_the_logit_scale_is_capped():
    params = parameters(TINY) | {"logit_scale": np.float32(np.log(150))}
    _, metrics = plain()(plain().start(params))
    assert float(metrics["logit_scale"]) == pytest.approx(100, rel=1e-5)


def test_a_kernel_on_a_mesh_takes_the_same_step():
    short = dataclasses.replace(TINY, attention="short")
    check_equal(plain()(), Step(short, mesh="2x2x2")())


def test_sigmoids_in_a_ring_accumulated_on_a_mesh_are_those_of_the_one_big_batch():
    """Of a CoCa of mixed image shapes with averaged weights, also with patch dropout, of which step
    and row decide; devices keep their rows."""
    objective = (SigmoidConfig(form="ring"), CaptionConfig())
    optim = dataclasses.replace(OPTIM, ema_decay=0.9)
    step = functools.partial(Step, FLIP_COCA, objective=objective, optim=optim)
    whole, parts = step(), step(mesh="8", accumulation=2)
    _, metrics = expected = whole()
    check_equal(expected, parts())
    weighted = metrics["contrastive_loss"] + 2 * metrics["caption_loss"]
    assert metrics["loss"] == pytest.approx(weighted, rel=1e-6)
    _, later = whole(whole.start(step=1))
    assert abs(later["loss"] - metrics["loss"]) > 1e-3
    found = collectives(parts.compiled.as_text(), dict(parts.program.mesh.shape))
    assert {x.kind for x in found} == {"all-reduce", "collective-permute"}
    passed = [dims for x in found if x.kind != "all-reduce" for _, dims in x.arrays]
    assert max(map(math.prod, passed)) <= 2 * 32  # embeddings of a device's rows, never patches


@pytest.mark.parametrize(
    ("mesh", "form", "accumulation"), [("8", "ring", 4), ("2x2x2", "blocked", 1)]
)
def test_images_of_mixed_shapes_take_the_same_step(mesh, form, accumulation):
    objective = (SigmoidConfig(form=form, block_size=6),)
    step = functools.partial(Step, NAFLEX_SIGLIP, batch_size=32)
    expected = step(objective=(SigmoidConfig(form="dense"),))()
    check_equal(expected, step(mesh, objective=objective, accumulation=accumulation)())


@pytest.mark.parametrize(
    "name", ["mobileclip", "pe_core", "eva02", "tips", "xlm_roberta", "convnext"]
)
def test_every_family_takes_the_same_step_on_a_mesh(name):
    """PE core with patch dropout, whose rotations are those of the kept patches."""
    config, is_normalised = FAMILIES[name], name == "mobileclip"
    config = changed(config, patch_dropout=0.5) if name == "pe_core" else config
    # The collectives of a ConvNeXt have an order on eight simulated devices in later versions only.
    is_ordered = name != "convnext" or jax.__version_info__ >= (0, 11)
    expected = Step(config)()
    for mesh in ("4x2", "2x2x2") if is_ordered else ("1x2x2",):
        check_equal(expected, Step(config, mesh)(), is_normalised)


def test_a_resnet_in_groups_accumulated_and_on_a_mesh_and_a_skipped_step():
    parts = Step(GROUPS, optim=GUARDED, accumulation=2)
    check_equal(Step(GROUPS, "1x2x2", optim=GUARDED)(), parts(), is_normalised=True)

    params = parameters(GROUPS)
    params["visual"]["conv1"]["kernel"] = np.full_like(params["visual"]["conv1"]["kernel"], np.nan)
    after, metrics = parts(parts.start(params))
    jax.tree.map(np.testing.assert_array_equal, after.params, params)
    assert int(after.step) == 1
    assert (metrics["skipped_updates"], metrics["skipped_in_a_row"]) == (1, 1)
    assert np.isnan(metrics["grad_norm"])


def test_a_locked_resnet_keeps_weights_and_running_statistics_and_the_text_tower_learns():
    locked = Step(GROUPS, optim=dataclasses.replace(OPTIM, locked=("image",)))
    before, (after, metrics) = parameters(GROUPS), locked()
    for name in ("visual", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, after.params[name], before[name])
    assert metrics["grad_norm"] > 0
    moved = jax.tree.map(lambda a, b: np.any(a != b), after.params["text"], before["text"])
    assert all(jax.tree.leaves(moved))


def test_adapters_take_the_same_step_on_a_mesh_and_nothing_else_changes():
    """Of a CoCa with a classifier and averaged weights, in a ring and accumulated."""
    objective = (SoftmaxConfig(form="ring"), CaptionConfig(), CLASSIFIER)
    lora = LoRAConfig(rank=2, targets=("visual/*/q", "*/v", "*/mlp/*", "*proj"))
    optim = dataclasses.replace(OPTIM, ema_decay=0.9)
    step = functools.partial(Step, COCA, objective=objective, optim=optim, lora=lora)
    whole, parts = step(), step(mesh="2x2x2", accumulation=2)
    before = jax.device_get(whole.adapted())
    expected = whole(whole.adapted())
    check_equal(expected, parts(parts.adapted()))
    jax.tree.map(np.testing.assert_array_equal, expected[0].frozen, before.frozen)
    assert expected[0].params.keys() == {"visual", "text", "decoder", "classifier"}
    names = {path.rpartition("/")[2].rpartition("lora_")[2] for path in by_path(before.params)}
    assert names == {"a", "b", "kernel"}
    for tree in (expected[0].params, averaged(expected[0].opt_state, {})):
        moved = jax.tree.map(lambda a, b: np.any(a != b), tree, before.params)
        assert all(jax.tree.leaves(moved)), moved


def test_a_resnet_with_adapters_keeps_its_running_statistics():
    """It computes with them: adapters that add nothing leave the loss of a locked ResNet."""
    lora = LoRAConfig(targets=("*/attn/*", "visual/attnpool/*"))
    step = Step(GROUPS, lora=lora)
    after, metrics = step(step.adapted(0.0))
    _, locked = Step(GROUPS, optim=dataclasses.replace(OPTIM, locked=("image",)))()
    assert_close(metrics["loss"], locked["loss"])
    base = after.frozen["lora"]["base"]
    jax.tree.map(np.testing.assert_array_equal, base, parameters(GROUPS))
    assert "batch_stats" not in after.params


def test_with_both_towers_locked_a_classifier_learns_and_no_tower_has_a_backward_pass():
    optim = dataclasses.replace(OPTIM, locked=("image", "text"))
    step = Step(TINY, objective=(CLASSIFIER,), optim=optim)
    kernel = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    before = parameters(TINY) | {"classifier": {"kernel": kernel}}
    after, metrics = step(step.start(before))
    for name in ("visual", "text"):
        jax.tree.map(np.testing.assert_array_equal, after.params[name], before[name])
    assert np.all(np.any(after.params["classifier"]["kernel"] != kernel, axis=1))
    assert metrics["grad_norm"] > 0

    def products(program):
        return str(jax.make_jaxpr(program.step)(program.state, program.batch)).count("dot_general")

    free = Program(recipe(TINY, objective=(CLASSIFIER,)), step.program.mesh)
    assert products(step.program) < 0.6 * products(free)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optim": OptimConfig(locked=("image", "text"))}, r"locked=\('image', 'text'\) leaves"),
        ({"optim": OptimConfig(locked=("image",)), "lora": VISUAL}, "or choose other lora.targets"),
        ({"optim": OptimConfig(optimizer=Muon()), "lora": VISUAL}, "Muon does not train adapters"),
    ],
    ids=["both towers", "the tower with adapters", "Muon"],
)
def test_a_recipe_that_would_train_nothing_is_refused(options, says):
    with pytest.raises(InputError, match=says):
        recipe(TINY, **options)


def test_patch_dropout_drops_by_row_and_key_and_a_step_by_the_runs_seed():
    config, mesh = changed(TINY, patch_dropout=0.75), make_mesh(MeshConfig(), jax.devices()[:1])
    inputs = batch(config)
    data = {"image": jnp.asarray(inputs["image"][[0] * 4]), "text": jnp.asarray(inputs["text"][:4])}
    params = jax.tree.map(jnp.asarray, parameters(config))

    @jax.jit
    def images(key, rows):
        inputs = data | {"row": rows}
        x = context(CLIP(config), mesh, State(0, params, None), params, inputs, {})
        return encode(x, (), key=key)[0]["image"]

    key = jax.random.key(0, impl="threefry2x32")
    first = images(key, jnp.arange(4))
    assert np.abs(first[0] - first[1]).max() > 1e-3  # one image, other patches
    np.testing.assert_allclose(images(key, jnp.full(4, 2)), first[jnp.full(4, 2)], atol=1e-6)
    assert np.abs(images(jax.random.fold_in(key, 1), jnp.arange(4)) - first).max() > 1e-3

    def traced(seed):
        program = Program(recipe(config, seed=seed), mesh)
        return str(jax.make_jaxpr(program.step)(program.state, program.batch))

    assert traced(0) != traced(1)
