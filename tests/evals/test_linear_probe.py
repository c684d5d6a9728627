"""Probes against scikit-learn in float64, whatever the mesh; and on splits of a data set."""

import dataclasses
import functools
from unittest import mock

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from clip_jax.data.digits import DigitsConfig, evaluation_set, number_words
from clip_jax.errors import InputError
from clip_jax.evals import linear_probe as probe
from clip_jax.evals.datasets import Captioned, Labelled, Missing
from clip_jax.evals.evaluator import compiled, embed_for_probe
from clip_jax.evals.ranks import NotFinite
from clip_jax.evals.reader import Splits
from clip_jax.models.clip import CLIP
from clip_jax.sharding import in_batches
from tests.evals.conftest import SMALL, drawn, encoder_on, mesh_of


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
    grid = np.logspace(-1, 4, 12).tolist()
    problem = probe.Problem(*train, mesh_of(1))
    accuracies = [problem.fit(x).accuracy(*validation) for x in grid]
    best = probe.search(train, validation, mesh_of(1), lambdas=grid)
    assert accuracies[grid.index(best)] == max(accuracies)
    assert min(accuracies) < max(accuracies)
    some, none = ((np.eye(4, dtype=np.float32)[:n], np.arange(n)) for n in (4, 0))
    assert probe.search(some, some, mesh_of(1), lambdas=[0.1, 1, 10]) == 10  # all are right
    with pytest.raises(Missing, match="no training image can be spared"):
        probe.search(some, none, mesh_of(1))


def test_a_solution_that_is_not_finite_is_not_the_start_of_the_next(digits):
    """Each solution is the start of the next, so one NaN would spoil all that follow."""
    train, validation, _ = digits
    problem = probe.Problem(*train, mesh_of(1))
    assert not np.isfinite(problem.fit(np.nan).weights).any()
    assert problem.fit(1.0).accuracy(*validation) > 0.8
    with pytest.raises(NotFinite, match="200 of 200 rows of the logits of probes"):
        probe.search(train, validation, mesh_of(1), lambdas=[np.nan, np.nan])
    assert probe.search(train, validation, mesh_of(1), lambdas=[1.0, np.nan]) == 1


def test_few_per_class_draws_evenly():
    labels = np.array([0, 3, 3, 0, 1, 1, 1, 3])
    some = probe.few_per_class(labels, 2, np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(labels[some]), [2, 2, 0, 2])
    assert len(set(some)) == len(some)
    more = probe.few_per_class(labels, 3, np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(labels[more]), [2, 3, 0, 3])


@pytest.mark.parametrize(("devices", "k"), [(1, 1), (8, 20)])
def test_nearest_neighbours_are_scikit_learns(digits, devices, k):
    train, _, test = digits
    theirs = KNeighborsClassifier(k, metric="cosine").fit(*train).predict(test[0])
    votes = probe.neighbour_votes(train, test[0], mesh_of(devices), classes=10, k=k, batch_size=100)
    ours = votes.argmax(axis=1)  # of equal votes the smallest label, as theirs
    assert votes.sum(axis=1).tolist() == [k] * len(ours)
    assert (ours == theirs).mean() > 0.997  # equal distances may go either way
    assert 0.85 < (ours == test[1]).mean() < 1


def test_probe_features_stand_before_the_projection():
    model, mesh, rng = CLIP(SMALL), mesh_of(2), np.random.default_rng(0)
    params, images = drawn(), rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
    run = compiled(embed_for_probe, model, mesh)
    features = in_batches(run, mesh, params, images)
    assert features.shape == (5, 32)
    projected = features @ np.asarray(params["visual"]["proj"])
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    np.testing.assert_allclose(projected, encoder_on(mesh).images(images), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def encoder():
    """A small model of random weights, whose features still tell digits apart."""

    def tokens(texts):
        codes = [[1 + sum(map(ord, word)) % 590 for word in text.split()] for text in texts]
        return np.array([(row + [599] + [0] * 16)[:16] for row in codes], np.int32)

    return encoder_on(mesh_of(1), tokens, scale=0.3, mean=(0.5,) * 3, std=(1.0,) * 3)


@functools.cache
def drawn_digits(split):
    if split == "test":
        images, labels = evaluation_set(DigitsConfig(digits=1), range(10), 20, 16)
    else:
        images, labels = evaluation_set(DigitsConfig(digits=1), range(10), 40, 16, "training")
        chosen = slice(int(split == "train"), None, 2)
        images, labels = images[chosen], labels[chosen]
    names = [number_words(number, 1) for number in range(10)]
    return Labelled(
        len(labels),
        lambda i: (images[i], int(labels[i])),
        names,
        ["{c}", "a handwritten {c}"],
        labels.tolist(),
    )


SPLITS = ("train", "validation", "test")


def without_validation(split):
    if split == "validation":
        raise Missing("there is none")
    return drawn_digits(split)


@pytest.fixture
def search():
    """Probes try three λ, not 96."""
    few = functools.partial(probe.search, lambdas=[0.01, 1.0, 100.0])
    with mock.patch.object(probe, "search", autospec=True, side_effect=few) as fake:
        yield fake


def test_a_probe_of_one_class_is_refused(encoder):
    one = dataclasses.replace(drawn_digits("train"), count=1)
    splits = Splits("digits", {"train": one, "test": drawn_digits("test")}.__getitem__, encoder)
    with pytest.raises(InputError, match="have one class, of 10; probes and"):
        probe.neighbours(splits)


def test_every_number_is_what_scikit_learn_finds_on_the_same_features(encoder, search, capsys):
    splits = Splits("digits", drawn_digits, encoder)
    outcomes = probe.probe(splits), probe.few_shot(splits, (2, 40)), probe.neighbours(splits)
    values = {name: x for outcome in outcomes for name, x in outcome.values.items()}
    assert "digits: few-shot of 40 left out: a class has fewer" in capsys.readouterr().err
    names = {f"linear_probe/{x}" for x in ("acc1", "acc5", "mean_per_class_recall", "lambda")}
    assert set(values) == names | {"few_shot/2", "neighbours/acc1"}  # no class has 40
    train, validation, test = map(probe._part, 3 * [splits], SPLITS)
    assert train[0].shape[1] == 32  # before the projection
    both = [np.concatenate(pair) for pair in zip(train, validation, strict=True)]
    strength = values["linear_probe/lambda"]
    theirs = LogisticRegression(C=1 / strength, solver="newton-cholesky", tol=1e-8)
    theirs.fit(both[0].astype(np.float64), both[1])
    assert values["linear_probe/acc1"] == pytest.approx(theirs.score(*test), abs=0.001)
    votes = KNeighborsClassifier(20, metric="cosine").fit(*both)
    assert values["neighbours/acc1"] == pytest.approx(votes.score(*test), abs=0.011)
    of_probe = outcomes[0]
    assert of_probe.names == drawn_digits("test").names
    is_right = of_probe.logits.argmax(1) == test[1]
    assert is_right.mean() == pytest.approx(values["linear_probe/acc1"])
    assert of_probe.indices.tolist() == list(range(len(test[1])))
    assert 0.15 < values["few_shot/2"] < values["linear_probe/acc1"] - 0.1


def test_a_fifth_of_the_training_images_stands_in_for_validation(encoder):
    splits = Splits("digits", without_validation, encoder)
    with mock.patch.object(probe, "search", autospec=True, return_value=1.0) as search:
        first, second = (probe.probe(splits).values for _ in range(2))
    (train, validation, *_), again = (call.args for call in search.call_args_list)
    assert (len(train[1]), len(validation[1])) == (160, 40)
    np.testing.assert_array_equal(again[0][0], train[0])
    np.testing.assert_array_equal(again[1][1], validation[1])
    assert first == second


def test_each_split_is_opened_and_embedded_once(encoder):
    opened = []
    splits = Splits("digits", lambda split: opened.append(split) or drawn_digits(split), encoder)
    with mock.patch.object(
        Splits, "compute", autospec=True, side_effect=Splits.compute
    ) as computed:
        for _ in range(2):
            probe.neighbours(splits)
    assert sorted(opened) == sorted(SPLITS)
    assert computed.call_count == 3


def test_what_cannot_be_probed_is_said(encoder):
    def captions(split):
        return Captioned(1, lambda i: (np.zeros((16, 16, 3), np.uint8), ["x"]))

    with pytest.raises(Missing, match="one class each"):
        probe.probe(Splits("flickr", captions, encoder))
    with pytest.raises(InputError, match="coco: no images with a class, mask or caption in its"):
        Splits("coco", lambda split: Captioned(0, [].__getitem__), encoder).embedded("test")

    def other_classes(split):
        data = drawn_digits(split)
        names = data.names if split == "test" else data.names[::-1]
        return Labelled(data.count, data.load, names, data.templates)

    with pytest.raises(ValueError, match="digits: train has 10 classes and test has 10, and"):
        probe.probe(Splits("digits", other_classes, encoder))


def test_what_is_held_out_leaves_every_class_something_to_learn_from():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(50), 20)
    held_out = probe.hold_out(labels, np.random.default_rng(3))
    order = np.random.default_rng(3).permutation(1000)
    np.testing.assert_array_equal(held_out, order[:200])  # a plain fifth, where there are plenty
    for counts in ([1, 1, 2], [2, 2], [1, 5, 1], [3]):
        labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        held_out = probe.hold_out(labels, rng)
        assert len(held_out) >= 1
        assert set(np.delete(labels, held_out)) == set(range(len(counts)))
    assert len(probe.hold_out(np.arange(10), rng)) == 0


def test_a_strength_needs_images_to_be_chosen_by(encoder):
    def one_each(split):
        data = without_validation(split)
        if split == "test":
            return data
        return dataclasses.replace(data, count=10, load=lambda i: data.load(20 * i))

    splits = Splits("few", one_each, encoder)
    with pytest.raises(Missing, match="no training image can be spared"):
        probe.probe(splits)
    assert set(probe.neighbours(splits, 3).values) == {"neighbours/acc1"}
