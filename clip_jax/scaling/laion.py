"""The fit of Nezhurina et al. 2025 (arXiv:2506.04598): the best run of each bin of compute.

E = a·(C + e^b)^c + d is `Saturating` with other names: the squares of E itself are least, and C is
in GFLOPs. Facts are those of the code that belongs to the paper
(github.com/LAION-AI/scaling-laws-for-comparison at commit 53454c5, figure 1).
"""

import numpy as np
from scipy.optimize import leastsq

from clip_jax.scaling.laws import Numbers, Runs, Saturating

FLOPS = 2.0  # per multiply-add
# Runs that the paper does not fit, in GFLOPs: smaller ones, larger ones, and bad ones of large C.
LEAST, MOST = 1e6, 1e12
LARGE, WORST = 1e11, 0.7
FIRST_BIN = 1500.0  # GFLOPs: there is one edge of bins for each doubling from here to the largest C
PRECISE = 1e-10  # relative step of the parameters at which the search ends
OFFSETS = (-30.0, 3.0)  # bounds of log (offset / largest C)
EXPONENTS = (-7.0, 1.0)  # bounds of log alpha
STARTS = 8  # of the search, for each of b and c


def candidates(runs: Runs) -> Runs:
    """Return the runs that the paper selects points from."""
    gflops = FLOPS * runs.compute
    return runs.where((gflops >= LEAST) & ~((gflops > LARGE) & (runs.error >= WORST)))


def points(runs: Runs) -> Runs:
    """Return the runs to fit: the best of each bin of compute, if better than all bins below.

    Bins are equally wide in log C, and the largest compute is a bin of its own. Runs above `MOST`
    are in bins, but are not fitted.
    """
    gflops = FLOPS * runs.compute
    count = max(int(np.log2(gflops.max() / FIRST_BIN)), 2)
    bins = np.digitize(gflops, np.geomspace(gflops.min(), gflops.max(), count))
    order = np.lexsort((gflops, runs.error, bins))
    best = order[np.unique(bins[order], return_index=True)[1]]
    error = runs.error[best]
    is_better = np.concatenate([[True], error[1:] < np.minimum.accumulate(error)[:-1]])
    return runs.where(best[is_better & (gflops[best] <= MOST)])


def fitted(runs: Runs) -> tuple[float, ...]:
    """Return the parameters of the `Saturating` law with the least squares of the error.

    The search starts from the best point of a grid of offsets and exponents, for which scale and
    irreducible error are a straight line.
    """
    unit = float(runs.compute.max())
    share = runs.compute / unit
    error = runs.error

    def term(log_offset: Numbers, log_alpha: Numbers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        offset = np.exp(np.clip(log_offset, *OFFSETS))[..., None]
        alpha = np.exp(np.clip(log_alpha, *EXPONENTS))[..., None]
        return (share + offset) ** -alpha, offset, alpha

    def residuals(values: np.ndarray) -> np.ndarray:
        log_offset, log_alpha, scale, *irreducible = values
        return scale * term(log_offset, log_alpha)[0] + sum(irreducible) - error

    def slopes(values: np.ndarray) -> np.ndarray:
        power, offset, alpha = term(*values[:2])
        of_offset = -values[2] * alpha * power * offset / (share + offset)
        of_alpha = -values[2] * alpha * power * np.log(share + offset)
        return np.stack([of_offset, of_alpha, power, np.ones_like(power)][: len(values)], axis=1)

    offsets = np.linspace(np.log(share.min()) - 3, 0, STARTS)
    grid = np.stack(np.meshgrid(offsets, np.linspace(-3.5, 0.5, STARTS)), axis=-1).reshape(-1, 2)
    powers = term(*grid.T)[0]
    away = powers - powers.mean(axis=1, keepdims=True)
    scales = away @ error / np.square(away).sum(axis=1)
    levels = error.mean() - scales * powers.mean(axis=1)
    squares = np.square(scales[:, None] * powers + levels[:, None] - error).sum(axis=1)
    best = squares.argmin()
    start = np.array([*grid[best], scales[best], levels[best]])
    for count in (4, 3):  # an irreducible error below 0 is 0
        # SciPy's interface with the least overhead: a bootstrap fits a thousand times.
        values, *_ = leastsq(residuals, start[:count], Dfun=slopes, full_output=True, xtol=PRECISE)
        if count == 3 or values[3] >= 0:
            break
    log_offset, log_alpha, scale, *irreducible = values.tolist()
    _, offset, alpha = (float(x[0]) for x in term(log_offset, log_alpha))
    return alpha, offset * unit, scale * unit**alpha, sum(irreducible)


def coefficients(law: Saturating) -> dict[str, float]:
    """Return the paper's a, b, c and d of a law."""
    alpha = float(law.alpha)
    return {
        "a": float(law.scale) * FLOPS**alpha,
        "b": float(np.log(FLOPS * law.offset)),
        "c": -alpha,
        "d": float(law.irreducible),
    }
