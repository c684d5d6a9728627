"""Self-distillation, masked prediction and KoLeo against lightly's losses, which centre by the
mean."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, IBOTPlusPlusPatchLoss, KoLeoLoss

from clip_jax.losses import (
    Context,
    KoLeoConfig,
    MaskedPredictionConfig,
    SelfDistillationConfig,
    objective,
)
from clip_jax.models.clip import CLIP
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import State, context
from tests.conftest import TINY

IMAGES, PATCHES, CHANNELS, COUNT = 6, 9, 8, 24
SMALL: dict[str, Any] = {"bottleneck": CHANNELS, "prototypes": COUNT, "chunk_size": 4}
STUDENT, TEACHER = 0.1, 0.07


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


KERNEL, OF_TEACHER = draw(0, CHANNELS, COUNT), draw(1, CHANNELS, COUNT)


def step(term: Any, carried: Any, outputs: Any, inputs: Any) -> Any:
    """Return the loss of a batch, its gradient with respect to the student's features, and what
    the term carries to the next step."""
    params = {term.name: {"prototypes": jnp.asarray(KERNEL)}}
    averages = {term.name: {"prototypes": jnp.asarray(OF_TEACHER)}}
    state = State(
        jnp.zeros((), jnp.int32), {}, {}, {term.name: carried, objective.AVERAGE: averages}
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def context_of(student: Any) -> Context:
        x = context(CLIP(TINY), mesh, state, params, inputs, {**outputs, "student": student})
        return objective._seen_by(term, x)

    def value(student: Any) -> Any:
        return term.loss(context_of(student))[0]

    student = jnp.asarray(outputs["student"])
    loss, gradient = jax.jit(jax.value_and_grad(value))(student)
    return loss, gradient, term.update(context_of(student))


def torch_logits(x: np.ndarray, kernel: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.tensor(x, requires_grad=True)
    return features, features @ torch.tensor(kernel)


def assert_near(got: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_self_distillation_is_dinos_loss_with_one_view_of_the_teacher_and_its_centre() -> None:
    """Their first view of the student is compared with no teacher: a placeholder."""
    term, views = SelfDistillationConfig(views=3, **SMALL), 3
    carried = term.init({})
    theirs = DINOLoss(COUNT, teacher_temp=TEACHER, student_temp=STUDENT)
    for seed in (2, 4):  # of which the second has a centre
        student, teacher = (
            draw(seed, IMAGES, 1, views, CHANNELS),
            draw(seed + 1, IMAGES, 1, CHANNELS),
        )
        loss, gradient, carried = step(
            term, carried, {"student": student, "teacher": jnp.asarray(teacher)}, {}
        )
        features, logits = torch_logits(student[:, 0], KERNEL)
        of_views = [torch.zeros(IMAGES, COUNT), *logits.unbind(1)]
        _, of_teacher = torch_logits(teacher[:, 0], OF_TEACHER)
        expected = theirs([of_teacher.detach()], of_views)
        expected.backward()
        assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
        assert_near(gradient[:, 0], features.grad)
        assert_near(carried["center"], theirs.center.ravel())


@pytest.mark.parametrize("compared", ["masked", "all"])
def test_masked_prediction_is_ibots_loss_of_masked_patches_and_ibot_plus_plus_of_all(compared):
    term = MaskedPredictionConfig(compared=compared, **SMALL)
    carried = term.init({})
    kind = IBOTPatchLoss if compared == "masked" else IBOTPlusPlusPatchLoss
    theirs = kind(COUNT, teacher_temp=TEACHER, student_temp=STUDENT)
    for seed in (2, 4):
        rng = np.random.default_rng(seed)
        numbers = [np.sort(rng.permutation(PATCHES)[: 2 + i % 3]) for i in range(IMAGES)]
        masked = np.zeros((IMAGES, 3, 3), bool)
        for row, chosen in zip(masked.reshape(IMAGES, -1), numbers, strict=True):
            row[chosen] = True
        padded = np.stack([np.pad(x, (0, 4 - len(x)), constant_values=-1) for x in numbers])
        student, teacher = (draw(seed + i, IMAGES, PATCHES, CHANNELS) for i in (2, 3))
        views = jnp.zeros((IMAGES, 1, 8, 8, 3))
        inputs = {"masked_patches": jnp.asarray(padded), "teacher_view": views}

        def compared_of(x: np.ndarray, padded: np.ndarray = padded) -> np.ndarray:
            if compared == "all":
                return x
            return np.take_along_axis(x, np.maximum(padded, 0)[:, :, None], axis=1)

        outputs = {
            "student": compared_of(student)[:, :, None],
            "teacher": jnp.asarray(compared_of(teacher)),
        }
        loss, gradient, carried = step(term, carried, outputs, inputs)
        features, logits = torch_logits(student, KERNEL)
        _, of_teacher = torch_logits(teacher, OF_TEACHER)
        mask = torch.tensor(masked)
        if compared == "masked":
            chosen = mask.flatten(1)
            expected = theirs(of_teacher.detach()[chosen], logits[chosen], mask)
        else:
            expected = theirs(of_teacher.detach(), logits)
        expected.backward()
        assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
        expected = compared_of(features.grad.numpy())
        if compared == "masked":
            expected = expected * (padded >= 0)[:, :, None]
        assert_near(gradient[:, :, 0], expected)
        assert_near(carried["center"], theirs.center.value.ravel())


def test_koleo_is_theirs_of_each_group_of_images() -> None:
    images = draw(3, 12, CHANNELS)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    term, x = (
        KoLeoConfig(group=4),
        context(
            CLIP(TINY),
            make_mesh(MeshConfig(), jax.devices()[:1]),
            State(jnp.zeros((), jnp.int32), {}, {}),
            {},
            {},
            {},
        ),
    )

    @jax.jit
    @jax.value_and_grad
    def differentiate(images: Any) -> Any:
        return term.loss(replace(x, outputs={"image": images}))[0]

    loss, gradient = differentiate(jnp.asarray(images))
    theirs = torch.tensor(images, requires_grad=True)
    expected = torch.stack([KoLeoLoss()(group) for group in theirs.split(4)]).mean()
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    along = (theirs.grad * theirs.detach()).sum(1, keepdim=True)  # they normalise embeddings
    ours = gradient - (gradient * images).sum(1, keepdims=True) * images
    assert_near(ours, (theirs.grad - along * theirs.detach()).numpy())
