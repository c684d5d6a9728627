"""The paper's other metrics against scikit-learn and against their definitions."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from clip_jax.convert.weights import Head
from clip_jax.errors import InputError
from clip_jax.evals import zero_shot
from clip_jax.evals.datasets import Labelled
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.reader import Embedded
from tests.evals.conftest import encoder_on, mesh_of


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    truth = rng.random(300) < 0.3
    return (truth + rng.standard_normal(300)).astype(np.float32), truth


def test_the_roc_auc_of_two_classes_is_scikit_learns_with_ties(task):
    scores, truth = task
    for found in (scores, np.round(scores)):
        expected = roc_auc_score(truth, found)
        assert 0.6 < expected < 0.9
        logits = np.stack([np.zeros_like(found), found], axis=1)
        values = zero_shot.classification(logits, truth.astype(np.int64))
        assert values["roc_auc"] == pytest.approx(expected, abs=1e-9)
    assert "roc_auc" not in zero_shot.classification(logits[truth], np.ones(truth.sum(), np.int64))


def test_ties_count_by_chance_and_classes_without_a_sample_do_not_count():
    values = zero_shot.classification(np.zeros((3, 6), np.float32), np.arange(3))
    chance = {"acc1": 1 / 6, "acc5": 5 / 6, "mean_per_class_recall": 1 / 6}
    assert values == pytest.approx(chance)
    logits, labels = np.eye(5, dtype=np.float32)[[1, 1, 3]], np.array([1, 2, 3])
    assert zero_shot.classification(logits, labels)["mean_per_class_recall"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("steps", [None, 8.0, 1.0, 0.0])
def test_average_precision_is_scikit_learns_in_any_order(task, steps):
    """Also for scores rounded to `steps` per unit, of which many or all are equal."""
    scores, truth = task
    scores = scores if steps is None else np.round(scores * steps)
    expected = average_precision_score(truth, scores)
    first = zero_shot.average_precisions(scores, truth)
    assert first[0] == pytest.approx(expected, abs=1e-9)
    for order in (np.argsort(truth), np.argsort(~truth), np.random.default_rng(1).permutation(300)):
        assert zero_shot.average_precisions(scores[order], truth[order]) == first


def test_an_average_precision_of_equal_scores_is_the_share_of_true_ones():
    """By the order of files it was 1.0 or 0.06."""
    truth = np.arange(50) < 5
    for files in (truth, truth[::-1]):
        assert zero_shot.average_precisions(np.zeros(50, np.float32), files) == (0.1, 0.1)


def test_an_average_precision_of_nan_is_nan(task):
    scores, truth = task
    broken = np.where(np.arange(300) == 7, np.float32(np.nan), scores)
    assert np.isnan(zero_shot.average_precisions(broken, truth)).all()


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        ("1001", (6 * 1 + 5 * 1 / 2) / 11),  # recall 1/2 at precision 1, then 1 at 1/2
        ("0110", 2 / 3),  # recall 1 at 2/3, better than 1/2 at 1/2
        ("1111111111", 1),
        ("1110000000" + "1" * 7, (4 * 1 + 7 * 10 / 17) / 11),  # recall 3/10 is the fourth point
    ],
)
def test_eleven_points_are_the_best_precisions_from_each_recall_on(truth, expected):
    """VOC2007's, by hand: what is true of samples in the order of their scores."""
    scores = -np.arange(len(truth), dtype=np.float32)
    found = zero_shot.average_precisions(scores, np.array([*truth]) == "1")
    assert found[1] == pytest.approx(expected)


def test_many_labels_leave_out_what_is_too_difficult(task):
    scores, truth = task
    marks = np.where(truth, 1, -1).astype(np.int8)
    marks[:50] = 0
    logits = np.stack([scores, scores, scores], axis=1)
    labels = np.stack([marks, np.where(truth, 1, -1), np.full(300, -1)], axis=1).astype(np.int8)
    values = zero_shot.multi_label(logits, labels)
    expected = [
        zero_shot.average_precisions(scores[50:], truth[50:]),
        zero_shot.average_precisions(scores, truth),
    ]
    assert expected[0] != expected[1]
    plain, eleven = np.mean(expected, axis=0)
    assert values["mean_average_precision_11"] == pytest.approx(eleven)
    assert values["mean_average_precision"] == pytest.approx(plain)


def test_tags_that_no_image_has_are_one_message():
    with pytest.raises(InputError, match="none of the 4 images read shows one of the 3 classes"):
        zero_shot.multi_label(np.zeros((4, 3), np.float32), np.full((4, 3), -1, np.int8))
    with pytest.raises(InputError, match="none of the 4 images"):  # nor does 0 count
        zero_shot.multi_label(np.zeros((4, 3), np.float32), np.zeros((4, 3), np.int8))


@pytest.mark.parametrize(
    ("classes", "accuracy"),
    [(("cat", "dog"), 0.75), (("owl", "dog", "cat"), 0.25), (("cat", "owl"), None)],
)
def test_a_classifier_is_measured_on_classes_that_it_has_by_name(classes, accuracy):
    """In any order and among others; its first row is nearest to three of four images."""
    images = np.float32([[1, 0], [1, 0], [1, 0], [0, 1]])
    kernel = np.float32([[1, 0], [0, 1]] if len(classes) == 2 else [[2, 2], [1, 0], [0, 1]])
    encoder = mock.Mock(spec=Encoder, head=Head(classes, ("{}",), kernel), logit_scale=1.0)
    encoder.classes.return_value = np.eye(2, dtype=np.float32)[None]
    data = mock.Mock(spec=Labelled, names=["cat", "dog"], templates=["{}"])
    embedded = Embedded(images, np.arange(4), [0, 0, 1, 1], [])
    values = zero_shot.classify(data, embedded, encoder).values
    assert values["acc1"] == 0.75
    assert values.get("classifier/acc1") == accuracy


def test_equal_class_names_share_an_image_and_a_classifier_tells_them_apart():
    """ImageNet's names have "missile" twice; each class has a vector in a trained classifier."""
    names, images = ["missile", "missile", "cat"], np.eye(3, dtype=np.float32)
    encoder = encoder_on(mesh_of(1))
    vectors = dict(zip(("a missile", "a cat"), images[1:], strict=True))
    encoder._embedded.update(vectors)
    data = Labelled(3, [].__getitem__, names, ["a {c}"])
    head = Head(tuple(names), ("a {}",), images)
    embedded = Embedded(np.roll(images, -1, axis=0)[[0, 0, 1]], np.arange(3), [0, 1, 2], [])
    values = zero_shot.classify(data, embedded, encoder).values
    assert values == pytest.approx({"acc1": 2 / 3, "mean_per_class_recall": 2 / 3})

    embedded = Embedded(images, np.arange(3), [0, 1, 2], [])
    encoder = dataclasses.replace(encoder, head=head)
    encoder._embedded.update(vectors)
    assert zero_shot.classify(data, embedded, encoder).values["classifier/acc1"] == 1


@pytest.mark.parametrize(
    ("names", "classes", "rows"),
    [
        ("aab", "aab", [0, 1, 2]),
        ("aab", "baca", [1, 3, 0]),
        ("ab", "aab", [0, 2]),
        ("aab", "ab", None),
        ("ac", "ab", None),
    ],
)
def test_the_first_of_equal_names_is_the_classifiers_first(names, classes, rows):
    assert zero_shot.rows_of_classes([*names], [*classes]) == rows
