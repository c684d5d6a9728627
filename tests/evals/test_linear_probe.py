"""Probes against scikit-learn in float64, whatever the mesh."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from clip_jax.errors import InputError
from clip_jax.evals import linear_probe as probe
from clip_jax.evals.evaluator import encode_images
from clip_jax.models.clip import CLIP
from tests.evals.conftest import SMALL, drawn, mesh_of


@pytest.fixture(scope="module")
def digits():
    """Features and labels to train on, to choose by, and to test on."""
    scans, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    scans, labels = scans[order].astype(np.float32) / 16, labels[order]
    return [(scans[a:b], labels[a:b]) for a, b in ((0, 301), (301, 501), (501, 1_001))]


def objective(features, labels, weights, bias, strength):
    """In float64, whoever found the weights."""
    logits = features.astype(np.float64) @ weights.astype(np.float64) + bias
    shifted = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - np.take_along_axis(shifted, labels[:, None], 1)[:, 0]
    return losses.sum() + strength / 2 * np.square(weights.astype(np.float64)).sum()


@pytest.mark.parametrize(
    ("strength", "mesh"), [(1e-3, mesh_of(1)), (10.0, mesh_of(8, data=2, fsdp=2, tensor=2))]
)
def test_the_optimum_is_scikit_learns(digits, strength, mesh):
    train, _, test = digits
    model = LogisticRegression(C=1 / strength, tol=1e-8, solver="newton-cholesky")
    model.fit(train[0].astype(np.float64), train[1])
    best = objective(*train, model.coef_.T, model.intercept_, strength)
    ours = probe.Problem(*train, mesh).fit(strength)
    assert objective(*train, ours.weights, ours.bias, strength) == pytest.approx(best, rel=1e-5)
    assert ours.objective == pytest.approx(best, rel=1e-4)  # what float32 knows of its own value
    assert abs(ours.accuracy(*test) - model.score(*test)) <= 0.002  # one image


def test_the_search_ends_at_the_best_of_the_grid(digits):
    train, validation, _ = digits
    grid = np.logspace(-1, 4, 12)
    problem = probe.Problem(*train, mesh_of(1))
    accuracies = [problem.fit(float(x)).accuracy(*validation) for x in grid]
    best = probe.search(train, validation, mesh_of(1), lambdas=grid)
    assert accuracies[list(grid).index(best)] == max(accuracies)
    assert min(accuracies) < max(accuracies)
    some, none = ((np.eye(4, dtype=np.float32)[:n], np.arange(n)) for n in (4, 0))
    assert probe.search(some, some, mesh_of(1), lambdas=[0.1, 1, 10]) == 10  # all are right
    with pytest.raises(InputError, match="there are none"):
        probe.search(some, none, mesh_of(1))


def test_few_per_class_draws_evenly_and_names_what_is_scarce():
    labels = np.array([0, 3, 3, 0, 1, 1, 1, 3])
    some = probe.few_per_class(labels, 2, np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(labels[some]), [2, 2, 0, 2])
    assert len(set(some)) == len(some)
    with pytest.raises(ValueError, match="class 0 has 2 samples, 3 are asked for"):
        probe.few_per_class(labels, 3, np.random.default_rng(0))


@pytest.mark.parametrize(("devices", "k"), [(1, 1), (8, 20)])
def test_nearest_neighbours_are_scikit_learns(digits, devices, k):
    train, _, test = digits
    theirs = KNeighborsClassifier(k, metric="cosine").fit(*train).predict(test[0])
    ours = probe.nearest_neighbours(train, test[0], mesh_of(devices), k=k, batch_size=100)
    assert (ours == theirs).mean() > 0.997  # equal distances may go either way
    assert 0.85 < (ours == test[1]).mean() < 1


def test_probe_features_stand_before_the_projection():
    model, mesh, rng = CLIP(SMALL), mesh_of(2), np.random.default_rng(0)
    params, images = drawn(), rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
    features = probe.probe_features(model, params, images, mesh)
    assert features.shape == (5, 32)
    projected = features @ np.asarray(params["visual"]["proj"])
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    np.testing.assert_allclose(
        projected, encode_images(model, params, images, mesh), rtol=1e-4, atol=1e-6
    )
