"""The parameters of each law for given runs: many tables of them at once, by least squares."""

from typing import Any

import numpy as np
from jaxtyping import Float

from clip_jax.scaling.laws import (
    Additive,
    Batched,
    Law,
    PowerLaw,
    Repeated,
    Runs,
    Saturating,
    worth,
)
from clip_jax.scaling.projection import search

EXPONENTS = np.geomspace(0.01, 3.0, 24)  # where the search for an exponent starts
FADES = np.geomspace(0.1, 1_000, 12)  # and that for the epochs after which samples are spent
SAME = 1e-3  # an offset this small beside the least compute is none


def estimate(
    law: type[Law],
    runs: Runs,
    error: Float[np.ndarray, "#R n"],
    weights: Float[np.ndarray, "R n"],
) -> Law:
    """Minimise the squared relative residuals of R tables; every parameter is `[R]`.

    Args:
      law: which.
      runs: what the tables share: sizes, samples, and the third where the law takes one.
      error: of each run, in each table.
      weights: of each run, in each table.
    """
    if law is PowerLaw:
        return _power(runs.compute, error, weights)
    if law is Saturating:
        return _saturating(runs.compute, error, weights)
    return _of_size(law, runs, error, weights)


def _power(compute: np.ndarray, error: np.ndarray, weights: np.ndarray) -> PowerLaw:
    x, y, total = np.log(compute), np.log(error), weights.sum(-1)
    x_mean, y_mean = (weights * x).sum(-1) / total, (weights * y).sum(-1) / total
    dx, dy = x - x_mean[:, None], y - y_mean[:, None]
    with np.errstate(invalid="ignore"):  # one bin alone has no slope: NaN
        slope = (weights * dx * dy).sum(-1) / (weights * dx * dx).sum(-1)
    return PowerLaw(slope, np.exp(y_mean - slope * x_mean))


def _saturating(compute: np.ndarray, error: np.ndarray, weights: np.ndarray) -> Saturating:
    unit = np.exp(np.log(compute).mean())  # powers of numbers near 1 keep their digits
    c = compute / unit

    def features(alpha: np.ndarray, offset: np.ndarray) -> np.ndarray:
        power = (c + offset[..., None]) ** -alpha[..., None]
        return np.stack([power, np.ones_like(power)], axis=-1)

    offsets = np.geomspace(SAME * c.min(), c.max(), 16)
    (alpha, offset), (scale, irreducible) = search(features, (EXPONENTS, offsets), error, weights)
    return Saturating(alpha, offset * unit, scale * unit**alpha, irreducible)


def _of_size(law: Any, runs: Runs, error: np.ndarray, weights: np.ndarray) -> Law:
    size, samples = runs.size, runs.samples
    size_unit, samples_unit = np.exp(np.log(size).mean()), np.exp(np.log(samples).mean())
    n, d = size / size_unit, samples / samples_unit
    third = samples if runs.third is None else runs.third

    def features(a: np.ndarray, b: np.ndarray, *own: np.ndarray) -> np.ndarray:
        count = d
        if law is Repeated:
            count = worth(d, third / samples_unit, own[0][..., None])
        elif law is Batched:
            count = d / (1 + third / own[0][..., None])
        of_size, of_samples = n ** -a[..., None], count ** -b[..., None]
        return np.stack([of_size, of_samples, np.ones_like(of_size)], axis=-1)

    grid = (EXPONENTS, EXPONENTS)
    if law is not Additive:  # a coarser one, of three dimensions
        # A critical batch is looked for from far below all batches to far above.
        critical = np.geomspace(third.min() / 100, third.max() * 100, 12)
        grid = (EXPONENTS[::3], EXPONENTS[::3], FADES if law is Repeated else critical)
    (a, b, *own), (size_scale, samples_scale, irreducible) = search(features, grid, error, weights)
    scales = size_scale * size_unit**a, samples_scale * samples_unit**b
    return law(a, b, *own, *scales, irreducible)
