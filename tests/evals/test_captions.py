"""Captions on a mesh: what is written, what given ones cost, and which class is most probable."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import sharding
from clip_jax.data import digits
from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.evals.captions import captions, likelihood, loss_per_token
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.evaluator import Encoder
from clip_jax.models.clip import CLIP
from clip_jax.models.generation import GenerationConfig
from clip_jax.sharding import MeshConfig, make_mesh
from tests.conftest import COCA, batch, parameters

# CLIP's BPE needs its bytes.
CONFIG = dataclasses.replace(COCA, text=dataclasses.replace(COCA.text, vocab_size=520))


@pytest.fixture(scope="module")
def encoder():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = parameters(CONFIG)
    params = jax.device_put(params, sharding.param_shardings(CONFIG, params, mesh))
    return Encoder(CLIP(CONFIG), params, mesh, Preprocess(image_size=16), lambda texts: None)


@pytest.fixture(scope="module")
def dense(encoder):
    """Each pair's Σ log p of its tokens, with all logits at once and on one device."""
    model, params = CLIP(CONFIG), jax.tree.map(jnp.asarray, parameters(CONFIG))

    @jax.jit
    def of_pairs(pixels, tokens):
        _, seen = model.encode_image_and_tokens(params, model.normalize(pixels))
        gains = jax.nn.log_softmax(model.decode_text(params, tokens, seen))[:, :-1]
        picked = jnp.take_along_axis(gains, tokens[:, 1:, None], axis=2)[..., 0]
        return jnp.where(tokens[:, 1:] != 0, picked, 0).sum(1)

    return of_pairs


def test_a_number_is_right_in_any_of_its_own_words(monkeypatch):
    """As the tokenizer gives them back: "eighty - one" is 81; another number's are wrong."""
    config = dataclasses.replace(
        CONFIG, text=dataclasses.replace(CONFIG.text, context_length=48, vocab_size=600)
    )
    tokenizer, mesh = make_tokenizer(config.text), make_mesh(MeshConfig())
    encoder = Encoder(
        CLIP(config), jax.device_put(parameters(config), sharding.replicated(mesh)), mesh,
        Preprocess(image_size=16), lambda texts: tokenizer(list(texts), 48),
    )  # fmt: skip
    evaluator = DigitsEvalConfig(per_number=1, max_prompts=1).make()
    for shift, expected in ((0, 1.0), (1, 0.0)):

        def written(encoder, images, generation, shift=shift):
            numbers = next(x for x in evaluator._splits.values() if len(x) == len(images))
            texts = [digits.prompts((n + shift) % 100, 2)[n % 13] for n in numbers]
            return encoder.read(encoder.tokenize(texts))

        monkeypatch.setattr("clip_jax.evals.digits.captions", written)
        found = dict(evaluator.run(encoder))
        assert found["caption/seen/exact"] == found["caption/unseen/exact"] == expected


@pytest.mark.long
def test_the_loss_is_the_mean_of_all_tokens(encoder, dense):
    data = batch(CONFIG, 16)
    pixels, tokens = data["image"][:6], data["text"][:6]
    got = loss_per_token(encoder, pixels, tokens)
    expected = -float(dense(pixels, tokens).sum()) / (tokens[:, 1:] != 0).sum()
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
def test_every_class_has_its_likelihood(encoder, dense):
    data = batch(CONFIG, 16)
    pixels, classes = data["image"][:4], data["text"][4:7]
    placed = jax.device_put(pixels, sharding.batch_sharding(encoder.mesh))
    got = likelihood(encoder.model, encoder.mesh)(classes)(encoder.params, placed)
    for i, tokens in enumerate(classes):
        expected = dense(pixels, np.repeat(tokens[None], 4, axis=0))
        np.testing.assert_allclose(got[:, i], expected, rtol=1e-5)


def test_captions_are_written_on_the_mesh(encoder):
    pixels = batch(CONFIG, 16)["image"][:5]
    found = captions(encoder, pixels, GenerationConfig())
    assert len(found) == 5
    assert all(isinstance(text, str) for text in found)
