"""Ties count as the mean over all orders, and NaN is never right."""

import itertools

import numpy as np
import pytest

from clip_jax.evals import ranks
from clip_jax.evals.ranks import NotFinite, Standing, cosines, standing, top_k_accuracy


@pytest.mark.parametrize(
    ("above", "tied", "right"), [(0, 0, 1), (2, 0, 1), (0, 3, 1), (1, 2, 1), (1, 2, 2), (0, 2, 3)]
)
def test_a_tie_is_the_mean_over_all_orders(above, tied, right):
    """Without it a metric would depend on the order of classes or files."""
    orders = list(itertools.permutations([False] * tied + [True] * right))
    firsts = np.array([above + order.index(True) + 1 for order in orders])
    one = Standing(*(np.array([x]) for x in (above, tied, right)))
    assert one.rank() == pytest.approx(firsts.mean())
    for k in range(1, 8):
        assert one.within(k) == pytest.approx((firsts <= k).mean())


@pytest.mark.parametrize(
    ("logits", "accuracies"),
    [
        ([[3.0, 2, 1, 0]], (1, 1)),
        ([[1.0, 2, 3, 0]], (0, 0)),
        ([[2.0, 2, 1, 0]], (1 / 2, 1)),
        ([[2.0, 3, 2, 2]], (0, 1 / 3)),
        ([[1.0, 1, 1, 1]], (1 / 4, 2 / 4)),
    ],
)
def test_of_equal_classes_each_counts_its_share(logits, accuracies):
    scores, label = np.array(logits, np.float32), np.array([0])
    for order in itertools.permutations(range(4)):
        changed, moved = scores[:, order], np.array([order.index(0)])
        for k, expected in enumerate(accuracies, 1):
            assert top_k_accuracy(changed, moved, k) == pytest.approx(expected)
    assert standing(scores, label).within(4) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 1, slice(None)])
def test_a_row_that_is_not_finite_is_never_right(bad, column):
    """Comparisons with NaN are false, so a count of better classes alone would be 0, the best."""
    logits = np.array([[2, 1, 0], [2, 1, 0]], np.float32)
    logits[1, column] = bad
    for k in (1, 2, 5):
        assert top_k_accuracy(logits, np.array([0, 0]), k) == 0.5
    assert standing(logits, np.array([0, 0])).rank().tolist() == [1, np.inf]
    with pytest.raises(NotFinite, match=r"1 of 2 rows of logits are not finite \(NaN or"):
        ranks.check_finite(logits, "logits")
    ranks.check_finite(logits[:1], "logits")


def test_equal_classes_have_equal_products():
    """A matrix product may round the same column differently at different positions."""
    rng = np.random.default_rng(0)
    for size in (3, 37, 50, 333, 1_001):
        images = rng.standard_normal((7, 513)).astype(np.float32)
        classes = rng.standard_normal((size, 513)).astype(np.float32)
        classes[-1] = classes[size // 2] = classes[0]
        result = cosines(images, classes)
        np.testing.assert_allclose(result, images @ classes.T, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(result[:, 0], result[:, -1])
        np.testing.assert_array_equal(result[:, 0], result[:, size // 2])
