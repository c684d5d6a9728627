"""Probes against scikit-learn in float64, and the same numbers on every mesh."""

import time

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from clip_jax import sharding
from clip_jax.evals import linear_probe as probe
from clip_jax.evals.evaluator import encode_images
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig


def mesh_of(devices, **sizes):
    return sharding.make_mesh(sharding.MeshConfig(**sizes), jax.devices()[:devices])


@pytest.fixture(scope="module")
def digits():
    scans, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    scans, labels = scans[order].astype(np.float32) / 16, labels[order]
    return [(scans[a:b], labels[a:b]) for a, b in ((0, 901), (901, 1_301), (1_301, 1_797))]


def reference(features, labels, strength, **options):
    model = LogisticRegression(C=1 / strength, tol=1e-8, max_iter=20_000, **options)
    model.fit(features.astype(np.float64), labels)
    return model, objective(features, labels, model.coef_.T, model.intercept_, strength)


def objective(features, labels, weights, bias, strength):
    """In float64, whoever found the weights."""
    logits = features.astype(np.float64) @ weights.astype(np.float64) + bias
    shifted = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - np.take_along_axis(shifted, labels[:, None], 1)[:, 0]
    return losses.sum() + strength / 2 * np.square(weights.astype(np.float64)).sum()


@pytest.mark.long
@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0, 1e4])
def test_the_optimum_is_scikit_learns(digits, strength):
    train, _, test = digits
    model, best = reference(*train, strength, solver="newton-cholesky")
    ours = probe.Problem(*train, mesh_of(8)).fit(strength)
    assert objective(*train, ours.weights, ours.bias, strength) == pytest.approx(best, rel=1e-5)
    assert ours.objective == pytest.approx(best, rel=1e-4)  # what float32 knows of its own value
    assert abs(ours.accuracy(*test) - model.score(*test)) <= 0.001


def test_any_mesh_gives_the_same_probe(digits):
    one = probe.Problem(*digits[0], mesh_of(1)).fit(1.0)
    other = probe.Problem(*digits[0], mesh_of(8, data=2, fsdp=2, tensor=2)).fit(1.0)
    assert other.objective == pytest.approx(one.objective, rel=1e-6)
    np.testing.assert_array_equal(one.predict(digits[2][0]), other.predict(digits[2][0]))


def test_the_search_ends_at_the_best_of_the_grid(digits):
    train, validation, _ = digits
    grid = np.logspace(-3, 4, 12)
    problem = probe.Problem(*train, mesh_of(1))
    accuracies = [problem.fit(float(x)).accuracy(*validation) for x in grid]
    found = probe.search(train, validation, mesh_of(1), lambdas=grid)
    assert accuracies[list(grid).index(found)] == max(accuracies)
    assert min(accuracies) < max(accuracies)


def test_few_per_class_draws_evenly_and_names_what_is_scarce():
    labels = np.array([0, 3, 3, 0, 1, 1, 1, 3])
    some = probe.few_per_class(labels, 2, np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(labels[some]), [2, 2, 0, 2])
    assert len(set(some)) == len(some)
    with pytest.raises(ValueError, match="class 0 has 2 samples, 3 are asked for"):
        probe.few_per_class(labels, 3, np.random.default_rng(0))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("k", [1, 20])
def test_nearest_neighbours_are_scikit_learns(digits, devices, k):
    train, _, test = digits
    theirs = KNeighborsClassifier(k, metric="cosine").fit(*train).predict(test[0])
    ours = probe.nearest_neighbours(train, test[0], mesh_of(devices), k=k, batch_size=100)
    assert (ours == theirs).mean() > 0.997  # equal distances may go either way
    assert 0.9 < (ours == test[1]).mean() < 1


def test_probe_features_stand_before_the_projection():
    config = CLIPConfig(
        embed_dim=8,
        vision=ViTConfig(image_size=8, patch_size=4, width=16, depth=1, num_heads=2),
        text=TextConfig(vocab_size=600, context_length=8, width=16, depth=1, num_heads=2),
        dtype="float32",
    )
    model, mesh, rng = CLIP(config), mesh_of(8), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    images = rng.integers(0, 256, (5, 8, 8, 3), np.uint8)
    features = probe.probe_features(model, params, images, mesh)
    assert features.shape == (5, 16)
    projected = features @ np.asarray(params["visual"]["proj"])
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    np.testing.assert_allclose(
        projected, encode_images(model, params, images, mesh), rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_large_problem_is_solved_twice_as_fast():
    """20,000 × 512, 100 classes, one grid of λ, to the same objective, compilation included."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((100, 512)) * 0.25
    labels = rng.integers(0, 100, 24_000)
    mixing = rng.standard_normal((512, 512)) / 512**0.5
    features = ((centres[labels] + rng.standard_normal((24_000, 512))) @ mixing).astype(np.float32)
    train, test = (features[:20_000], labels[:20_000]), (features[20_000:], labels[20_000:])
    grid = np.logspace(3, 0, 4)

    start = time.perf_counter()
    problem = probe.Problem(*train, mesh_of(1))
    ours = [problem.fit(float(strength)) for strength in grid]
    our_seconds = time.perf_counter() - start

    start = time.perf_counter()
    theirs = [reference(*train, strength) for strength in grid]
    their_seconds = time.perf_counter() - start

    print(f"\nours {our_seconds:.1f} s, scikit-learn {their_seconds:.1f} s")
    for strength, our, (model, best) in zip(grid, ours, theirs, strict=True):
        gap = objective(*train, our.weights, our.bias, strength) / best - 1
        print(f"lambda {strength:g}: {our.steps} steps, relative gap {gap:.1e}")
        assert gap < 1e-5
        assert abs(our.accuracy(*test) - model.score(*test)) <= 0.001
    assert their_seconds > 2 * our_seconds
