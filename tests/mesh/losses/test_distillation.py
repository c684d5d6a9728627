"""A training step with live and stored teachers equals NumPy's result, also on a mesh and with
gradient accumulation."""

import functools
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
import pytest

from clip_jax.losses import DistillationConfig, SoftmaxConfig
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program, Recipe
from tests.conftest import MESHES, OPTIM, assert_close, parameters
from tests.losses.conftest import BIG, SMALL, TERM, embeddings, inputs, unit


def step(term: DistillationConfig, mesh: str = "1", accumulation: int = 1) -> tuple[Any, Any]:
    """Return Adam's first moment, a multiple of the gradients, and the metrics."""
    recipe = Recipe(
        model=SMALL,
        objective=(SoftmaxConfig(captions="both"), term),
        optim=OPTIM,
        steps=10,
        batch_size=16,
        accumulation=accumulation,
    )
    devices = jax.devices()[: 1 if mesh == "1" else 8]
    program = Program(recipe, make_mesh(MESHES.get(mesh, MeshConfig()), devices))
    state = program.init(
        parameters(SMALL) | own_parameters(), {"distillation": {"teacher1": parameters(BIG)}}
    )
    state, metrics = program.step(state, program.put(inputs()))
    return jax.device_get((optax.tree.get(state.opt_state, "mu"), metrics))


def own_parameters() -> Any:
    draw = np.random.default_rng(5).normal
    shapes = {name: x.shape for name, x in TERM.parameters(SMALL).items()}
    return {"distillation": {x: draw(size=shape).astype(np.float32) for x, shape in shapes.items()}}


@functools.cache
def on_one_device() -> Any:
    return step(TERM)


def log_softmax(x: Any, axis: int) -> Any:
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def test_a_step_with_live_and_stored_teachers_equals_numpy() -> None:
    data = inputs()
    student = embeddings(SMALL, data["image"], data)
    stored = {x: data[f"stored_{x}"].astype(np.float64) for x in student}
    teachers = [
        {x: unit(y[:, :8]) for x, y in stored.items()},
        embeddings(BIG, data["teacher1_image"], data),
        {x: unit(y[:, 8:]) for x, y in stored.items()},
    ]
    scales = (60.0, 10.0, 100.0)  # the second is the live teacher's own
    maps = own_parameters()["distillation"]
    info_nce, similarity, distance = 0.0, 0.0, 0.0
    for kind in ("text", "synthetic"):
        for axis in (0, 1):
            logits = [s * x["image"] @ x[kind].T for s, x in zip(scales, teachers, strict=True)]
            p = sum(np.exp(log_softmax(x, axis)) for x in logits) / 3
            log_q = log_softmax(10.0 * student["image"] @ student[kind].T, axis)
            similarity -= (p * log_q).sum() / 16 / 2
            info_nce -= np.trace(log_q) / 16 / 2
    for kind, x in student.items():
        for i, teacher in enumerate(teachers):
            mapped = x @ maps[f"teacher{i}_{'image' if kind == 'image' else 'text'}"]
            distance += (1 - (unit(mapped) * teacher[kind]).sum(1)).mean() / 3
    _, metrics = on_one_device()
    assert metrics["contrastive_loss"] == pytest.approx(info_nce, rel=1e-5)
    assert metrics["distillation_loss"] == pytest.approx(
        0.5 * similarity + 0.25 * distance, rel=1e-5
    )
    cosines = student["image"] @ student["text"].T
    best = np.isclose(cosines, cosines.max(1, keepdims=True), rtol=0, atol=1e-9)
    credit = (np.diag(best) / best.sum(1)).mean()  # two captions are equal and share the credit
    for term in ("contrastive", "distillation"):
        assert metrics[f"{term}/image_to_text_accuracy"] == pytest.approx(credit)


def test_a_step_of_several_widths_is_the_same_on_a_mesh_and_accumulated() -> None:
    term = replace(TERM, widths=(4,))
    assert_close(step(term), step(replace(term, form="ring"), "2x2x2", accumulation=2))


def test_a_step_is_the_same_on_a_mesh_and_accumulated() -> None:
    expected, got = on_one_device(), step(replace(TERM, form="ring"), "2x2x2", accumulation=2)
    assert_close(expected, got)
    for a, b in zip(*map(jax.tree.leaves, (expected, got)), strict=True):
        assert np.abs(a - b).max() <= 1e-6 * max(np.abs(a).max(), 1)
