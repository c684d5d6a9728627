"""Draws of tokens follow the distribution that is left, and limits of captions are checked; whole
captions are in tests/mesh."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import InputError
from clip_jax.models.clip import CLIP
from clip_jax.models.generation import GenerationConfig, _choose, begin_and_end, generate
from tests.conftest import COCA


@pytest.mark.parametrize(
    ("method", "kept"),
    [({}, 4), ({"top_k": 2}, 2), ({"top_p": 0.71}, 3), ({"top_p": 0.7, "temperature": 0.5}, 2)],
)
def test_draws_follow_the_distribution_that_is_left(method, kept):
    """Of many seeds: frequencies among the best tokens."""
    p = np.array([0.3, 0.2, 0.4, 0.1])
    config = GenerationConfig(method="sample", **method)
    draw = functools.partial(_choose, jnp.log(p[None]), jnp.int32(0), config=config)
    drawn = np.asarray(jax.jit(jax.vmap(lambda seed: draw(seed=seed)[0]))(jnp.arange(2_000)))
    p[np.argsort(-p)[kept:]] = 0
    p **= 1 / config.temperature
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 2_000, p / p.sum(), atol=0.05)
    assert set(drawn) == set(np.flatnonzero(p))


def test_captions_are_as_long_as_the_model_allows_and_need_an_id_to_begin_with():
    text = COCA.text  # ten positions
    least = GenerationConfig(min_length=20).within(text)
    assert (least.max_length, least.min_length) == (10, 9)
    assert GenerationConfig().within(replace(text, context_length=77)).max_length == 30
    chosen = GenerationConfig(max_length=7)
    assert chosen.within(text) == chosen
    with pytest.raises(InputError, match="min_length=6 must be less than"):
        GenerationConfig(max_length=6, min_length=6)
    with pytest.raises(InputError, match="context_length=10"):
        generate(CLIP(COCA), {}, jnp.zeros((1, 3, 32)), GenerationConfig(max_length=11))
    tokenizer = replace(COCA.text.tokenizer, file="x.json")
    with pytest.raises(InputError, match="begin_id=None"):
        begin_and_end(replace(COCA.text, tokenizer=tokenizer))
