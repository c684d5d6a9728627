"""Held-out pairs during training: their numbers, by definition and the same each time."""

import numpy as np
import pytest

from clip_jax.data.batch_plan import constant
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.pipeline import DataConfig, build
from clip_jax.errors import InputError
from clip_jax.evals.held_out_pairs import PairsEvalConfig, info_nce
from clip_jax.evals.retrieval import retrieval
from clip_jax.models.images import Square
from tests.data import conftest as made
from tests.evals.conftest import encoder_on, mesh_of, unit


def test_the_numbers_are_those_of_the_first_pairs_each_time():
    mesh = mesh_of(8)
    encoder = encoder_on(mesh)
    evaluator = PairsEvalConfig(pairs=37, pool=13).make()
    first, second = (dict(evaluator.run(encoder)) for _ in range(2))
    assert first == second
    captions: list[str] = []
    # One thread: so captions are tokenized in their order.
    data = DataConfig(source=DigitsConfig(split="test"), crop="center", threads=1)
    batches = build(
        data,
        constant(37, Square(16)),
        tokenizer=lambda texts, *_: captions.extend(texts) or encoder.tokenize(texts),
        context_length=16,
    ).batches()
    images, texts = encoder.images(next(batches).image), encoder.texts(captions[:37])
    batches.close()
    expected = {"info_nce": info_nce(images, texts, encoder.logit_scale, 13)}
    expected |= retrieval(images, texts, np.arange(37), mesh)
    assert first == pytest.approx(expected, rel=1e-5)
    assert 1 < first["info_nce"] < 5


def test_a_name_tells_the_metrics_of_two_sources_apart():
    """Without one, the metrics of the second would replace those of the first."""
    encoder = encoder_on(mesh_of(8))
    own, named = (
        dict(PairsEvalConfig(pairs=37, pool=13, name=name).make().run(encoder))
        for name in ("", "web")
    )
    assert named == {f"web/{metric}": value for metric, value in own.items()}
    with pytest.raises(InputError, match=r"evals\.name='a/b' must consist of letters"):
        PairsEvalConfig(name="a/b")


def test_more_pairs_than_there_are_would_come_twice_in_one_pool(tmp_path):
    data = DataConfig(source=made.table(tmp_path, made.make_pairs(20)), crop="center")
    with pytest.raises(InputError, match=r"evals\.pairs=21, but their source has 20; set"):
        PairsEvalConfig(data=data, pairs=21, pool=20).make()


def test_wrong_values_are_explained():
    with pytest.raises(ValueError, match=r"evals\.pool=9 must be at most evals\.pairs=8"):
        PairsEvalConfig(pairs=8, pool=9)
    with pytest.raises(ValueError, match="must be 'center'"):
        PairsEvalConfig(data=DataConfig())


def textbook_loss(images, texts, scale):
    logits = scale * images.astype(np.float64) @ texts.T.astype(np.float64)
    sums = [np.log(np.exp(logits).sum(axis=axis)) for axis in (0, 1)]
    return float((sum(sums) / 2 - np.diag(logits)).mean())


def test_info_nce_is_the_mean_of_full_pools():
    """Of 53 pairs, one is in none."""
    rng = np.random.default_rng(0)
    images = unit(rng.standard_normal((53, 12)) + 0.5)
    texts = unit(images + 0.7 * rng.standard_normal((53, 12)))
    pools = [slice(a, a + 13) for a in (0, 13, 26, 39)]
    expected = np.mean([textbook_loss(images[pool], texts[pool], 10.0) for pool in pools])
    assert info_nce(images, texts, 10.0, 13) == pytest.approx(expected, rel=1e-5)
