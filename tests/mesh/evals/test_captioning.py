"""Generation of captions, and the likelihood of captions, on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import sharding
from clip_jax.data.images import Preprocess
from clip_jax.evals.captioning import (
    captions,
    classify_by_likelihood,
    describe,
    log_likelihood,
    loss_per_token,
    write,
)
from clip_jax.evals.datasets import Captioned, Labelled
from clip_jax.evals.evaluator import Encoder, compiled
from clip_jax.evals.ranks import NotFinite
from clip_jax.evals.reader import Splits
from clip_jax.models.clip import CLIP
from clip_jax.models.generation import GenerationConfig
from tests.conftest import COCA, batch, decode_text, parameters
from tests.evals.conftest import mesh_of


@pytest.fixture(scope="module")
def encoder():
    mesh, params = mesh_of(data=2, fsdp=2, tensor=2), parameters(COCA)
    params = jax.device_put(params, sharding.param_shardings(COCA, params, mesh))
    return Encoder(CLIP(COCA), params, mesh, Preprocess(image_size=16), lambda texts: texts)


@pytest.fixture(scope="module")
def log_probabilities():
    """Return a function that computes the log probabilities of all next tokens at once, on one
    device."""
    model, params = CLIP(COCA), jax.tree.map(jnp.asarray, parameters(COCA))

    @jax.jit
    def dense(pixels, tokens):
        _, seen = model.encode_image_and_tokens(params, model.normalize(pixels))
        return jax.nn.log_softmax(decode_text(model, params, tokens, seen))

    return lambda pixels, tokens: np.asarray(dense(pixels, tokens))


def test_probabilities_are_those_of_all_logits_at_once(encoder, log_probabilities):
    """For 4 images and 3 texts: the log-likelihood of each pair, and the mean loss per token."""
    data = batch(COCA, 16)
    images, texts = data["image"][:4], data["text"][4:7]
    texts[0, 5:] = 0  # a shorter text
    pixels, tokens = np.repeat(images, 3, axis=0), np.tile(texts, (4, 1))
    of_all = log_probabilities(pixels, tokens)
    gains = np.take_along_axis(of_all, tokens[:, 1:, None], axis=2)[..., 0]
    real = tokens[:, 1:] != 0
    mean = -gains[real].sum() / real.sum()
    assert loss_per_token(encoder, pixels, tokens) == pytest.approx(mean, rel=1e-5)

    placed = jax.device_put(images, sharding.batch_sharding(encoder.mesh))
    score = compiled(log_likelihood, encoder.model, encoder.mesh, mesh=encoder.mesh)
    got = score(encoder.params, placed, texts)
    np.testing.assert_allclose(np.ravel(got), (gains * real).sum(1), rtol=1e-5)


def pictures(kind, *more):
    """Return two images with labels or captions."""
    images = batch(COCA, 16)["image"]
    answers = {Labelled: 0, Captioned: ["a cat"]}
    return kind(2, lambda i: (images[i], answers[kind]), *more)


@pytest.mark.parametrize(
    ("task", "data"),
    [
        (classify_by_likelihood, pictures(Labelled, ["a", "b"], ["{c}"])),
        (lambda splits: describe(splits, GenerationConfig(min_length=1)), pictures(Captioned)),
    ],
)
def test_captions_for_images_that_are_not_finite_are_not_measured(task, data, encoder):
    """NaN must be an error: the first token would be the most probable, as if nothing was wrong."""
    broken = encoder.params | {
        "visual": jax.tree.map(lambda x: x * np.nan, encoder.params["visual"])
    }
    tokens = batch(COCA, 16)["text"]
    encoder = dataclasses.replace(
        encoder, params=broken, tokenize=lambda texts: tokens[: len(texts)]
    )
    with pytest.raises(NotFinite, match="2 of 2 rows of the model's outputs"):
        task(Splits("set", lambda split: data, encoder))


def test_captions_are_written_on_the_mesh(encoder, log_probabilities):
    """Each token is the most probable one after those before it, up to the end of the text."""
    pixels, generation = batch(COCA, 16)["image"][:5], GenerationConfig(min_length=1)
    ids = encoder.compute(write, pixels, generation=generation)
    assert captions(encoder, pixels, generation) == encoder.read(ids)
    of_all = log_probabilities(pixels[np.arange(12) % 5], ids[np.arange(12) % 5])
    free = (
        np.cumsum(ids == COCA.text.end_id, axis=1)[:, :-2] == 0
    )  # the last token is always the end
    np.testing.assert_array_equal(ids[:, 1:-1][free], of_all[:5].argmax(2)[:, :-1][free])
    assert free.sum() > 10
    assert len({*map(tuple, ids.tolist())}) > 1
