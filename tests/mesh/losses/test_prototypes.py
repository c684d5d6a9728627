"""Self-distillation and masked prediction in steps on meshes, accumulated, and without a weight."""

import functools
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
import pytest

from clip_jax.losses import (
    MaskedPredictionConfig,
    SelfDistillationConfig,
    SigmoidConfig,
    SoftmaxConfig,
    objective,
)
from clip_jax.models.images import stack
from clip_jax.models.inputs import MaskInput
from clip_jax.step import Program
from tests.conftest import NAFLEX_SIGLIP, TINY, assert_close, batch, parameters
from tests.mesh.conftest import mesh_of, recipe

SMALL: dict[str, Any] = {"hidden": 32, "bottleneck": 16, "prototypes": 64, "chunk_size": 8}
CROPS = SelfDistillationConfig(views=3, view_size=8, **SMALL)
MASKED = MaskedPredictionConfig(**SMALL)
BALANCED = tuple(replace(term, balance="sinkhorn") for term in (CROPS, MASKED))
WARM = {"teacher_temperature": (0.04, 0.07), "warmup": 3}
OF_HEADS = replace(MASKED, compared="all", teacher="student", **WARM)


def inputs(program: Program) -> dict[str, Any]:
    """Return images, texts, views that are other images, and masked patches."""
    rng, model = np.random.default_rng(0), program.recipe.model
    data = batch(model)
    for name, x in program.recipe.reads().items():
        if isinstance(x, MaskInput):
            count = x.count(x.patches)
            data[name] = np.stack([rng.permutation(x.patches)[:count] for _ in range(16)])
            data[name] = np.sort(data[name]).astype(np.int32)
            if model.vision.max_patches:  # of images with fewer patches
                length = np.maximum(data["teacher_view"].length // 2, 1)
                data[name] = np.where(np.arange(count) < length, data[name], -1)
        elif name == "teacher_view":
            data[name] = stack([jax.tree.map(lambda y: np.roll(y, 1, 0), data["image"])])
        else:
            of = jax.tree.leaves(x.shapes(16))[0]
            data[name] = rng.integers(0, 256, of.shape, np.uint8)
    return data


SEED = 2  # of heads whose gradients are large beside rounding; those of a few seeds are not


@functools.cache
def trained(terms: Any, model: Any = TINY, mesh: str = "1", accumulation: int = 1) -> Any:
    """Return state and metrics after two steps, on the host."""
    loss = SoftmaxConfig() if model.init_logit_bias is None else SigmoidConfig()
    made = recipe(model, objective=(loss, *terms), accumulation=accumulation, seed=SEED)
    program = Program(made, mesh_of(mesh))
    state = program.init(parameters(model))
    for _ in range(2):
        state, metrics = program.step(state, program.put(inputs(program)))
    return jax.device_get((state, metrics))


@pytest.mark.parametrize(
    ("terms", "mesh", "accumulation"),
    [
        ((CROPS, MASKED), "8", 1),
        ((CROPS, MASKED), "2x2x2", 4),
        (BALANCED, "4x2", 2),
        ((OF_HEADS,), "2x2x2", 1),
    ],
)
def test_a_step_is_the_same_on_every_mesh_and_accumulated(terms, mesh, accumulation) -> None:
    (expected, metrics), (state, got) = trained(terms), trained(terms, TINY, mesh, accumulation)
    assert_close(metrics, got)
    assert_close(*(optax.tree.get(x.opt_state, "mu") for x in (expected, state)))
    (averages, own), (got_averages, got_own) = (
        (x.carried[objective.AVERAGE], {term.name: x.carried[term.name] for term in terms})
        for x in (expected, state)
    )
    assert_close(own, got_own)
    # They move by up to 4e-6: 0.004 of a step of Adam, which may be one along rounding noise.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), got_averages, averages
    )
    total = got["contrastive_loss"] + sum(x.weight * got[f"{x.name}_loss"] for x in terms)
    assert got["loss"] == pytest.approx(total, rel=1e-6)


def test_images_of_any_shape_accumulated_on_a_mesh_are_those_of_the_one_big_batch() -> None:
    terms = (replace(MASKED, compared="all"),)
    (expected, metrics), (state, got) = (
        trained(terms, NAFLEX_SIGLIP, mesh, count) for mesh, count in (("1", 1), ("8", 2))
    )
    assert_close(metrics, got)
    assert_close(*(optax.tree.get(x.opt_state, "mu") for x in (expected, state)))


def test_the_teacher_follows_the_student_and_the_centre_its_logits() -> None:
    state, metrics = trained((CROPS, MASKED))
    averages = state.carried[objective.AVERAGE]
    assert averages.keys() == {"visual", "self_distillation", "masked_prediction"}
    begun = parameters(TINY)["visual"]["proj"]
    average, now = averages["visual"]["proj"], state.params["visual"]["proj"]
    moved = np.abs(average - begun).max() / np.abs(now - begun).max()
    assert 0.002 < moved < 0.01  # two steps of 0.004
    for name in ("self_distillation", "masked_prediction"):
        assert state.carried[name]["steps"] == 2
        assert np.abs(state.carried[name]["center"]).max() > 0
        entropy, loss = metrics[f"{name}/teacher_entropy"], metrics[f"{name}_loss"]
        assert 0 < entropy < loss
        assert entropy < np.log(64)


def test_terms_without_weight_are_not_traced_and_keep_their_state() -> None:
    idle = tuple(replace(term, weight=0.0) for term in (CROPS, MASKED))
    (alone, _), (state, metrics) = trained(()), trained(idle)
    for name in ("visual", "text", "logit_scale"):
        jax.tree.map(np.testing.assert_array_equal, alone.params[name], state.params[name])
    assert state.carried["self_distillation"]["steps"] == 0
    program = Program(recipe(TINY, objective=(SoftmaxConfig(), *idle), seed=SEED), mesh_of("1"))
    first = jax.device_get(program.init(parameters(TINY)))
    jax.tree.map(np.testing.assert_array_equal, first.carried, state.carried)
    for term in idle:
        of_term = (x.params[term.name] for x in (first, state))
        jax.tree.map(np.testing.assert_array_equal, *of_term)
    assert {*metrics} & {"self_distillation_loss", "masked_prediction_loss"} == set()
