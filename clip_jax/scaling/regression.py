"""Ordinary least squares, with intervals by Student's t."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special


class Linear(NamedTuple):
    """y = x · coefficients; the coefficient of a column of zeros is 0."""

    coefficients: Float[np.ndarray, " k"]
    covariance: Float[np.ndarray, "k k"]
    variance: float  # of an observation
    t: float  # quantile of Student's t for 95% intervals

    def predict(self, x: Float[np.ndarray, " k"], n: int = 1) -> tuple[float, float]:
        """Return the mean of `n` new observations at x, and half of its 95% interval."""
        half = self.t * np.sqrt(x @ self.covariance @ x + self.variance / n)
        return float(x @ self.coefficients), float(half)

    def coefficient(self, i: int) -> tuple[float, float]:
        """Return a coefficient, and half of its 95% interval."""
        return float(self.coefficients[i]), self.t * float(self.covariance[i, i]) ** 0.5


def least_squares(x: Float[np.ndarray, "n k"], y: Float[np.ndarray, " n"]) -> Linear:
    """Fit y. Needs more observations than independent columns."""
    freedom, inverse = len(y) - int(np.linalg.matrix_rank(x)), np.linalg.pinv(x)
    coefficients = inverse @ y
    variance = float(np.sum((y - x @ coefficients) ** 2) / freedom)
    t = float(special.stdtrit(freedom, 0.975))
    return Linear(coefficients, variance * inverse @ inverse.T, variance, t)
