"""Where right answers stand among candidates: one rule for ties and for values that are not finite.

Of candidates with equal scores every order is equally likely, and a metric is its mean over these
orders: of t equal best classes each counts 1/t. So no metric depends on the order of classes or
files. A row with NaN or infinity is never right.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from clip_jax.errors import InputError


class NotFinite(InputError):
    """A model whose embeddings, logits or losses contain NaN or infinity."""


def check_finite(rows: Shaped[np.ndarray, "B ..."], what: str) -> None:
    """Raise NotFinite with the number of rows that contain NaN or infinity."""
    is_finite = np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
    if not is_finite.all():
        raise NotFinite(
            f"{np.sum(~is_finite):,} of {len(rows):,} rows of {what} are not finite (NaN or "
            "infinity), but metrics need finite ones. Use weights that do not overflow, such as an "
            "earlier checkpoint (RUN@STEP), or a data type of larger range (--dtype float32)."
        )


def cosines(
    images: Float[np.ndarray, "B E"], classes: Float[np.ndarray, "classes E"]
) -> Float[np.ndarray, "B classes"]:
    """Return the products of all images and classes; equal classes get equal columns.

    A matrix product alone may round equal columns differently.
    """
    distinct, column = np.unique(classes, axis=0, return_inverse=True)
    if len(distinct) == len(classes):
        return images @ classes.T
    return (images @ distinct.T)[:, column.ravel()]


class Standing(NamedTuple):
    """How many candidates each row's best right candidate has above and beside it."""

    above: Float[np.ndarray, " B"]  # better candidates; infinite for a row that is not finite
    tied: Int[np.ndarray, " B"]  # wrong candidates with an equal score
    right: Int[np.ndarray, " B"]  # right candidates with an equal score, itself included

    def within(self, k: int) -> Float[np.ndarray, " B"]:
        """Return how likely a right candidate is among the first k.

        Without ties it is 0 or 1. With one right candidate among t equal ones it is the share of
        these t that the first k hold. With r right ones and w wrong ones, of which the first k
        hold m, it is 1 − C(w, m) / C(w + r, m).
        """
        missed = np.ones(len(self.above))
        for i in range(k):
            share = np.maximum(self.tied - i, 0) / np.maximum(self.tied + self.right - i, 1)
            missed *= np.where(self.above + i < k, share, 1)
        return 1 - missed

    def rank(self) -> Float[np.ndarray, " B"]:
        """Return the mean rank of the first right candidate; 1 is the best."""
        return 1 + self.above + self.tied / (self.right + 1)


def standing(logits: Shaped[np.ndarray, "B classes"], labels: Int[np.ndarray, " B"]) -> Standing:
    """Compare each row's label with the other classes."""
    of_label = np.take_along_axis(logits, labels[:, None], axis=1)
    is_finite = np.isfinite(logits).all(axis=1)
    above = np.where(is_finite, (logits > of_label).sum(axis=1), np.inf)
    tied = np.where(is_finite, (logits == of_label).sum(axis=1) - 1, 0)
    return Standing(above, tied, np.ones_like(tied))


def top_k_accuracy(
    logits: Shaped[np.ndarray, "B classes"], labels: Int[np.ndarray, " B"], k: int = 1
) -> float:
    """Return the share of rows with their label in the k largest logits, as the mean over all
    orders of equal logits."""
    return float(standing(logits, labels).within(k).mean())
