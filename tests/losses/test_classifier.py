"""The classifier head against NumPy in float64; its FLOPs; refusals."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import flops
from clip_jax.errors import InputError
from clip_jax.losses import Axes, ClassifierConfig, Context, objective
from clip_jax.models.clip import CLIP
from clip_jax.sharding import BATCH_AXES, MeshConfig, make_mesh
from clip_jax.step import Recipe
from tests.conftest import OPTIM, TINY

CLASSES = ("cat", "dog", "newt")
LABELS = np.arange(16, dtype=np.int32) % 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradient_equal_numpy_in_float64(smoothing: float) -> None:
    rng = np.random.default_rng(0)
    image, kernel, log_scale = rng.normal(size=(16, 8)), rng.normal(size=(3, 8)), np.log(7.0)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    term = ClassifierConfig(classes=CLASSES, label_smoothing=smoothing)
    on = make_mesh(MeshConfig(), jax.devices()[:1])

    def value(image: Any, kernel: Any, log_scale: Any) -> Any:
        params = {"logit_scale": log_scale, "classifier": {"kernel": kernel}}
        x = Context(
            CLIP(TINY),
            params,
            {"label": jnp.asarray(LABELS)},
            {"image": image},
            on,
            Axes(BATCH_AXES, "fsdp", "tensor"),
            carried={},
        )
        outputs = objective.encode((term,), x)
        return objective.total((term,), replace(x, outputs=outputs))

    arguments = [jnp.asarray(x, jnp.float32) for x in (image, kernel, log_scale)]
    gradients = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))
    (loss, metrics), grads = gradients(*arguments)

    cosines = image @ kernel.T
    logits = 7.0 * cosines
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = (1 - smoothing) * np.eye(3)[LABELS] + smoothing / 3
    d = (p - targets) / 16  # of the logits
    expected = 7.0 * d @ kernel, 7.0 * d.T @ image, (d * logits).sum()
    assert loss == pytest.approx(-(targets * np.log(p)).sum(1).mean(), rel=1e-6)
    assert metrics["classifier_accuracy"] == pytest.approx((logits.argmax(1) == LABELS).mean())
    for got, want in zip(grads, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_work_is_that_of_the_classes_and_less_below_locked_towers() -> None:
    term = ClassifierConfig(classes=CLASSES)
    assert term.macs(TINY, 16, ()) == 3 * 16 * 3 * TINY.embed_dim
    assert term.macs(TINY, 16, ("image",)) == 2 * 16 * 3 * TINY.embed_dim
    full, half = (
        flops.of_step(Recipe(model=TINY, objective=(term,), optim=optim, steps=10, batch_size=16))
        for optim in (OPTIM, replace(OPTIM, locked=("image", "text")))
    )
    assert full.total > half.total


def test_wrong_settings_are_named() -> None:
    for fields, message in (
        ({"templates": ("a photo",)}, r"ClassifierConfig\.templates='a photo' has no \{\}"),
        ({"templates": ()}, "templates='' has no"),
        ({"label_smoothing": 1.0}, r"ClassifierConfig\.label_smoothing=1\.0"),
    ):
        with pytest.raises(InputError, match=message):
            ClassifierConfig(**fields)
