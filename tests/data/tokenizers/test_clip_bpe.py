"""CLIP's tokenizer: ids of OpenAI's tokenizer, truncation, limits, smaller vocabularies."""

import functools
import itertools
import pickle
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clip_jax.data.tokenizers import clip_bpe
from clip_jax.data.tokenizers.clean import CLEANING
from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer
from clip_jax.errors import InputError

TOKENIZER = ClipTokenizer()

# By openai-clip 1.0.1; tests/reference/test_tokenizer.py compares many more with it.
GOLDEN = {
    "": [],
    "a diagram": [320, 22697],
    "a photo of a dog, a type of pet.": [320, 1125, 539, 320, 1929, 267, 320, 3877, 539, 3703, 269],
    "It's 42 o'clock": [585, 568, 275, 273, 334, 262, 6716],
    "schÃ¶n &amp;amp; 🐈": [844, 7255, 333, 261, 2074, 486],
    "<|endoftext|>": [49407],
}


def test_golden_ids():
    rows = TOKENIZER([*GOLDEN])
    assert rows.dtype == np.int32
    assert rows.shape == (len(GOLDEN), 77)
    for row, (text, expected) in zip(rows, GOLDEN.items(), strict=True):
        assert row[: len(expected) + 2].tolist() == [49406, *expected, 49407], text
        assert not row[len(expected) + 2 :].any()
        np.testing.assert_array_equal(TOKENIZER(text)[0], row)
    assert TOKENIZER([], context_length=5).shape == (0, 5)
    assert TOKENIZER("dog " * 6, context_length=8)[0, -1] == 49407  # fits exactly


@pytest.mark.parametrize(
    ("piece", "count"),
    [
        *(("dog ", 100), ("dog", 5_000), ("<|endoftext|>", 100), ("é", 300)),
        ("a long story ", 100_000),
        ("z", 500_000),  # quadratic in OpenAI's
    ],
)
def test_truncation_keeps_the_end_of_text(piece, count):
    row = TOKENIZER(piece * count, truncate=True)[0]
    assert row[0] == TOKENIZER.start_of_text
    assert row[-1] == TOKENIZER.end_of_text
    longer = TOKENIZER(piece * count, 1_000, truncate=True)[0]
    np.testing.assert_array_equal(row[:-1], longer[:76])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TOKENIZER("dog " * 7, 8), r"(?s)'dog dog.*context_length=8.*truncate"),
        (lambda: TOKENIZER("dog " * 10_000, 8), "context_length=8"),
        (lambda: TOKENIZER("a dog", 1), "context_length=1 must be at least 2, for start and end"),
        # What a CSV reader gives for an empty cell.
        (lambda: TOKENIZER._encode(float("nan"), 77), "must be a str, not float"),
        (lambda: ClipTokenizer(513), "vocab_size=513.*514.*49408"),
        (lambda: ClipTokenizer(49_409), "vocab_size=49409.*514.*49408"),
    ],
)
def test_wrong_use(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call()
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("size", [514, 2_000, 49_408])
def test_a_smaller_vocabulary_is_the_beginning_of_the_full_one(size):
    small = ClipTokenizer(size)
    assert len(small.vocab) == size
    assert list(small.vocab.values()) == list(range(size))
    assert len(small.merges) == size - 514
    assert list(small.vocab)[:-2] == list(TOKENIZER.vocab)[: size - 2]
    assert (small.start_of_text, small.end_of_text) == (size - 2, size - 1)


WORDS = (
    "a photo of don't WE'LL Café straße ΣΑΣ İstanbul 1,234.50 x² 日本語 हिन्दी &amp; <b> 😀 👩‍👩‍👧 "
    "schÃ¶n " + "x" * 70
).split()
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(max_size=6), max_size=8).map(" ".join)
SIZES = (514, 600, 2_000, 49_408)
OF_SIZE = {size: ClipTokenizer(size) for size in SIZES}


@functools.cache
def ranks(size):
    return {pair: rank for rank, pair in enumerate(OF_SIZE[size].merges)}


def pieces_of(text):
    words = CLEANING["clip"](text).split()
    return [piece for word in words for piece in clip_bpe._PIECES.findall(word)]


def merged(piece, size):
    """Return the tokens of a piece: merge the neighbours of lowest rank, as long as possible."""
    *letters, last = [clip_bpe._LETTERS[byte] for byte in piece.encode()]
    tokens = [*letters, f"{last}</w>"]
    while pairs := ranks(size).keys() & {*itertools.pairwise(tokens)}:
        first = min(pairs, key=ranks(size).__getitem__)
        joined = []
        for token in tokens:
            if joined and (joined[-1], token) == first:
                joined[-1] += token
            else:
                joined.append(token)
        tokens = joined
    return tokens


@example(texts=["don't a Café", "x" * 70], size=49_408, length=12)
@given(texts=st.lists(TEXTS, max_size=3), size=st.sampled_from(SIZES), length=st.integers(2, 24))
@mock.patch.object(clip_bpe, "_MAX_CACHED_WORDS", 3)
def test_ids_are_those_of_a_simple_implementation(texts, size, length):
    """Whatever the cache holds. Decoding returns the text. Truncated ids end with the end token."""
    tokenizer = OF_SIZE[size]
    rows, vocab = tokenizer(texts, length, truncate=True), tokenizer.vocab
    for text, row in zip(texts, rows, strict=True):
        pieces = pieces_of(text)
        tokens = [token for piece in pieces for token in merged(piece, size)]
        complete = [size - 2, *(vocab[token] for token in tokens), size - 1]
        if len(complete) > length:
            assert row.tolist() == [*complete[: length - 1], size - 1]
            with pytest.raises(InputError, match=f"context_length={length}"):
                tokenizer(text, length)
        else:
            assert row.tolist() == complete + [0] * (length - len(complete))
            assert tokenizer.decode(row) == " ".join(pieces)
            np.testing.assert_array_equal(tokenizer(text, length), row[None])
    assert len(tokenizer._cache) <= 3
    assert all(len(word) <= 64 for word in tokenizer._cache)


def test_pickles_small_and_equal():
    TOKENIZER("a dog")
    data = pickle.dumps(TOKENIZER)
    assert len(data) < 200
    copy = pickle.loads(data)
    assert copy == TOKENIZER
    np.testing.assert_array_equal(copy("a photo of a dog"), TOKENIZER("a photo of a dog"))


def test_decode_ends_at_the_end_of_text():
    ids = TOKENIZER("A  photo of\ta CAT, it's 10 o'clock")[0]
    assert TOKENIZER.decode(ids) == "a photo of a cat , it 's 1 0 o ' clock"
    assert TOKENIZER.decode(ids[1:4]) == "a photo of"
    assert TOKENIZER.decode([49406]) == ""
