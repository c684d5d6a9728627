"""Held-out pairs during training: the same numbers each time and on every mesh."""

import jax
import numpy as np
import pytest

from clip_jax import sharding
from clip_jax.config import Config
from clip_jax.data.pipeline import DataConfig
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.pairs import PairsEvalConfig
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.serialize import from_dict, to_dict
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig


def test_any_mesh_gives_the_same_numbers():
    model = CLIP(
        CLIPConfig(
            embed_dim=16,
            vision=ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2),
            text=TextConfig(vocab_size=600, context_length=16, width=16, depth=1, num_heads=2),
            dtype="float32",
        )
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    evaluator = PairsEvalConfig(pairs=37, pool=13).make()
    values = []
    for devices in (1, 8, 8):
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:devices])
        placed = jax.device_put(params, sharding.replicated(mesh))
        values.append(dict(evaluator.run(model, placed, mesh)))
    assert values[1] == values[2]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert 1 < values[0]["info_nce"] < 5
    assert {"modality_gap", "image_retrieval_recall@5"} <= values[0].keys()


def test_a_run_may_have_both_kinds():
    config = Config(evals=(DigitsEvalConfig(), PairsEvalConfig(pool=64, every_steps=5)))
    assert from_dict(Config, to_dict(config)) == config


def test_wrong_values_are_explained():
    with pytest.raises(ValueError, match="pool=9 must be from 2 to pairs=8"):
        PairsEvalConfig(pairs=8, pool=9)
    with pytest.raises(ValueError, match="must be 'center'"):
        PairsEvalConfig(data=DataConfig())
