"""Every form of the losses, on every mesh, against the definition in float64."""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.losses import (
    Axes,
    Context,
    SigmoidConfig,
    SoftmaxConfig,
    caption_ids,
    contrastive,
    contrastive_loss,
    devices_per_slice,
)
from clip_jax.models.clip import CLIP
from clip_jax.models.inputs import LabelInput
from clip_jax.sharding import BATCH_AXES, MeshConfig, batch_sharding, make_mesh
from tests.conftest import MESHES, TINY

BATCH, WIDTH, EMBED = 48, 24, 16
CAPTIONS = np.arange(BATCH) % 40  # eight captions occur twice
WAYS = ("image_to_text", "text_to_image")
NEARLY_SOLVED = {"softmax": {"noise": 0.4}, "sigmoid": {"noise": 0.02, "bias": -95.0}}


def problem(*, noise: float = 0.5, scale: float = 100.0, bias: float = -70.0) -> tuple[dict, dict]:
    """Parameters and inputs of two linear towers whose pairs differ by `noise`."""
    draw = np.random.default_rng(0).normal
    image = draw(size=(BATCH, WIDTH))
    image = image[CAPTIONS] + 0.2 * noise * draw(size=(BATCH, WIDTH))  # one caption, alike
    inputs = {"image": image, "text": image + noise * draw(size=(BATCH, WIDTH))}
    tower = draw(size=(WIDTH, EMBED))
    params = {
        "image": tower,
        "text": tower + 0.1 * noise * draw(size=(WIDTH, EMBED)),
        "image_offset": np.zeros((BATCH, EMBED)),  # its gradient is that of the embeddings
        "text_offset": np.zeros((BATCH, EMBED)),
        "logit_scale": np.log(scale),
        "logit_bias": np.array(bias),
    }
    return jax.tree.map(lambda a: np.asarray(a, np.float32), (params, inputs))


def embeddings(params: dict, inputs: dict) -> list:
    sides = []
    for side in ("image", "text"):
        x = inputs[side] @ params[side]
        sides.append(x / jnp.linalg.norm(x, axis=1, keepdims=True) + params[f"{side}_offset"])
    return sides


def definition(params: dict, inputs: dict, loss: str, is_masked: Any, smooth: Any) -> Any:
    """The loss and the accuracies, with the whole matrix and one-hot targets."""
    image, text = embeddings(params, inputs)
    logits = jnp.exp(params["logit_scale"]) * image @ text.T
    positive = np.eye(BATCH, dtype=bool)
    keep = positive | (CAPTIONS[:, None] != CAPTIONS) | ~is_masked
    hits = [jnp.where(keep, logits, -jnp.inf).argmax(x) == np.arange(BATCH) for x in (1, 0)]
    accuracies = {f"{way}_accuracy": hit.mean() for way, hit in zip(WAYS, hits, strict=True)}
    if loss == "sigmoid":
        logits = logits + params["logit_bias"]
        target = (1 - smooth) * positive + smooth / 2
        log_yes, log_no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        terms = target * log_yes + (1 - target) * log_no
        return -jnp.where(keep, terms, 0).sum() / BATCH, accuracies
    total = 0.0
    for axis in (0, 1):
        target = (1 - smooth) * positive + smooth * keep / keep.sum(axis, keepdims=True)
        log_p = jax.nn.log_softmax(jnp.where(keep, logits, -jnp.inf), axis)
        total -= jnp.where(keep, target * log_p, 0).sum() / BATCH
    return total / 2, accuracies


_exact = jax.jit(jax.value_and_grad(definition, has_aux=True), static_argnums=2)


def reference(loss: str, options: dict, setting: dict) -> Any:
    with jax.enable_x64(True):
        params, inputs = jax.tree.map(lambda a: np.asarray(a, np.float64), problem(**setting))
        is_masked = np.array(options.get("mask_same_caption", False))
        smooth = np.float64(options.get("label_smoothing", 0.0))
        return jax.tree.map(np.asarray, _exact(params, inputs, loss, is_masked, smooth))


MASK, SMOOTH = {"mask_same_caption": True}, {"label_smoothing": 0.1}


# Each form of each loss with same captions masked, and with smoothing; each form on several meshes.
# A block divides neither the batch nor a device's rows (48, 12 or 6), or is one row, or is all.
@pytest.mark.parametrize(
    ("loss", "form", "mesh", "options", "block_size"),
    [
        ("softmax", "dense", "1", MASK, 5),
        ("softmax", "dense", "4x2", MASK | SMOOTH, 5),
        ("softmax", "blocked", "8", MASK | SMOOTH, 5),
        ("softmax", "blocked", "1", {}, 1000),
        ("softmax", "ring", "2x2x2", MASK | SMOOTH, 5),
        ("softmax", "rings of 2", "8", MASK, 5),
        ("sigmoid", "dense", "1", MASK, 5),
        ("sigmoid", "dense", "2x2x2", MASK | SMOOTH, 5),
        ("sigmoid", "blocked", "4x2", MASK, 7),
        ("sigmoid", "ring", "1", SMOOTH, 1),
        ("sigmoid", "ring", "8", MASK | SMOOTH, 1000),
        ("sigmoid", "rings of 2", "4x2", {}, 5),
    ],
)
def test_equals_the_definition(
    loss: str, form: str, mesh: str, options: dict, block_size: int, monkeypatch: Any
) -> None:
    kind = {"softmax": SoftmaxConfig, "sigmoid": SigmoidConfig}[loss]
    config = kind(form=form.split()[0].replace("rings", "ring"), block_size=block_size, **options)
    devices = jax.devices()[:1] if mesh == "1" else jax.devices()
    on = make_mesh(MESHES.get(mesh, MeshConfig()), devices)

    def value(params: dict, inputs: dict) -> Any:
        scale, bias = jnp.exp(params["logit_scale"]), params["logit_bias"]
        return contrastive_loss(
            config,
            *embeddings(params, inputs),
            scale,
            bias,
            caption_ids=jnp.asarray(CAPTIONS),
            mesh=on,
            axes=BATCH_AXES,
        )

    gradient = jax.jit(jax.value_and_grad(value, has_aux=True))

    def compute(setting: dict) -> Any:
        params, inputs = problem(**setting)
        params = jax.device_put(params, NamedSharding(on, P()))
        return gradient(params, jax.device_put(inputs, batch_sharding(on)))

    if form == "rings of 2":  # neighbours of one slice pass texts on; slices gather
        slices = mock.create_autospec(devices_per_slice, return_value=2)
        monkeypatch.setattr(contrastive, "devices_per_slice", slices)
    got = compute({})
    want = reference(loss, options, {})
    assert want[0][0] > 0.05
    assert got[1]["logit_bias"] == 0 or loss == "sigmoid"  # it has no part in the softmax
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        largest = np.abs(np.asarray(a, np.float64) - b).max()
        assert largest <= 1e-5 * np.abs(b).max(), jax.tree_util.keystr(path)

    if options == MASK:  # pairs that are nearly solved are right absolutely
        want = reference(loss, options, NEARLY_SOLVED[loss])
        assert 1e-5 < want[0][0] < 1e-2
        got = compute(NEARLY_SOLVED[loss])
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_captions_are_true_or_synthetic_or_both() -> None:
    image, text = jax.jit(embeddings)(*problem())
    tokens = jnp.asarray(CAPTIONS)[:, None]
    data = {"text": tokens, "synthetic": tokens // 2}  # some others are equal
    outputs = {"image": image, "text": text, "text:synthetic": jnp.roll(text, 1, 0)}
    on = make_mesh(MeshConfig(), jax.devices()[:1])
    axes = Axes(BATCH_AXES, "fsdp", "tensor")
    x = Context(CLIP(TINY), {"logit_scale": jnp.log(10.0)}, data, outputs, on, axes)
    terms = {
        captions: SoftmaxConfig(captions=captions, mask_same_caption=True)
        for captions in ("true", "synthetic", "both")
    }

    @jax.jit
    def compute() -> Any:
        expected = [
            contrastive_loss(
                SoftmaxConfig(mask_same_caption=True),
                image,
                outputs[output],
                jnp.float32(10),
                caption_ids=caption_ids(data[name]),
            )[0]
            for name, output in (("text", "text"), ("synthetic", "text:synthetic"))
        ]
        return {captions: term.loss(x) for captions, term in terms.items()}, expected

    results, (true, synthetic) = compute()
    for captions, term in terms.items():
        needed = () if captions == "true" else ("text:synthetic",)
        assert term.needs == needed
        assert list(term.reads(TINY)) == [name.removeprefix("text:") for name in needed]
        accuracy = results[captions][1]["image_to_text_accuracy"]
        assert (accuracy > 0.5) == (captions != "synthetic")
    assert results["true"][0] == true
    assert results["synthetic"][0] == synthetic
    assert results["both"][0] == true + synthetic
    true, both = (SoftmaxConfig(captions=x).macs(TINY, 16, ()) for x in ("true", "both"))
    assert both == 2 * true


@pytest.mark.parametrize(("kind", "form"), [(SoftmaxConfig, "dense"), (SigmoidConfig, "ring")])
def test_two_captions_of_a_class_are_no_negatives(kind: Any, form: Any) -> None:
    """As a mask of captions does if every class has one; captions themselves do not matter."""
    image, text = jax.jit(embeddings)(*problem())
    on = make_mesh(MESHES["4x2"])
    data = {"text": jnp.arange(BATCH)[:, None], "class": jnp.asarray(CAPTIONS)}  # no two alike
    scalars = {"logit_scale": jnp.log(10.0), "logit_bias": jnp.float32(-3)}
    outputs = {"image": image, "text": text}
    x = Context(CLIP(TINY), scalars, data, outputs, on, Axes(BATCH_AXES, "fsdp", "tensor"))
    terms = (
        kind(form=form, block_size=5, mask_same_class=True),
        kind(form=form, block_size=5, mask_same_caption=True),
    )
    masked, by_captions = jax.jit(lambda: [term.loss(x)[0] for term in terms])()
    expected, _ = contrastive_loss(
        kind(mask_same_caption=True),
        image,
        text,
        jnp.exp(scalars["logit_scale"]),
        scalars["logit_bias"],
        caption_ids=jnp.asarray(CAPTIONS),
    )
    assert masked == pytest.approx(float(expected), rel=1e-5)
    assert by_captions > 1.001 * masked
    assert kind(mask_same_class=True).reads(TINY) == {"class": LabelInput()}
