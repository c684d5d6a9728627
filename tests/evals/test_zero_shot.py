"""The paper's other metrics against scikit-learn and against their definitions."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from clip_jax.evals import zero_shot


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    truth = rng.random(300) < 0.3
    return (truth + rng.standard_normal(300)).astype(np.float32), truth


def test_roc_auc_is_scikit_learns_with_ties(task):
    scores, truth = task
    for found in (scores, np.round(scores)):
        expected = roc_auc_score(truth, found)
        assert 0.6 < expected < 0.9
        assert zero_shot.roc_auc(found, truth) == pytest.approx(expected, abs=1e-9)


def test_two_classes_have_it(task):
    scores, truth = task
    logits = np.stack([np.zeros_like(scores), scores], axis=1)
    values = zero_shot.classification(logits, truth.astype(np.int64))
    assert values["roc_auc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
    assert "roc_auc" not in zero_shot.classification(logits[truth], np.ones(truth.sum(), np.int64))


def test_average_precision_is_scikit_learns(task):
    assert zero_shot.average_precision(*task) == pytest.approx(
        average_precision_score(task[1], task[0]), abs=1e-6
    )


def voc_devkits(scores, truth):
    """The loop of VOC2007's own program: ap += max(precision where recall >= t) / 11."""
    order = np.argsort(-scores)
    hits = np.cumsum(truth[order])
    recall, precision = hits / truth.sum(), hits / np.arange(1, len(order) + 1)
    total = 0.0
    for t in np.linspace(0, 1, 11):
        reached = precision[recall >= t - 1e-9]  # 0.3 of linspace is a little more than 3 / 10
        total += (reached.max() if len(reached) else 0) / 11
    return total


def test_eleven_points_are_the_devkits(task):
    scores, truth = task
    expected = voc_devkits(scores, truth)
    assert 0.5 < expected < 0.9
    assert zero_shot.average_precision_11(scores, truth) == pytest.approx(expected, abs=1e-9)
    # By hand: hits at 1 and 4 of 2. Recall 0.5 from the first on at precision 1, 1.0 at 0.5.
    by_hand = zero_shot.average_precision_11(
        np.array([4.0, 3.0, 2.0, 1.0], np.float32), np.array([True, False, False, True])
    )
    assert by_hand == pytest.approx((6 * 1.0 + 5 * 0.5) / 11)
    assert zero_shot.average_precision_11(scores, np.ones(300, bool)) == 1


def test_many_labels_leave_out_what_is_too_difficult(task):
    scores, truth = task
    marks = np.where(truth, 1, -1).astype(np.int8)
    marks[:50] = 0
    logits = np.stack([scores, scores, scores], axis=1)
    labels = np.stack([marks, np.where(truth, 1, -1), np.full(300, -1)], axis=1).astype(np.int8)
    values = zero_shot.multi_label(logits, labels)
    expected = [zero_shot.average_precision_11(scores[50:], truth[50:]),
                zero_shot.average_precision_11(scores, truth)]  # fmt: skip
    assert expected[0] != expected[1]
    assert values["mean_average_precision_11"] == pytest.approx(np.mean(expected))
    plain = [zero_shot.average_precision(scores[50:], truth[50:]),
             zero_shot.average_precision(scores, truth)]  # fmt: skip
    assert values["mean_average_precision"] == pytest.approx(np.mean(plain))
