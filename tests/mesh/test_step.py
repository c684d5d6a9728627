"""A training step learns, and gives the same result on every mesh and with gradient accumulation;
adapters, locked towers and skipped updates change only what they should."""

import dataclasses
import functools
import math
import re
from collections import Counter

import jax
import numpy as np
import optax
import pytest

from clip_jax import sharding
from clip_jax.losses import CaptionConfig, ClassifierConfig, SigmoidConfig, SoftmaxConfig
from clip_jax.models.clip import CLIP, join_batch_stats, split_batch_stats
from clip_jax.models.lora import LoRAConfig
from clip_jax.optim.wrappers import averaged
from clip_jax.pods import hlo
from clip_jax.pods.collectives import collectives
from clip_jax.step import Program, State, context, encode, locked_of
from tests.conftest import (
    CAPPA,
    COCA,
    FAMILIES,
    MAMMUT,
    NAFLEX_COCA,
    NAFLEX_SIGLIP,
    OPTIM,
    RESNET,
    TINY,
    assert_close,
    batch,
    by_path,
    parameter_shapes,
    parameters,
)
from tests.mesh.conftest import compiled, mesh_of, recipe

EIGHT_OR_FOUR = "2x2x2" if jax.__version_info__ >= (0, 11) else "1x2x2"
CLASSIFIER = ClassifierConfig(classes=("ant", "bee", "cat"))
LOCKED = dataclasses.replace(OPTIM, locked=("image",))
# The locked text tower makes compilation faster.
GUARDED = dataclasses.replace(OPTIM, skip_norm_ratio=10.0, locked=("text",))


def changed(config, **vision):
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **vision))


FLIP_COCA = dataclasses.replace(changed(NAFLEX_COCA, patch_dropout=0.5), init_logit_bias=-10.0)
# The smallest ResNet whose batch norms average enough values to make rounding negligible.
GROUPS = changed(RESNET, batch_norm_group=8, image_size=32, width=4, num_heads=2)


def check_equal(expected, got, is_normalised=False):
    """Compare metrics, gradients and parameters of two steps. Gradients are read from Adam's first
    moment."""
    (a, metrics), (b, got_metrics) = expected, got
    assert_close(metrics, got_metrics)
    check_gradients(*(optax.tree.get(x.opt_state, "mu") for x in (a, b)), is_normalised)
    if is_normalised:
        assert_close(a.params["batch_stats"], b.params["batch_stats"])
    else:
        # Where a gradient is only rounding noise, Adam still moves by up to one learning rate.
        assert_close(a.params, b.params, key_bias=OPTIM.learning_rate)


def check_gradients(expected, got, is_normalised):
    """Compare gradients. With BatchNorm they are differences of large sums, so less precise."""
    if not is_normalised:
        assert_close(expected, got)
        return
    for (name, x), y in zip(by_path(expected).items(), jax.tree.leaves(got), strict=True):
        if not name.endswith(("k_proj/bias", "attn/in_proj/bias")):  # the exact gradient is zero
            assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(x), name


def test_a_batch_is_learned_by_heart_from_parameters_drawn():
    """Forty steps on one batch bring the loss from chance to nearly nothing."""
    step, losses = compiled(TINY), []
    state = step.program.init()
    for _ in range(40):
        state, metrics = step(state)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2
    assert losses[-1] < 0.2
    assert int(state.step) == 40


def test_a_kernel_on_a_mesh_takes_the_same_step():
    short = dataclasses.replace(TINY, attention="short")
    check_equal(compiled(TINY)(), compiled(short, mesh="2x2x2")())


def test_sigmoids_in_a_ring_accumulated_on_a_mesh_are_those_of_the_one_big_batch():
    """A CoCa with images of several shapes, averaged weights and patch dropout. Which patches are
    dropped depends on the step and the row. No image or patch moves to another device."""
    objective = (SigmoidConfig(form="ring"), CaptionConfig())
    optim = dataclasses.replace(OPTIM, ema_decay=0.9)
    step = functools.partial(compiled, FLIP_COCA, objective=objective, optim=optim)
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
    assert max(map(math.prod, passed)) <= 2 * 32  # embeddings of a device's two rows


def test_captions_predicted_in_parallel_on_a_mesh_are_those_of_the_one_big_batch():
    """SigLIP 2's two losses. Which captions are predicted in parallel depends on step and row."""
    config = dataclasses.replace(CAPPA, init_logit_bias=-10.0)
    objective = (SigmoidConfig(), CaptionConfig(weight=1.0))
    step = functools.partial(compiled, config, objective=objective)
    whole, layouts = step(accumulation=4), (("8", 1), ("4x2", 2), ("2x2x2", 4))
    expected = whole()
    for mesh, accumulation in layouts:
        check_equal(expected, step(mesh=mesh, accumulation=accumulation)())
    _, later = whole(whole.start(step=1))
    assert abs(later["caption_loss"] - expected[1]["caption_loss"]) > 1e-3


def test_captions_alone_train_mammuts_text_tower_and_not_the_one_beside_cappas_decoder():
    for config, is_trained in ((MAMMUT, True), (CAPPA, False)):
        step = compiled(config, objective=(CaptionConfig(),))
        of_text = re.findall(r'op_name="[^"]*/text\b', step.compiled.as_text())
        assert bool(of_text) == is_trained  # it is not computed, either
        after, _ = step()
        texts = (x["text"]["transformer"] for x in (after.params, parameters(config)))
        pairs = zip(*map(jax.tree.leaves, texts), strict=True)
        assert any(not np.array_equal(*pair) for pair in pairs) == is_trained


def test_several_texts_of_an_image_accumulated_on_a_mesh_are_those_of_the_one_big_batch():
    """A CoCa, whose decoder writes the first text of an image alone; images have one to three."""
    several = SoftmaxConfig(captions="all", texts_per_image=3, form="ring")
    step = functools.partial(compiled, COCA, objective=(several, CaptionConfig()))
    check_equal(step()(), step(mesh="8", accumulation=2)())


def gradients(config, mesh, objective=()):
    """Return the outputs of `encode`, BatchNorm statistics, and gradients of a weighted sum of the
    outputs."""
    mesh, draw = mesh_of(mesh), np.random.default_rng(0).standard_normal
    params = jax.device_put(
        parameters(config), sharding.param_shardings(config, parameter_shapes(config), mesh)
    )
    inputs = batch(config) | {"row": np.arange(16)}
    trainable, statistics = split_batch_stats(params)
    key = None
    if config.vision.patch_dropout:
        key = jax.random.key(0, impl="threefry2x32")

    def total(trainable, statistics, inputs):
        params = join_batch_stats(trainable, statistics)
        x = context(CLIP(config), mesh, State(0, params, None), params, inputs, {})
        outputs, after = encode(x, objective, key=key)
        weighted = [0.01 * draw(y.shape) * y for y in outputs.values()]
        return sum(y.sum() for y in weighted), (outputs, after)

    inputs = jax.device_put(inputs, sharding.batch_sharding(mesh))
    slopes, results = jax.jit(jax.grad(total, has_aux=True))(trainable, statistics, inputs)
    return jax.device_get((*results, slopes))


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        (dataclasses.replace(FAMILIES["eva02"], text=FAMILIES["xlm_roberta"].text), "2x2x2"),
        (FAMILIES["mobileclip"], "2x2x2"),
        (FAMILIES["tips"], "2x2x2"),
        (changed(FAMILIES["dinov3"], patch_dropout=0.5), "2x2x2"),
        (FAMILIES["dinotxt"], "2x2x2"),
        (changed(FAMILIES["pe_core"], patch_dropout=0.5), "4x2"),  # rotates kept patches
        (NAFLEX_SIGLIP, "2x2x2"),
        # Earlier versions do not order their collectives, which may deadlock on eight devices.
        (FAMILIES["convnext"], EIGHT_OR_FOUR),
        (COCA, EIGHT_OR_FOUR),
    ],
    ids=[
        *("EVA-02, XLM-R", "MobileCLIP", "TIPS", "DINOv3", "dino.txt", "PE core", "NaFlex"),
        *("ConvNeXt", "CoCa"),
    ],
)
def test_every_family_has_the_same_gradients_on_a_mesh(config, mesh):
    objective = (CaptionConfig(),) if config.decoder else ()
    outputs, after, slopes = gradients(config, "1", objective)
    got_outputs, got_after, got_slopes = gradients(config, mesh, objective)
    assert_close(outputs, got_outputs)
    check_gradients(slopes, got_slopes, is_normalised=bool(after))
    assert_close(after, got_after)


def test_a_resnet_in_groups_accumulated_and_on_a_mesh_and_a_skipped_step():
    parts = compiled(GROUPS, optim=GUARDED, accumulation=2)
    check_equal(compiled(GROUPS, "1x2x2", optim=GUARDED)(), parts(), is_normalised=True)

    params = parameters(GROUPS)
    params["visual"]["conv1"]["kernel"] = np.full_like(params["visual"]["conv1"]["kernel"], np.nan)
    after, metrics = parts(parts.start(params))
    jax.tree.map(np.testing.assert_array_equal, parts.completed(after), params)
    assert int(after.step) == 1
    assert (metrics["skipped_updates"], metrics["skipped_in_a_row"]) == (1, 1)
    assert np.isnan(metrics["grad_norm"])


def test_a_locked_resnet_keeps_weights_and_running_statistics_and_the_text_tower_learns():
    before, (after, metrics) = parameters(GROUPS), compiled(GROUPS, optim=LOCKED)()
    assert after.params.keys() == {"text", "logit_scale"}
    for name, tree in locked_of(after).items():
        jax.tree.map(np.testing.assert_array_equal, tree, before[name])
    assert locked_of(after).keys() == {"visual", "batch_stats"}
    assert metrics["grad_norm"] > 0
    moved = jax.tree.map(lambda a, b: np.any(a != b), after.params["text"], before["text"])
    assert all(jax.tree.leaves(moved))


def test_the_head_on_a_locked_tower_learns():
    before = parameters(FAMILIES["dinotxt"])
    step = compiled(FAMILIES["dinotxt"], optim=LOCKED)
    state, _ = step()
    after = step.program.recipe.complete(state, state.params)
    jax.tree.map(np.testing.assert_array_equal, after["visual"], before["visual"])
    for name in ("image_head", "text"):
        moved = jax.tree.map(lambda a, b: np.any(a != b), after[name], before[name])
        assert all(jax.tree.leaves(moved)), moved


def test_adapters_take_the_same_step_on_a_mesh_and_nothing_else_changes():
    """With a classifier, averaged weights, the ring form and gradient accumulation."""
    objective = (SoftmaxConfig(form="ring"), CLASSIFIER)
    lora = LoRAConfig(rank=2, targets=("visual/*/q", "*/v", "*/mlp/*", "*proj"))
    optim = dataclasses.replace(OPTIM, ema_decay=0.9)
    step = functools.partial(compiled, TINY, objective=objective, optim=optim, lora=lora)
    whole, parts = step(), step(mesh="2x2x2", accumulation=2)
    before = jax.device_get(whole.adapted())
    expected = whole(whole.adapted())
    check_equal(expected, parts(parts.adapted()))
    jax.tree.map(np.testing.assert_array_equal, expected[0].frozen, before.frozen)
    assert expected[0].params.keys() == {"visual", "text", "classifier"}
    names = {path.rpartition("/")[2].rpartition("lora_")[2] for path in by_path(before.params)}
    assert names == {"a", "b", "kernel"}
    for tree in (expected[0].params, averaged(expected[0].opt_state, {})):
        moved = jax.tree.map(lambda a, b: np.any(a != b), tree, before.params)
        assert all(jax.tree.leaves(moved)), moved


def test_a_resnet_with_adapters_keeps_its_running_statistics():
    """With adapters that add nothing, the loss is that of the ResNet with a locked image tower."""
    lora = LoRAConfig(targets=("*/attn/*", "visual/attnpool/*"))
    step = compiled(GROUPS, lora=lora)
    after, metrics = step(step.adapted(0.0))
    _, locked = compiled(GROUPS, optim=LOCKED)()
    assert_close(metrics["loss"], locked["loss"])
    base = after.frozen["lora"]["base"]
    jax.tree.map(np.testing.assert_array_equal, base, parameters(GROUPS))
    assert "batch_stats" not in after.params


def test_with_both_towers_locked_a_classifier_learns_and_no_tower_has_a_backward_pass():
    optim = dataclasses.replace(OPTIM, locked=("image", "text"))
    step = compiled(TINY, objective=(CLASSIFIER,), optim=optim)
    kernel = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    before = parameters(TINY) | {"classifier": {"kernel": kernel}}
    after, metrics = step(step.start(before))
    for name in ("visual", "text"):
        jax.tree.map(np.testing.assert_array_equal, locked_of(after)[name], before[name])
    assert np.all(np.any(after.params["classifier"]["kernel"] != kernel, axis=1))
    assert metrics["grad_norm"] > 0

    def products(program):
        return str(jax.make_jaxpr(program.step)(program.state, program.batch)).count("dot_general")

    free = Program(recipe(TINY, objective=(CLASSIFIER,)), step.program.mesh)
    assert products(step.program) < 0.6 * products(free)


def matmuls(step, pattern):
    """Count the executions of matmuls, and those whose origin in the program has a pattern."""
    computations, entry = hlo.parse(step.compiled.as_text())
    counts = Counter()
    for visit in hlo.walk(computations, entry):
        for x in visit.computation.values():
            if x.opcode in ("dot", "convolution"):
                counts["/visual" in x.source, pattern in x.source] += visit.times
    return counts


def test_a_locked_tower_is_in_bfloat16_and_the_compiled_step_has_no_backward_pass_of_it():
    """Nor are there moments, an average, sums of its gradients over devices, or recomputation, also
    with gradient accumulation."""
    config = dataclasses.replace(TINY, dtype="bfloat16", remat="full")
    optim = dataclasses.replace(OPTIM, ema_decay=0.9)
    trained = compiled(config, "2x2x2", optim=optim, accumulation=2)
    locked = compiled(
        config, "2x2x2", optim=dataclasses.replace(optim, locked=("image",)), accumulation=2
    )
    before, after = (matmuls(x, "transpose(") for x in (trained, locked))
    forward, backward = (True, False), (True, True)
    assert (before[backward] > 0, after[backward]) == (True, 0)
    assert 0 < after[forward] == before[forward] / 2  # GradCache encodes a trained chunk twice
    mesh = dict(locked.program.mesh.shape)
    summed = [
        {x.part for x in collectives(step.compiled.as_text(), mesh)} for step in (trained, locked)
    ]
    assert ["image tower, backward" in parts for parts in summed] == [True, False]
    state = locked.program.state
    assert state.params.keys() == {"text", "logit_scale"}
    assert not [name for name in by_path(state.opt_state) if "visual" in name]
    for name, x in by_path(locked_of(state)).items():
        assert x.dtype == ("bfloat16" if name.endswith("kernel") else "float32")
        assert x.sharding == by_path(trained.program.state.params)[name].sharding
    losses = [step()[1]["loss"] for step in (trained, locked)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
