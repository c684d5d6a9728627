"""Caption generation: greedy search equals a simple loop, beam search finds the best of all
captions, and samples depend on the seed alone."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.models.clip import CLIP
from clip_jax.models.generation import GenerationConfig, generate
from tests.conftest import CAPPA, COCA, batch, decode_text, parameters

# One block each, since XLA compiles every block separately.
SMALL = replace(COCA, text=replace(COCA.text, depth=1), decoder=replace(COCA.decoder, depth=1))
TOY = replace(SMALL, text=replace(SMALL.text, vocab_size=6))  # id 4: begin, 5: end
PAD, BEGIN, END = 0, 518, 519


@functools.cache
def model_and_images(config):
    """Return a model, its parameters, the tokens of eight images, and `decode_text`, compiled."""
    model, params = CLIP(config), jax.tree.map(jnp.asarray, parameters(config))
    images = model.normalize(jnp.asarray(batch(config, 8)["image"]))
    image_tokens = jax.jit(model.encode_image_and_tokens)(params, images)[1]
    return model, params, image_tokens, jax.jit(functools.partial(decode_text, model))


def write(model, params, image_tokens, config, seed=0):
    run = jax.jit(lambda p, x, s: generate(model, p, x, config, s))
    return np.asarray(run(params, image_tokens, jnp.uint32(seed)))


def test_greedy_takes_the_best_token_of_the_uncached_decoder():
    model, params, image_tokens, decode = model_and_images(SMALL)
    length, least = 9, 4
    got = write(model, params, image_tokens, GenerationConfig(max_length=length, min_length=least))
    ids = np.zeros((8, SMALL.text.context_length), np.int32)
    ids[:, 0], done = BEGIN, np.zeros(8, bool)
    for place in range(length - 1):
        logits = np.array(decode(params, ids, image_tokens)[:, place])
        if place + 1 < least:
            logits[:, END] = -np.inf
        chosen = np.full(8, END) if place + 2 == length else logits.argmax(1)
        ids[:, place + 1] = np.where(done, PAD, chosen)
        done |= np.isin(ids[:, place + 1], [PAD, END])
    np.testing.assert_array_equal(got, ids[:, :length])


def test_captions_of_a_tokenizer_without_a_begin_start_with_the_decoders_own_id():
    """The start is no part of the captions, which have one token less."""
    tokenizer = replace(CAPPA.text.tokenizer, file="words.json", end_id=END, pad_id=PAD)
    text = replace(CAPPA.text, tokenizer=tokenizer, pool="last", depth=1)
    config = replace(CAPPA, text=text, decoder=replace(CAPPA.decoder, depth=1))
    model, params, image_tokens, decode = model_and_images(config)
    length = 6
    ids, done = np.zeros((8, text.context_length), np.int32), np.zeros(8, bool)
    for place in range(length - 1):
        logits = np.array(decode(params, ids, image_tokens)[:, place])
        if place == 0:
            logits[:, END] = -np.inf  # no empty caption
        chosen = np.full(8, END) if place == length - 2 else logits.argmax(1)
        ids[:, place] = np.where(done, PAD, chosen)
        done |= np.isin(ids[:, place], [PAD, END])
    limits = {"max_length": length, "min_length": 2}
    got = write(model, params, image_tokens, GenerationConfig(**limits))
    np.testing.assert_array_equal(got, ids[:, :length])
    beams = write(model, params, image_tokens, GenerationConfig(method="beams", **limits))
    ends = (beams == END).argmax(1)
    assert (ends > 0).all()
    for row, end in zip(beams, ends, strict=True):
        assert not np.isin(row[:end], [PAD, END]).any()
        assert (row[end + 1 :] == PAD).all()


def test_beams_find_the_best_of_all_captions():
    model, params, image_tokens, decode = model_and_images(TOY)
    length, least, penalty = 5, 3, 0.7
    captions = [
        (4, *words, 5, *(PAD,) * (length - count - 2))
        for count in range(least - 1, length - 1)
        for words in itertools.product([1, 2, 3, 4], repeat=count)
    ]
    rows = np.array(captions, np.int32)
    limits = {"max_length": length, "min_length": least, "length_penalty": penalty}
    config = GenerationConfig(method="beams", beams=4 ** (length - 2), **limits)
    got = write(model, params, image_tokens, config)
    for image in range(8):
        tokens = jnp.repeat(image_tokens[image : image + 1], len(rows), axis=0)
        logits = decode(params, rows, tokens)
        gains = np.asarray(jax.nn.log_softmax(logits))
        gains = np.take_along_axis(gains, rows[:, 1:, None], axis=2)[..., 0]
        is_written = rows[:, 1:] != PAD
        scores = np.where(is_written, gains, 0).sum(1) / is_written.sum(1) ** penalty
        np.testing.assert_array_equal(got[image], rows[scores.argmax()])


def test_one_beam_of_any_length_is_greedy_where_the_end_is_far():
    model, params, image_tokens, _ = model_and_images(SMALL)
    kernel = params["decoder"]["vocab_projection"].at[:, END].set(0)
    params = params | {"decoder": params["decoder"] | {"vocab_projection": kernel}}
    limits = {"max_length": 6, "min_length": 5}
    greedy = write(model, params, image_tokens, GenerationConfig(**limits))
    beam = write(model, params, image_tokens, GenerationConfig(method="beams", beams=1, **limits))
    np.testing.assert_array_equal(beam[:, :5], greedy[:, :5])


def test_draws_depend_on_the_seed_alone():
    model, params, image_tokens, _ = model_and_images(SMALL)
    config = GenerationConfig(method="sample", max_length=9, top_k=5, top_p=0.9, temperature=0.8)
    run = jax.jit(lambda p, x, s: generate(model, p, x, config, s))
    got = run(params, image_tokens, jnp.uint32(0))
    np.testing.assert_array_equal(run(params, image_tokens, jnp.uint32(0)), got)
    assert (run(params, image_tokens, jnp.uint32(1)) != got).any()
    # The other images of the batch make no difference.
    np.testing.assert_array_equal(run(params, image_tokens[::-1], jnp.uint32(0)), got[::-1])
    # Each row may have its own seed, also on a mesh.
    seeds = jnp.array([0, 1, 1, 7, 0, 2**32 - 1, 1, 3], jnp.uint32)
    single = np.stack([run(params, image_tokens, seed)[row] for row, seed in enumerate(seeds)])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    split = jax.device_put(image_tokens, rows)
    np.testing.assert_array_equal(run(params, split, jax.device_put(seeds, rows)), single)
