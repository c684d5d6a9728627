"""Held-out pairs during training; `test_evaluator` has what they share on every mesh."""

import jax
import numpy as np
import pytest

from clip_jax import sharding
from clip_jax.config import Config
from clip_jax.data.images import Preprocess
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.tokenizers.clip import ClipTokenizer
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.pairs import PairsEvalConfig
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.serialize import from_dict, to_dict


def test_the_numbers_are_the_same_each_time():
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
    mesh = sharding.make_mesh(sharding.MeshConfig())
    placed = jax.device_put(params, sharding.replicated(mesh))
    tokenizer = ClipTokenizer(600)
    encoder = Encoder(
        model, placed, mesh, Preprocess(image_size=16), lambda texts: tokenizer(texts, 16, True)
    )
    first, second = (dict(evaluator.run(encoder)) for _ in range(2))
    assert first == second
    assert 1 < first["info_nce"] < 5
    assert {"modality_gap", "image_retrieval_recall@5"} <= first.keys()


def test_a_run_may_have_both_kinds():
    config = Config(evals=(DigitsEvalConfig(), PairsEvalConfig(pool=64, every_steps=5)))
    assert from_dict(Config, to_dict(config)) == config


def test_wrong_values_are_explained():
    with pytest.raises(ValueError, match="pool=9 must be at most pairs=8"):
        PairsEvalConfig(pairs=8, pool=9)
    with pytest.raises(ValueError, match="must be 'center'"):
        PairsEvalConfig(data=DataConfig())
