"""Losses of prototypes: values and gradients against float64 NumPy, centres, Sinkhorn, and what the
terms read, draw and average. `tests/mesh/losses/test_prototypes.py` trains with them."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import flops
from clip_jax.errors import InputError
from clip_jax.losses import (
    Axes,
    CaptionConfig,
    MaskedPredictionConfig,
    SelfDistillationConfig,
    SigmoidConfig,
    SoftmaxConfig,
    objective,
    prototypes,
)
from clip_jax.models.clip import CLIP
from clip_jax.models.images import NaFlex, Square
from clip_jax.models.inputs import MaskInput, ViewInput
from clip_jax.models.lora import LoRAConfig
from clip_jax.sharding import BATCH_AXES, MeshConfig, make_mesh
from clip_jax.step import Recipe, State, context
from tests.conftest import COCA, NAFLEX, OPTIM, RESNET, TINY

IMAGES, STATES, VIEWS, CHANNELS, COUNT = 3, 4, 2, 8, 24
SMALL: dict[str, Any] = {"hidden": 32, "bottleneck": 16, "prototypes": 64, "chunk_size": 8}
CROPS = SelfDistillationConfig(views=3, view_size=8, **SMALL)
MASKED = MaskedPredictionConfig(**SMALL)
STUDENT, TEACHER = 0.1, 0.05
LORA = LoRAConfig(rank=2, targets=("visual/proj",))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "student": unit(rng.normal(size=(IMAGES, STATES, VIEWS, CHANNELS))),
        "teacher": unit(rng.normal(size=(IMAGES, STATES, CHANNELS))),
        "kernel": rng.normal(size=(CHANNELS, COUNT)) / 3,
        "of_teacher": rng.normal(size=(CHANNELS, COUNT)) / 3,
        "potentials": rng.normal(size=COUNT),
        "weights": rng.random((IMAGES, STATES)),
    }


def options(chunk_size: int = 5) -> dict[str, Any]:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    axes = Axes(BATCH_AXES, "fsdp", "tensor")
    return {"mesh": mesh, "axes": axes, "dtype": "float32", "chunk_size": chunk_size}


@pytest.mark.parametrize("chunk_size", [1, 5, 1_000])
def test_cross_entropy_and_its_gradients_are_those_of_numpy(arrays, chunk_size) -> None:
    weights = arrays["weights"]

    def value(student: Any, kernel: Any) -> Any:
        rows, entropy = prototypes.cross_entropy(
            student,
            jnp.asarray(arrays["teacher"]),
            kernel,
            jnp.asarray(arrays["of_teacher"]),
            jnp.asarray(arrays["potentials"]),
            (STUDENT, jnp.float32(TEACHER)),
            **options(chunk_size),
        )
        return (weights * rows).sum(), (rows, entropy)

    student, kernel = arrays["student"], arrays["kernel"]
    differentiate = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))
    (_, (rows, entropy)), got = differentiate(*map(jnp.float32, (student, kernel)))

    p = softmax(arrays["teacher"] @ arrays["of_teacher"] / TEACHER + arrays["potentials"])
    q = softmax(student @ kernel / STUDENT)
    expected = -(p[:, :, None] * np.log(q)).sum((-1, -2))
    d_logits = (q - p[:, :, None]) * weights[:, :, None, None] / STUDENT
    gradients = d_logits @ kernel.T, np.einsum("btsc,btsk->ck", student, d_logits)
    values = expected, -(p * np.log(p)).sum(-1)
    for a, b in zip((*values, *gradients), (rows, entropy, *got), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


def test_sinkhorn_is_that_of_numpy_and_counts_only_what_it_should(arrays) -> None:
    teacher, kernel = arrays["teacher"], arrays["of_teacher"]
    counted = np.ones((IMAGES, STATES), bool)
    counted[1, 2:] = False
    potentials = prototypes.sinkhorn(
        jnp.float32(teacher),
        jnp.asarray(counted),
        jnp.float32(kernel),
        jnp.float32(TEACHER),
        **options(),
    )
    logits = teacher[counted] @ kernel / TEACHER
    q = np.exp(logits)
    for _ in range(3):
        q /= q.sum(0)
        q /= q.sum(1, keepdims=True)
    np.testing.assert_allclose(softmax(logits + np.asarray(potentials)), q, rtol=1e-4)
    assert q.sum(0).max() < 1.5 * len(q) / COUNT < softmax(logits).sum(0).max()


def test_the_teachers_temperature_changes_linearly_during_its_warmup() -> None:
    term = replace(CROPS, teacher_temperature=(0.04, 0.08), warmup=4)
    temperatures = [float(term.temperature(jnp.int32(steps))) for steps in (0, 1, 4, 9)]
    assert temperatures == pytest.approx([0.04, 0.05, 0.08, 0.08])
    assert float(replace(term, warmup=0).temperature(jnp.int32(0))) == pytest.approx(0.08)


def test_terms_read_views_of_the_towers_kind_and_share_the_teachers() -> None:
    both = objective.reads((CROPS, MASKED), TINY)
    colours = {"flip": 0.5, "color_jitter": 0.8, "grayscale": 0.2}
    assert both == {
        "teacher_view": ViewInput(Square(16), 1, (1.0, 1.0), **colours),
        "local_views": ViewInput(Square(8), 3, (0.05, 0.4), **colours),
        "masked_patches": MaskInput("teacher_view", 4, 0.5),
    }
    patches = objective.reads((CROPS, MASKED), NAFLEX)
    assert patches["local_views"] == replace(both["local_views"], spec=NaFlex(1, 8))
    assert patches["masked_patches"] == replace(both["masked_patches"], patches=12)


def test_a_step_counts_the_teachers_pass_once_and_the_crops_three_times() -> None:
    def of(*terms: Any) -> flops.Flops:
        recipe = Recipe(
            model=TINY, objective=(SoftmaxConfig(), *terms), optim=OPTIM, steps=9, batch_size=16
        )
        return flops.of_step(recipe)

    alone, crops, masked, both = of(), of(CROPS), of(MASKED), of(CROPS, MASKED)
    image = flops.forward(TINY).image
    small = flops.forward(replace(TINY, vision=TINY.vision.with_image_size(8))).image
    assert crops.image - alone.image == 16 * (image + 3 * 3 * small)
    assert masked.image - alone.image == 16 * (image + 3 * image)
    assert both.image == crops.image + masked.image - alone.image - 16 * image
    head = 16 * 32 + 32 * 32 + 32 * 16 + 16 * 64
    assert crops.loss - alone.loss == 2 * 16 * head * (3 * 3 + 1)
    student = replace(MASKED, teacher="student")
    assert of(CROPS, student).image == both.image + 16 * image


def test_weights_count_each_image_alike_whatever_its_patches() -> None:
    numbers = jnp.asarray([[0, 2, 3], [1, -1, -1]])
    state = State(jnp.zeros((), jnp.int32), {}, {})
    inputs = {"masked_patches": numbers, "teacher_view": jnp.zeros((2, 1, 16, 16, 3), jnp.uint8)}
    x = context(CLIP(TINY), options()["mesh"], state, {}, inputs, {})
    expected = [[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0]]
    np.testing.assert_allclose(MASKED.weights(x), expected, rtol=1e-6)


def test_what_a_term_cannot_do_is_refused() -> None:
    def recipe(*terms: Any, **settings: Any) -> Recipe:
        settings = {"model": TINY, "optim": OPTIM} | settings
        return Recipe(objective=(SoftmaxConfig(), *terms), steps=9, batch_size=16, **settings)

    locked = replace(OPTIM, locked=("image",))
    student = replace(MASKED, teacher="student")
    for terms, settings, message in (
        ((CROPS,), {"model": RESNET}, "SelfDistillationConfig needs a vision transformer"),
        ((replace(CROPS, view_size=12),), {}, r"view_size=12 must be a multiple of .*=8"),
        (
            (replace(CROPS, view_size=24),),
            {},
            r"view_size=24 must be at most .*=16",
        ),
        ((MASKED, CaptionConfig()), {"model": COCA}, "and without pool=queries"),
        ((MASKED,), {"lora": LORA}, r"need\w* 'masked_prediction', 'visual'"),
        ((CROPS,), {"optim": locked}, r"need\w* 'visual'"),
        ((student,), {"optim": locked}, r"need\w* 'visual'"),
        ((replace(CROPS, decay=0.9), MASKED), {}, "'visual' with decay 0.996, and an earlier one"),
        ((replace(CROPS, flip=0.0), MASKED), {}, "'masked_prediction' .* different inputs"),
    ):
        with pytest.raises(InputError, match=message):
            recipe(*terms, **settings)
    with pytest.raises(InputError, match=r"view_area=\(0\.4, 0\.1\) must be in ascending order"):
        replace(CROPS, view_area=(0.4, 0.1))
    with pytest.raises(InputError, match=r"SelfDistillationConfig\.prototypes=0"):
        replace(CROPS, prototypes=0)


def test_averages_begin_with_their_terms_and_those_in_use_go_on() -> None:
    """A term that began later set the tower's average of an earlier one back."""
    params = {name: {"x": jnp.ones(())} for name in ("visual", *(t.name for t in (CROPS, MASKED)))}
    terms = (SigmoidConfig(), CROPS, MASKED)
    before = (SigmoidConfig(), CROPS, replace(MASKED, weight=0.0))
    carried = objective.init(terms, params)
    moved = jax.tree.map(lambda x: 5 + jnp.zeros_like(x), carried)
    begun = objective.begin(terms, before, moved, params)
    averages = begun[objective.AVERAGE]
    assert {name: float(tree["x"]) for name, tree in averages.items()} == {
        "visual": 5,
        "self_distillation": 5,
        "masked_prediction": 1,
    }
    assert (begun["self_distillation"]["steps"], begun["masked_prediction"]["steps"]) == (5, 0)
