"""`Model` as a library: any number of rows, few compilations, all devices."""

import dataclasses

import jax
import numpy as np
import pytest

from clip_jax.convert.weights import default_inputs
from clip_jax.load import Model, _encode, padded_size
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

TINY = CLIPConfig(
    embed_dim=16,
    vision=ViTConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2),
    text=TextConfig(vocab_size=520, context_length=10, width=32, depth=2, num_heads=2),
    dtype="float32",
)


@pytest.fixture(scope="module")
def model():
    params = jax.jit(CLIP(TINY).init)(jax.random.key(0))
    return Model(TINY, params, *default_inputs(TINY))


@pytest.mark.parametrize("count", [0, 1, 3, 8, 37])
def test_any_number_of_rows_equals_the_pure_function(model, count):
    rng = np.random.default_rng(count)
    images = rng.normal(size=(count, 16, 16, 3)).astype(np.float32)
    tokens = rng.integers(0, 520, (count, 10)).astype(np.int32)
    for found, method, rows in (
        (model.encode_image(images, batch_size=16), model.clip.encode_image, images),
        (model.encode_text(tokens, batch_size=16), model.clip.encode_text, tokens),
    ):
        assert isinstance(found, jax.Array)
        assert found.shape == (count, 16)
        if count:
            expected = jax.jit(method)(model.params, jax.numpy.asarray(rows))
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_few_shapes_are_compiled(model):
    """On 8 devices, 33 lengths up to 32 need the sizes 8, 16 and 32."""
    assert len(jax.local_devices()) == 8
    _encode.clear_cache()
    for count in range(33):
        model.encode_text(np.ones((count, 10), np.int32), batch_size=32)
    assert _encode._cache_size() == 3


def test_every_device_takes_its_share(model):
    mesh, params = model._placed
    assert mesh.size == len(jax.local_devices())
    assert all(len(x.sharding.device_set) == mesh.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("rows", "shards", "batch_size", "expected"),
    [(1, 1, 64, 1), (3, 1, 64, 4), (33, 1, 64, 64), (50, 1, 50, 50), (9, 8, 64, 16), (5, 8, 5, 8)],
)
def test_padded_sizes(rows, shards, batch_size, expected):
    assert padded_size(rows, shards, batch_size) == expected


def test_bfloat16_is_close(model):
    half = dataclasses.replace(model, config=dataclasses.replace(TINY, dtype="bfloat16"))
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    exact, rounded = np.asarray(model.encode_image(images)), np.asarray(half.encode_image(images))
    assert 1e-6 < np.linalg.norm(exact - rounded) / np.linalg.norm(exact) < 2e-2


def test_a_terminal_sees_progress_of_long_lists_alone(model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    rows = np.ones((80, 10), np.int32)
    model.encode_text(rows, batch_size=40)
    assert not capsys.readouterr().err
    model.encode_text(rows, batch_size=8)
    printed = capsys.readouterr()
    assert "encode_text" in printed.err
    assert not printed.out


def test_a_batch_size_of_none_is_refused(model):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        model.encode_text(np.ones((1, 10), np.int32), batch_size=0)
