"""Losses of images with one to five texts: each form equals the definition in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.losses import Contrastive, SigmoidConfig, SoftmaxConfig
from clip_jax.models.clip import CLIP, l2_normalize
from clip_jax.sharding import batch_sharding
from clip_jax.step import State, context
from tests.conftest import TINY, assert_close
from tests.mesh.conftest import mesh_of

IMAGES, TEXTS, EMBED, SMOOTHING = 32, 5, 16, 0.1
NUMBERS = np.random.default_rng(5).permutation(np.arange(IMAGES) % TEXTS) + 1  # texts of each image
SEVERAL: dict[str, Any] = {"captions": "all", "texts_per_image": TEXTS}
LOSSES: dict[str, Contrastive] = {
    "softmax": SoftmaxConfig(**SEVERAL),
    "softmax, options": SoftmaxConfig(
        **SEVERAL, label_smoothing=SMOOTHING, mask_same_caption=True, widths=(4,)
    ),
    "sigmoid": SigmoidConfig(**SEVERAL),
    "sigmoid, options": SigmoidConfig(**SEVERAL, mask_same_caption=True, widths=(4, 12)),
}


@functools.cache
def problem() -> dict[str, Any]:
    """Random embeddings, and token ids with equal texts within an image and of several images."""
    draw = np.random.default_rng(0).normal
    image = draw(size=(IMAGES, EMBED))
    text = image[:, None] + 0.8 * draw(size=(IMAGES, TEXTS, EMBED))
    unit = [np.float32(l2_normalize(x)) for x in (image, text)]
    ids = np.random.default_rng(1).integers(0, 90, (IMAGES, TEXTS, 1), np.int32)
    values = {"image": unit[0], "text": unit[1][:, 0], "further": unit[1][:, 1:]}
    scalars = {"scale": np.float32(20), "bias": np.float32(-8)}
    return {"values": values | scalars, "ids": ids}


def definition(config: Contrastive, values: Any, ids: np.ndarray) -> Any:
    """The loss of a list of the texts that there are, each with its image."""
    owner = np.repeat(np.arange(IMAGES), NUMBERS)
    number_of = np.concatenate([np.arange(n) for n in NUMBERS])
    all_texts = jnp.concatenate([values["text"][:, None], values["further"]], 1)
    scale, bias, total = values["scale"], values["bias"], 0.0
    positive = np.arange(IMAGES)[:, None] == owner
    valid = np.ones_like(positive)
    if config.mask_same_caption:
        captions = ids[owner, number_of, 0]
        has = [set(captions[owner == i]) for i in range(IMAGES)]
        valid = positive | np.array([[x not in mine for x in captions] for mine in has])
    for width in (EMBED, *config.widths):
        image, text = values["image"][:, :width], all_texts[owner, number_of][:, :width]
        if width < EMBED:
            image, text = l2_normalize(image), l2_normalize(text)
        logits = scale * image @ text.T
        if isinstance(config, SigmoidConfig):
            losses = -jax.nn.log_sigmoid(jnp.where(positive, logits + bias, -logits - bias))
            losses = jnp.where(valid, losses, 0) / NUMBERS[owner]
            total += losses.sum() / IMAGES
            continue
        logits = jnp.where(valid, logits, -jnp.inf)
        smoothing = getattr(config, "label_smoothing", 0.0)
        for x, is_positive, is_valid, weights in (
            (logits, positive, valid, np.full(IMAGES, 1 / IMAGES)),
            (logits.T, positive.T, valid.T, 1 / NUMBERS[owner] / IMAGES),
        ):
            target = (1 - smoothing) * is_positive / is_positive.sum(1, keepdims=True)
            target = target + smoothing * is_valid / is_valid.sum(1, keepdims=True)
            log_p = jnp.where(is_valid, jax.nn.log_softmax(x), 0)
            total -= (weights * (target * log_p).sum(1)).sum() / 2
    return total


@functools.cache
def expected(name: str) -> Any:
    x = problem()
    with jax.enable_x64(True):
        doubles = jax.tree.map(lambda a: np.asarray(a, np.float64), x["values"])
        value = functools.partial(definition, LOSSES[name], ids=x["ids"])
        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(value))(doubles))


@pytest.mark.parametrize(
    ("name", "form", "mesh"),
    [
        *((name, "ring", "4x2") for name in LOSSES),
        *((name, "dense", "1") for name in LOSSES),
        ("softmax", "blocked", "8"),
        ("softmax", "dense", "2x2x2"),
        ("softmax, options", "blocked", "1"),
        ("sigmoid, options", "ring", "8"),
        ("sigmoid", "dense", "4x2"),
    ],
)
def test_one_to_five_texts_equal_the_definition(name: str, form: Any, mesh: str) -> None:
    """Rows without a text hold others, which change nothing and have no gradient."""
    config = dataclasses.replace(LOSSES[name], form=form, block_size=7)
    on = mesh_of(mesh)
    rows = batch_sharding(on)
    x = problem()
    inputs = {"text": x["ids"][:, 0], "further": x["ids"][:, 1:], "further_count": NUMBERS - 1}
    missing = np.arange(1, TEXTS) >= NUMBERS[:, None]
    inputs["further"] = np.where(missing[..., None], x["ids"][:, :1], inputs["further"])
    inputs = jax.device_put(inputs, rows)

    def value(values: dict[str, Any]) -> Any:
        outputs = {"image": values["image"], "text": values["text"]}
        outputs["text:further"] = values["further"]
        params = {"logit_scale": jnp.log(values["scale"]), "logit_bias": values["bias"]}
        of_step = context(CLIP(TINY), on, State(0, params, None), params, inputs, outputs)
        return config.loss(of_step)

    placed = {
        name: jax.device_put(a, rows if a.ndim else NamedSharding(on, P()))
        for name, a in x["values"].items()
    }
    (loss, metrics), gradients = jax.jit(jax.value_and_grad(value, has_aux=True))(placed)
    assert_close(expected(name), (loss, gradients))
    assert not np.asarray(gradients["further"])[missing].any()
    texts = np.concatenate([x["values"]["text"][:, None], x["values"]["further"]], 1)
    if not config.mask_same_caption:
        cosines = np.einsum("RE,CTE->RCT", x["values"]["image"], texts)
        hits = cosines.argmax(0) == np.arange(IMAGES)[:, None]
        share = np.mean([hits[i, :n].mean() for i, n in enumerate(NUMBERS)])
        assert metrics["text_to_image_accuracy"] == pytest.approx(share)
        cosines[:, np.arange(TEXTS) >= NUMBERS[:, None]] = -1
        nearest = cosines.reshape(IMAGES, -1).argmax(1) // TEXTS
        share = (nearest == np.arange(IMAGES)).mean()
        assert metrics["image_to_text_accuracy"] == pytest.approx(share)


def test_one_text_of_each_image_is_the_usual_loss() -> None:
    x = problem()["values"]

    def loss(config: Contrastive, further: Any) -> Any:
        outputs = {"image": x["image"], "text": x["text"], "text:further": further}
        params = {"logit_scale": jnp.float32(3), "logit_bias": jnp.float32(-8)}
        inputs = {"further_count": jnp.zeros(IMAGES, jnp.int32)}
        of_step = context(CLIP(TINY), mesh_of("1"), State(0, params, None), params, inputs, outputs)
        return config.loss(of_step)

    for kind in (SoftmaxConfig, SigmoidConfig):
        assert_close(loss(kind(), None), loss(kind(**SEVERAL), jnp.asarray(x["further"])))
