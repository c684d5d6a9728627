"""Contrastive losses as users define them: each form equals the definition in float64."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.losses import (
    Contrastive,
    SigmoidConfig,
    SoftmaxConfig,
    contrastive,
    contrastive_loss,
    devices_per_slice,
)
from clip_jax.losses.pairs import MASKED, Pairs
from clip_jax.losses.sums import ExpSum, Max, SumOf
from clip_jax.models.clip import l2_normalize
from clip_jax.sharding import BATCH_AXES, MeshConfig, batch_sharding, make_mesh
from tests.conftest import MESHES, assert_close

IMAGES, EMBED, SCALE, BIAS = 48, 16, 20.0, -8.0
Definition = Callable[[Any, Any, Any, Any, Any], Any]  # (cosine, positive, weights, scale, bias)


def negatives(pairs: Pairs) -> jax.Array:
    return jnp.where(pairs.positive, MASKED, pairs.cosine)


@dataclass(frozen=True, kw_only=True)
class HardNegatives(Contrastive):
    """HN-NCE (Radenovic et al. 2023, arXiv:2301.02280, equation 2): the weights of an image's
    negatives are proportional to exp(β · logit) and add up to B − 1."""

    beta: float = 0.5

    def sums(self, scale, bias):
        return {
            "hardest": Max(negatives),
            "weights": ExpSum("hardest", self.beta * scale),
            "weighted": ExpSum("hardest", (1 + self.beta) * scale),
        }

    def losses(self, image, text, scale, bias):
        def loss(x):
            # log(e^positive + (B − 1) · weighted / weights), relative to the hardest negative
            share = jnp.log((x["count"] - 1) * x["weighted"] / x["weights"])
            return jnp.logaddexp(0, scale * (x["hardest"] - x["positive"]) + share)

        return loss(image) + loss(text)

    @staticmethod
    def definition(cosine, positive, weights, scale, bias):
        total = 0.0
        for logits in (scale * cosine, scale * cosine.T):
            matching, others = jnp.diag(logits), ~np.eye(len(logits), dtype=bool)
            weight = jnp.where(others, jnp.exp(0.5 * logits), 0)
            weight *= (len(logits) - 1) / weight.sum(1, keepdims=True)
            negative = jnp.where(others, weight * jnp.exp(logits), 0).sum(1)
            total -= jnp.log(jnp.exp(matching) / (jnp.exp(matching) + negative)).mean()
        return total


@dataclass(frozen=True, kw_only=True)
class Hinge(Contrastive):
    """A hinge loss of the hardest negative (VSE++), plus a weighted sum of all cosines."""

    margin: float = 0.2

    def sums(self, scale, bias):
        return {
            "hardest": Max(negatives, has_gradient=True),
            "others": ExpSum("hardest", 3.0, times=lambda pairs: pairs.cosine),
        }

    def losses(self, image, text, scale, bias):
        def hinge(x):
            return jax.nn.relu(self.margin + x["hardest"] - x["positive"]) + 0.1 * x["others"]

        return hinge(image), hinge(text)

    @staticmethod
    def definition(cosine, positive, weights, scale, bias):
        total = 0.0
        for x in (cosine, cosine.T):
            others = jnp.where(np.eye(len(x), dtype=bool), -jnp.inf, x)
            hardest = others.max(1)
            shares = (jnp.exp(3.0 * (others - hardest[:, None])) * x).sum(1)
            total += (jax.nn.relu(0.2 + hardest - jnp.diag(x)) + 0.1 * shares).mean()
        return total


@dataclass(frozen=True, kw_only=True)
class Weighted(SigmoidConfig):
    """The sigmoid loss with weights of images and texts; JAX differentiates it."""

    def sums(self, scale, bias):
        def losses(pairs):
            signed = (2 * pairs.positive - 1) * (scale * pairs.cosine + bias)
            weights = pairs.image["weight"][:, None] * pairs.text["weight"][None, :]
            return -weights * jax.nn.log_sigmoid(signed)

        return {"losses": SumOf(losses)}

    @staticmethod
    def definition(cosine, positive, weights, scale, bias):
        losses = -jax.nn.log_sigmoid((2 * positive - 1) * (scale * cosine + bias))
        return (weights[0][:, None] * weights[1] * losses).sum() / len(cosine)


def info_nce(cosine, positive, weights, scale, bias):
    """Cross-entropy whose target is spread evenly over the positive pairs of a row or column; one
    without a positive pair adds nothing."""
    total = 0.0
    for x, positives in ((cosine, positive), (cosine.T, positive.T)):
        target = positives / np.maximum(positives.sum(1, keepdims=True), 1)
        total -= (target * jax.nn.log_softmax(scale * x)).sum() / len(x)
    return total / 2


def sigmoid(cosine, positive, weights, scale, bias):
    losses = -jax.nn.log_sigmoid((2 * positive - 1) * (scale * cosine + bias))
    return losses.sum() / len(cosine)


# Two texts per image, in random order. Image 0 has four, the last image none.
TEXT_IDS = np.random.default_rng(1).permutation(np.repeat(np.arange(IMAGES), 2) % (IMAGES - 1))
LOSSES: dict[str, tuple[Contrastive, Definition, Any]] = {
    "hard negatives": (HardNegatives(), HardNegatives.definition, None),
    "hinge": (Hinge(), Hinge.definition, None),
    "weighted": (Weighted(), Weighted.definition, None),
    "several texts, softmax": (SoftmaxConfig(), info_nce, TEXT_IDS),
    "several texts, sigmoid": (SigmoidConfig(), sigmoid, TEXT_IDS),
    "widths, softmax": (SoftmaxConfig(widths=(4, 12), width_weights=(0.5, 2.0)), info_nce, None),
    "widths, hinge": (Hinge(widths=(12,)), Hinge.definition, None),
    "widths, several texts": (SigmoidConfig(widths=(4, 12)), sigmoid, TEXT_IDS),
}


def problem(text_ids: Any) -> dict[str, Any]:
    draw = np.random.default_rng(0).normal
    image = draw(size=(IMAGES, EMBED))
    text = image[np.arange(IMAGES) if text_ids is None else text_ids]
    text = text + 0.7 * draw(size=text.shape)
    unit = [np.float32(l2_normalize(x)) for x in (image, text)]
    return {
        "image": unit[0],
        "text": unit[1],
        "scale": np.float32(SCALE),
        "bias": np.float32(BIAS),
    }


def weights_of(x: Any) -> np.ndarray:
    return np.linspace(0.5, 1.5, len(x), dtype=np.float32)


@functools.cache
def expected(name: str) -> Any:
    """Return the loss of the problem by its definition, and its gradients, in float64."""
    config, define, text_ids = LOSSES[name]
    x = problem(text_ids)
    ids = np.arange(IMAGES) if text_ids is None else text_ids
    positive = np.arange(IMAGES)[:, None] == ids

    def value(x):
        weights = weights_of(x["image"]), weights_of(x["text"])
        total = 0.0
        factors = dict(zip(config.widths, config.width_weights or (1, 1), strict=False))
        for width, factor in {EMBED: 1, **factors}.items():
            image, text = (x[side][:, :width] for side in ("image", "text"))
            if width < EMBED:
                image, text = l2_normalize(image), l2_normalize(text)
            total += factor * define(image @ text.T, positive, weights, x["scale"], x["bias"])
        return total

    with jax.enable_x64(True):
        doubles = jax.tree.map(lambda a: np.asarray(a, np.float64), x)
        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(value))(doubles))


# Every loss in its dense form and in rings of two devices; some losses in other forms.
@pytest.mark.parametrize(
    ("name", "form", "mesh", "block_size"),
    [
        *((name, "rings of 2", "4x2", 5) for name in LOSSES),
        *((name, "dense", "1", 5) for name in LOSSES),
        ("several texts, softmax", "dense", "2x2x2", 5),
        ("hinge", "blocked", "1", 7),
        ("several texts, sigmoid", "blocked", "1", 100),
        ("hard negatives", "ring", "8", 5),
        ("weighted", "ring", "8", 100),
        ("widths, softmax", "ring", "8", 6),
        ("widths, several texts", "blocked", "1", 7),
    ],
)
def test_equals_the_definition(
    name: str, form: str, mesh: str, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, text_ids = LOSSES[name]
    if form == "rings of 2":  # rings within slices of two devices; slices gather texts
        slices = mock.create_autospec(devices_per_slice, return_value=2)
        monkeypatch.setattr(contrastive, "devices_per_slice", slices)
    kind: Any = form.split()[0].replace("rings", "ring")
    config = dataclasses.replace(config, form=kind, block_size=block_size)
    devices = jax.devices()[:1] if mesh == "1" else jax.devices()
    on = make_mesh(MESHES.get(mesh, MeshConfig()), devices)
    ids = None if text_ids is None else (jnp.arange(IMAGES), jnp.asarray(text_ids))

    def value(x: dict[str, Any]) -> Any:
        inputs = {"weight": weights_of(x["image"])}, {"weight": weights_of(x["text"])}
        return contrastive_loss(
            config,
            x["image"],
            x["text"],
            x["scale"],
            x["bias"],
            ids=ids,
            inputs=jax.tree.map(jnp.asarray, inputs),
            mesh=on,
            axes=BATCH_AXES,
        )

    def place(x: Any) -> Any:
        return jax.device_put(x, batch_sharding(on) if x.ndim else NamedSharding(on, P()))

    x = problem(text_ids)
    (loss, metrics), gradients = jax.jit(jax.value_and_grad(value, has_aux=True))(
        jax.tree.map(place, x)
    )
    want = expected(name)
    assert want[0] > 0.1
    assert_close(want, (loss, gradients))
    ids = np.arange(IMAGES) if text_ids is None else text_ids
    for width in (EMBED, *config.widths):
        image, text = (l2_normalize(x[side][:, :width]) for side in ("image", "text"))
        of_width = "" if width == EMBED else f"_{width}"
        accuracy = (ids[(image @ text.T).argmax(1)] == range(IMAGES)).mean()
        assert metrics[f"image_to_text_accuracy{of_width}"] == pytest.approx(accuracy)


def test_a_maximum_that_several_pairs_reach_shares_its_gradient() -> None:
    """Equal texts are equally hard negatives, in one block or in several."""
    image = l2_normalize(np.random.default_rng(0).normal(size=(4, EMBED)).astype(np.float32))
    text = image[[0, 1, 1, 1]]

    def gradients(form: Any) -> Any:
        def value(image: Any, text: Any) -> Any:
            config = Hinge(form=form, block_size=3, margin=1.0)
            return contrastive_loss(config, image, text, jnp.float32(1))[0]

        return jax.jit(jax.grad(value, (0, 1)))(image, text)

    assert_close(gradients("dense"), gradients("blocked"))
