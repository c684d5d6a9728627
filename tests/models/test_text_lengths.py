"""Texts in groups by length: sizes, order, and groups proposed for a distribution of lengths."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.errors import InputError
from clip_jax.models.text_lengths import TextLengths
from tests.conftest import FAMILIES, TINY

THIRDS = TextLengths(tokens=(2, 4, 6), shares=(0.5, 0.25, 0.25))


@pytest.mark.parametrize(
    ("tokens", "shares"),
    [((4, 4), (0.5, 0.5)), ((8, 4), (0.5, 0.5)), ((4, 8), (0.5,)), ((4, 8), (0.5, 0.4)), ((), ())],
)
def test_lengths_ascend_and_shares_add_up_to_one(tokens, shares):
    with pytest.raises(InputError, match="must be in ascending order"):
        TextLengths(tokens=tokens, shares=shares)


def test_longer_groups_have_what_rounding_leaves():
    assert THIRDS.sizes(8) == [4, 2, 2]
    assert THIRDS.sizes(7) == [3, 2, 2]
    assert THIRDS.sizes(1) == [0, 0, 1]
    assert THIRDS.mean(lambda tokens: 100 * tokens) == 350


@given(st.lists(st.integers(1, 6), min_size=8, max_size=8), st.sampled_from([1, 2]))
def test_texts_that_fit_are_embedded_in_their_order_by_tokens_that_they_need(used, shards):
    used = np.array(used)
    devices = used.reshape(shards, -1)
    ends = np.repeat(THIRDS.tokens, THIRDS.sizes(devices.shape[1]))
    fit = bool(np.all(np.sort(devices) <= ends))
    assert bool(THIRDS.fit(jnp.asarray(devices))) == fit
    if not fit:
        return
    tokens = np.where(np.arange(6) < used[:, None], np.arange(1, 49).reshape(8, 6), 0)
    lengths = []

    def encode(group):
        lengths.append(group.shape)
        return group.sum(axis=1, keepdims=True).astype(jnp.float32)

    sums = THIRDS.embed(encode, jnp.asarray(tokens), jnp.asarray(used), shards)
    np.testing.assert_array_equal(sums, tokens.sum(axis=1, keepdims=True))
    assert lengths == [(4, 2), (2, 4), (2, 6)]


def test_the_tokens_that_an_embedding_depends_on():
    tokens = np.array([[7, 519, 0, 0], [7, 8, 9, 519], [519, 7, 519, 0]])
    np.testing.assert_array_equal(TINY.text.used_tokens(tokens), [2, 4, 1])
    eos = dataclasses.replace(TINY.text, pool="eos", eos_token_id=9)
    np.testing.assert_array_equal(eos.used_tokens(tokens), [1, 3, 1])
    bert = FAMILIES["xlm_roberta"].text
    padded = np.where(tokens == 0, bert.tokenizer.pad_id, tokens)
    np.testing.assert_array_equal(bert.used_tokens(padded), [2, 4, 3])
    np.testing.assert_array_equal(bert.used_tokens(jnp.asarray(padded)), [2, 4, 3])


@pytest.mark.parametrize("texts", [32, 512])
def test_proposed_groups_fit_nearly_all_batches_and_cost_little(texts):
    rng = np.random.default_rng(0)
    captions = np.clip(rng.lognormal(np.log(13), 0.3, 20_000).round(), 4, 77).astype(int)
    costs = []
    for groups in (1, 2, 3, 4):
        lengths = TextLengths.propose(captions, texts=texts, context_length=77, groups=groups)
        assert lengths.tokens[-1] == 77
        assert len(lengths.tokens) <= groups
        assert sum(lengths.sizes(texts)) == texts
        batches = rng.choice(captions, (1_000, texts))
        longest = np.repeat(lengths.tokens, lengths.sizes(texts))
        assert (np.sort(batches) <= longest).all(axis=1).mean() >= 0.998
        costs.append(lengths.mean(float))
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == 77
    assert costs[2] < 0.4 * 77


def test_inference_pads_texts_to_one_of_few_lengths_unless_embeddings_depend_on_it():
    tower = dataclasses.replace(TINY.text, context_length=200)
    assert tower.inference_lengths == (32, 128, 200)
    tokens = np.zeros((2, 200), np.int32)
    for length, shortest in ((1, 32), (32, 32), (33, 128), (129, 200), (200, 200)):
        tokens[1, :length], tokens[1, length - 1] = 7, 519
        np.testing.assert_array_equal(tower.shortened(tokens), tokens[:, :shortest])
    assert TINY.text.shortened(tokens[:, :10]).shape == (2, 10)
    assert tower.shortened(tokens[:, :150]).shape == (2, 150)  # of another length already
    siglip = dataclasses.replace(tower, pool="last", causal=False)
    assert siglip.shortened(tokens * 0).shape == (2, 200)
