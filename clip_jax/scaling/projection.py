"""Least squares for laws that are linear but for two or three numbers (variable projection).

For given exponents, say, the best coefficients, none negative, follow in closed form; a grid that
closes in finds the exponents. It cannot stop at a bad start as gradient methods do, and thousands
of tables are solved at once.
"""

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Features = Callable[..., np.ndarray]

CELLS = np.linspace(-1, 1, 5)  # of a refined grid, in steps of the one before
ROUNDS = 9  # the step halves each time: 2⁻⁹ of the first grid's
RIDGE = 1e-13  # keeps a matrix invertible where two features coincide
AT_ONCE = 2_000_000  # numbers of a table of features: a few hundred MB in all


def search(
    features: Features,
    grid: tuple[np.ndarray, ...],
    error: Float[np.ndarray, "#R n"],
    weights: Float[np.ndarray, "R n"],
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Minimise Σ weights·(1 − prediction / error)² over exponents and coefficients.

    Args:
      features: maps arrays `[...]`, one an exponent, to `[..., n, K]`.
      grid: where to begin: increasing positive values of each exponent, evenly spaced in log.
      error: what to predict.
      weights: of each run, per table.

    Returns:
      The exponents and the K coefficients, each `[R]`.
    """
    cells = len(CELLS) ** len(grid)
    at_once = max(AT_ONCE // (cells * weights.shape[1]), 1)
    parts = [
        _search(features, grid, error[i : i + at_once] if len(error) > 1 else error, some)
        for i in range(0, len(weights), at_once)
        for some in (weights[i : i + at_once],)
    ]
    exponents, coefficients = (np.concatenate(x) for x in zip(*parts, strict=True))
    return tuple(exponents.T), tuple(coefficients.T)


def _search(
    features: Features,
    grid: tuple[np.ndarray, ...],
    error: Float[np.ndarray, "#R n"],
    weights: Float[np.ndarray, "R n"],
) -> tuple[Float[np.ndarray, "R E"], Float[np.ndarray, "R K"]]:
    root = np.sqrt(weights)
    first = [x.ravel() for x in np.meshgrid(*grid, indexing="ij")]
    shared = features(*first)
    products = np.einsum("gni,gnj->ngij", shared, shared)
    normal = np.tensordot(weights / error**2, products, 1)
    target = np.tensordot(weights / error, shared.transpose(1, 0, 2), 1)
    _, loss = _nonnegative(normal, target)
    at = np.log(np.stack(first, axis=-1))[loss.argmin(axis=1)]  # [R, E]

    low, high = np.log([[x[0] for x in grid], [x[-1] for x in grid]])
    step = np.log([x[1] / x[0] for x in grid])
    cells = np.stack(np.meshgrid(*[CELLS] * len(grid), indexing="ij"), axis=-1)
    cells = cells.reshape(-1, len(grid))
    every = np.arange(len(weights))
    coefficients = np.zeros((len(weights), shared.shape[-1]))
    for _ in range(ROUNDS):
        tried = np.clip(at[:, None] + cells * step, low, high)  # [R, cells, E]
        scaled = features(*np.moveaxis(np.exp(tried), -1, 0)) * (root / error)[:, None, :, None]
        transposed = scaled.swapaxes(-1, -2)
        aimed = (transposed @ root[:, None, :, None])[..., 0]
        solution, loss = _nonnegative(transposed @ scaled, aimed)
        best = loss.argmin(axis=1)
        at, coefficients = tried[every, best], solution[every, best]
        step = step / 2
    return np.exp(at), coefficients


def _nonnegative(
    normal: Float[np.ndarray, "*B K K"], target: Float[np.ndarray, "*B K"]
) -> tuple[Float[np.ndarray, "*B K"], Float[np.ndarray, "*B"]]:
    """Solve least squares with no coefficient below zero, from its normal equations.

    Tries every subset of coefficients: with two or three of them there are few. Returns the
    coefficients and the loss up to a constant.
    """
    k = target.shape[-1]
    best, least = np.zeros_like(target), np.zeros(target.shape[:-1])
    for size in range(1, k + 1):
        for chosen in itertools.combinations(range(k), size):
            rows = np.array(chosen)
            matrix = normal[..., rows[:, None], rows]
            matrix = matrix * (1 + RIDGE * np.eye(size))
            solution = np.linalg.solve(matrix, target[..., rows, None])[..., 0]
            loss = -(solution * target[..., rows]).sum(-1)
            better = (solution >= 0).all(-1) & (loss < least)
            least = np.where(better, loss, least)
            full = np.zeros_like(target)
            full[..., rows] = solution
            best = np.where(better[..., None], full, best)
    return best, least
