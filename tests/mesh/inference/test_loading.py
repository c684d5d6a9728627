"""Captions by a loaded model."""

import numpy as np

from clip_jax.convert.weights import default_preprocess
from clip_jax.inference.loading import Model
from clip_jax.models.generation import GenerationConfig
from tests.conftest import COCA, parameters


def test_drawn_captions_depend_on_the_seed():
    writer = Model(COCA, parameters(COCA), default_preprocess(COCA))
    images = np.zeros((8, 16, 16, 3), np.float32)
    first, second = (
        writer.caption(images, GenerationConfig(method="sample", seed=seed)) for seed in (0, 1)
    )
    assert first != second
    seeds = np.array([0, 1] * 4, np.uint32)
    mixed = writer.caption(images, GenerationConfig(method="sample"), seeds=seeds)
    assert mixed == [(first, second)[seed][row] for row, seed in enumerate(seeds)]
