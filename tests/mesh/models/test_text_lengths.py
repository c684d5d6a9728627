"""Texts in groups by length have the loss and the gradients of full padding, on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clip_jax.convert.weights import default_preprocess
from clip_jax.inference.loading import Model
from clip_jax.losses import SoftmaxConfig
from clip_jax.models.clip import CLIP
from clip_jax.models.text_lengths import TextLengths
from clip_jax.pods.collectives import collectives
from tests.conftest import FAMILIES, OPTIM, TINY, assert_close, batch, parameters
from tests.mesh.conftest import compiled

HALVES = TextLengths(tokens=(4, 10), shares=(0.5, 0.5))
THIRDS = TextLengths(tokens=(3, 6, 9), shares=(0.25, 0.25, 0.5))
RING = (SoftmaxConfig(form="ring", mask_same_caption=True),)
XLM_R = dataclasses.replace(TINY, text=FAMILIES["xlm_roberta"].text)


def texts(config, short, rows=32):
    """Return token ids; of every four texts, the first `short` have at most three tokens, and all
    have at most nine."""
    rng = np.random.default_rng(1)
    text, pad = config.text, config.text.tokenizer.pad_id if config.text.masks_padding else 0
    tokens = rng.integers(2, 517, (rows, text.context_length), np.int32)
    for row, length in zip(tokens, rng.integers(5, 10, rows), strict=True):
        row[length - 1], row[length:] = 519, pad
    for start in range(short):
        for row, length in zip(tokens[start::4], rng.integers(2, 4, rows), strict=False):
            row[length - 1], row[length:] = 519, pad
    return tokens


def take(step, tokens):
    """Take one step with these texts."""
    values = batch(step.config, len(tokens)) | {"text": tokens}
    return jax.device_get(step.compiled(step.start(), step.program.put(values)))


def check_equal(expected, got):
    """Compare loss and gradients, which are read from Adam's first moment."""
    (a, metrics), (b, got_metrics) = expected, got
    assert got_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    gradients = (optax.tree.get(x.opt_state, "mu") for x in (a, b))
    expected, got = (jax.tree.map(lambda x: x / (1 - OPTIM.b1), each) for each in gradients)
    assert_close(expected, got)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), expected, got)


@pytest.mark.parametrize(
    ("config", "mesh", "lengths", "options"),
    [
        (TINY, "1", THIRDS, {"accumulation": 2}),
        (TINY, "8", HALVES, {"objective": RING, "accumulation": 2}),
        (TINY, "4x2", HALVES, {"objective": RING}),
        (XLM_R, "2x2x2", THIRDS, {}),
    ],
    ids=["accumulated", "ring, accumulated", "ring", "XLM-R"],
)
def test_groups_by_length_take_the_step_of_full_padding(config, mesh, lengths, options):
    """So do texts that do not fit their groups, by full padding within the same program."""
    full = compiled(config, batch_size=32)
    step = compiled(config, mesh, batch_size=32, text_lengths=lengths, **options)
    for short, full_padding in ((2, 0), (1, 1)):
        tokens = texts(config, short)
        got = take(step, tokens)
        assert got[1]["full_padding"] == full_padding
        check_equal(take(full, tokens), got)
    moved = collectives(step.compiled.as_text(), dict(step.program.mesh.shape))
    # The text tower's ids stay on their device, but devices along fsdp share the embedding table.
    of_tower = [x for x in moved if not x.part.startswith("loss") and x.axes != ("fsdp",)]
    assert not [x for x in of_tower if any(dtype == "s32" for dtype, _ in x.arrays)]


def test_inference_embeds_short_texts_by_less_padding_as_by_all():
    config = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, context_length=40))
    params = jax.tree.map(jnp.asarray, parameters(config))
    model = Model(config, params, default_preprocess(config))
    tokens = np.pad(texts(TINY, short=2, rows=8), [(0, 0), (0, 30)])
    assert config.text.shortened(tokens).shape == (8, 32)
    full = jax.jit(CLIP(config).encode_text)(params, tokens)
    assert_close({"": np.asarray(full)}, {"": np.asarray(model.encode_text(tokens))})
