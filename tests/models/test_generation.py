"""Captions: greedy as one would write them by hand, beams against all captions there are, draws
that depend on the seed alone."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import InputError
from clip_jax.models.clip import CLIP
from clip_jax.models.generation import GenerationConfig, _choose, begin_and_end, generate
from tests.conftest import COCA, MAMMUT, batch, decode_text, parameters

# One block of each: every block is compiled apart.
SMALL = replace(COCA, text=replace(COCA.text, depth=1), decoder=replace(COCA.decoder, depth=1))
TOY = replace(SMALL, text=replace(SMALL.text, vocab_size=6))  # 4 begins, 5 ends
PAD, BEGIN, END = 0, 518, 519


def model_and_images(config, size=4):
    model, params = CLIP(config), jax.tree.map(jnp.asarray, parameters(config))
    images = model.normalize(jnp.asarray(batch(config)["image"][:size]))
    return model, params, jax.jit(model.encode_image_and_tokens)(params, images)[1]


def write(model, params, image_tokens, config, seed=0):
    run = jax.jit(lambda p, x, s: generate(model, p, x, config, s))
    return np.asarray(run(params, image_tokens, jnp.uint32(seed)))


@pytest.mark.parametrize(
    "config", [SMALL, replace(MAMMUT, text=replace(MAMMUT.text, depth=2))], ids=["coca", "mammut"]
)
def test_greedy_takes_the_best_token_of_the_uncached_decoder(config):
    model, params, image_tokens = model_and_images(config)
    length, least = 9, 4
    got = write(model, params, image_tokens, GenerationConfig(max_length=length, min_length=least))
    decode = jax.jit(functools.partial(decode_text, model))
    ids = np.zeros((4, config.text.context_length), np.int32)
    ids[:, 0], done = BEGIN, np.zeros(4, bool)
    for place in range(length - 1):
        logits = np.array(decode(params, ids, image_tokens)[:, place])
        if place + 1 < least:
            logits[:, END] = -np.inf
        chosen = np.full(4, END) if place + 2 == length else logits.argmax(1)
        ids[:, place + 1] = np.where(done, PAD, chosen)
        done |= np.isin(ids[:, place + 1], [PAD, END])
    np.testing.assert_array_equal(got, ids[:, :length])


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_beams_find_the_best_of_all_captions(penalty):
    model, params, image_tokens = model_and_images(TOY, 2)
    length, least = 5, 3
    captions = [
        (4, *words, 5, *(PAD,) * (length - count - 2))
        for count in range(least - 1, length - 1)
        for words in itertools.product([1, 2, 3, 4], repeat=count)
    ]
    rows = np.array(captions, np.int32)
    limits = {"max_length": length, "min_length": least, "length_penalty": penalty}
    config = GenerationConfig(method="beams", beams=4 ** (length - 2), **limits)
    got = write(model, params, image_tokens, config)
    for image in range(2):
        tokens = jnp.repeat(image_tokens[image : image + 1], len(rows), axis=0)
        logits = jax.jit(functools.partial(decode_text, model))(params, rows, tokens)
        gains = np.asarray(jax.nn.log_softmax(logits))
        gains = np.take_along_axis(gains, rows[:, 1:, None], axis=2)[..., 0]
        is_written = rows[:, 1:] != PAD
        scores = np.where(is_written, gains, 0).sum(1) / is_written.sum(1) ** penalty
        np.testing.assert_array_equal(got[image], rows[scores.argmax()])


def test_one_beam_of_any_length_is_greedy_where_the_end_is_far():
    model, params, image_tokens = model_and_images(SMALL)
    kernel = params["decoder"]["vocab_projection"].at[:, END].set(0)
    params["decoder"] |= {"vocab_projection": kernel}
    limits = {"max_length": 6, "min_length": 5}
    greedy = write(model, params, image_tokens, GenerationConfig(**limits))
    beam = write(model, params, image_tokens, GenerationConfig(method="beams", beams=1, **limits))
    np.testing.assert_array_equal(beam[:, :5], greedy[:, :5])


def test_draws_depend_on_the_seed_alone():
    model, params, image_tokens = model_and_images(SMALL, 8)
    config = GenerationConfig(method="sample", max_length=9, top_k=5, top_p=0.9, temperature=0.8)
    run = jax.jit(lambda p, x, s: generate(model, p, x, config, s))
    got = run(params, image_tokens, jnp.uint32(0))
    np.testing.assert_array_equal(run(params, image_tokens, jnp.uint32(0)), got)
    assert (run(params, image_tokens, jnp.uint32(1)) != got).any()
    # In another company, and on a mesh.
    np.testing.assert_array_equal(run(params, image_tokens[::-1], jnp.uint32(0)), got[::-1])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    split = jax.device_put(image_tokens, rows)
    np.testing.assert_array_equal(run(params, split, jnp.uint32(0)), got)
    # With a seed of its own, each row is the one of that seed.
    seeds = jnp.array([0, 1, 1, 7, 0, 2**32 - 1, 1, 3], jnp.uint32)
    single = np.stack([run(params, image_tokens, seed)[row] for row, seed in enumerate(seeds)])
    np.testing.assert_array_equal(run(params, image_tokens, seeds), single)
    np.testing.assert_array_equal(run(params, split, jax.device_put(seeds, rows)), single)


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
