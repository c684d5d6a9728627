"""Profile likelihood: what values of parameters and predictions a table of runs allows.

The region of all laws whose squared residuals are at most `limit` is searched on a grid of the
parameters inside the terms, along the principal axes of their uncertainty. For each cell of the
grid, the squares are quadratic in the coefficients, so the extremes of anything that is linear in
these (a coefficient, or the law at some runs) have a closed form. An interval is the range over
the region (Venzon and Moolgavkar 1988).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from clip_jax.scaling.laws import Law, Numbers, Runs, faces, inverses, linearised, nonnegative

CELLS = {1: 61, 2: 25, 3: 13, 4: 9}  # per axis, by the number of axes
MARGIN = 1.3  # half the width of the first grid, in widths of the region if it were an ellipsoid
DOUBLINGS = 12  # of one side of the grid, while the region reaches it
ROUNDING = 1e-11  # of squares, as a share of their total
EDGE = 0.05  # tolerance of interpolated edges, as a share of the squares up to the limit


class Interval(NamedTuple):
    """A range of values, and whether it ends at a bound of the search on either side."""

    low: float
    high: float
    open: bool


class Region(NamedTuple):
    """The laws that a table allows: G cells of the E parameters inside the terms."""

    kind: type[Law]
    runs: Runs
    inside: Float[np.ndarray, "G E"]
    normal: Float[np.ndarray, "G K K"]  # normal equations of the K coefficients
    target: Float[np.ndarray, "G K"]
    total: float  # squares of the targets
    limit: float
    tolerance: float  # of the limit, for cells on the edge of the region
    ranges: dict[str, Interval]  # of the parameters inside the terms

    def extremes(self, directions: Float[np.ndarray, "G P K"]) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the greatest `direction · coefficients` in the region, `[P]` each.

        On each face of the nonnegative coefficients, the extremes of an ellipsoid.
        """
        count = self.normal.shape[-1]
        low = np.full(directions.shape[1], np.inf)
        high = np.full(directions.shape[1], -np.inf)
        for face in faces(count):
            inverse = inverses(self.normal[..., face, :][..., face])  # [G, k, k]
            aimed, along = self.target[..., face], directions[..., face]
            centre = np.einsum("gij,gj->gi", inverse, aimed)
            slack = self.limit - self.total + (centre * aimed).sum(-1)
            held = slack > -self.tolerance
            slack = np.maximum(slack, 0)
            if not held.any():
                continue
            inverse, centre, along, slack = (x[held] for x in (inverse, centre, along, slack))
            step = np.einsum("gij,gpj->gpi", inverse, along)
            length = (step * along).sum(-1)
            step = step * np.sqrt(slack[:, None] / np.maximum(length, 1e-300))[..., None]
            for sign in (-1, 1):
                solution = centre[:, None] + sign * step
                value = (solution * along).sum(-1)
                ok = (solution >= 0).all(-1)
                low = np.minimum(low, np.where(ok, value, np.inf).min(0))
                high = np.maximum(high, np.where(ok, value, -np.inf).max(0))
        return low, high

    def parameter(self, name: str) -> Interval:
        """Return the interval of a parameter of the law."""
        if name in self.ranges:
            return self.ranges[name]
        direction = (np.array(self.kind.COEFFICIENTS) == name).astype(float)
        low, high = self.extremes(np.broadcast_to(direction, (len(self.inside), 1, len(direction))))
        # Where the search bounds the exponent of a term, it bounds the coefficient, too.
        exponent = self.ranges.get(name.replace("scale", "alpha"))
        is_open = bool(low[0] <= 0) or (exponent is not None and exponent.open)
        return Interval(max(float(low[0]), 0.0), float(high[0]), is_open)

    def inner(self, quantity: Callable[[Any], Numbers]) -> tuple[float, float]:
        """Return the range of a quantity of the law that its coefficients do not change."""
        inside = dict(zip(self.kind.inside(), self.inside.T, strict=True))
        values = quantity(self.kind(**inside, **dict.fromkeys(self.kind.COEFFICIENTS, np.nan)))
        return float(np.min(values)), float(np.max(values))

    def law(self, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the greatest error that laws of the region have for each run."""
        return self.extremes(self.kind.factors(runs)(*self.inside.T).swapaxes(-1, -2))


def region(law: Law, runs: Runs, weights: Float[np.ndarray, " n"], limit: float) -> Region:
    """Search the laws of one kind whose weighted squared residuals of log E are below `limit`.

    `law` has the least squares; `runs` are the points of its fit.
    """
    kind = type(law)
    around = np.asarray(runs.under(law))
    aimed = linearised(runs.error, around)
    root = np.sqrt(weights)
    total = float((weights * aimed**2).sum())
    limit += ROUNDING * total
    terms = kind.factors(runs)
    names = kind.inside()
    bounds = np.log([[x[0], x[-1]] for x in kind.grid(runs)])  # [E, 2]
    free = bounds[:, 1] > bounds[:, 0]
    centre = np.log([float(law.parameters[name]) for name in names])

    def equations(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scaled = terms(*np.exp(inside).T) * (root / around)
        return scaled @ scaled.swapaxes(-1, -2), scaled @ (root * aimed)

    axes = _axes(law, runs, weights, free)  # [F, E]
    count = CELLS[max(len(axes), 1)]
    radius = np.sqrt(max(limit - (weights * np.log(runs.error / around) ** 2).sum(), 0.0))
    side = np.full((len(axes), 2), MARGIN * radius)
    # Where nothing is determined, the first grid spans the bounds.
    reach = np.abs(axes) * MARGIN * radius / np.where(free, bounds[:, 1] - bounds[:, 0], 1.0)
    axes = axes / np.maximum(reach.max(1, keepdims=True), 1.0)
    for _ in range(DOUBLINGS):
        steps = [np.linspace(-low, high, count) for low, high in side]
        grid = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1)  # [count, ..., F]
        inside = centre + grid @ axes
        beyond = (inside < bounds[:, 0] - 1e-9) | (inside > bounds[:, 1] + 1e-9)
        within = np.clip(inside, *bounds.T).reshape(-1, len(names))  # terms beyond may vanish
        normal, target = equations(within)
        loss = (total + nonnegative(normal, target)[1]).reshape(inside.shape[:-1])
        loss = np.where(beyond.any(-1), np.inf, loss)
        ends = ([loss.take(end, axis) for end in (0, -1)] for axis in range(len(axes)))
        reached = np.array([[(x <= limit).any() for x in both] for both in ends])
        if not reached.any():
            break
        side = np.where(reached, 2 * side, side)
    # The grid may miss a narrow region, but not its centre.
    least = min(float(loss.min()), total + float(nonnegative(*equations(centre))[1]))
    edge, touched = _edges(inside, loss, beyond, bounds, least, limit)
    edge = np.concatenate([edge, centre[None]])
    spans = np.exp([edge.min(0), edge.max(0)]).T.tolist()
    ranges = {x: Interval(*spans[i], bool(touched[i])) for i, x in enumerate(names)}
    cells = np.concatenate([inside[loss <= limit], edge])
    tolerance = EDGE * (limit - least) + ROUNDING * total
    return Region(kind, runs, np.exp(cells), *equations(cells), total, limit, tolerance, ranges)


def slopes(law: Law, runs: Runs) -> Float[np.ndarray, "P n"]:
    """Differentiate log E of runs by the log of each parameter, those inside the terms first."""
    kind = type(law)
    rows = []
    values = {name: float(x) for name, x in law.parameters.items()}
    for name in (*kind.inside(), *kind.COEFFICIENTS):
        near = (kind(**(values | {name: values[name] * x})) for x in (1.001, 0.999))
        above, below = (np.log(runs.under(law)) for law in near)
        rows.append((above - below) / 0.002)
    return np.stack(rows)


def _axes(law: Law, runs: Runs, weights: np.ndarray, free: Bool[np.ndarray, " E"]) -> np.ndarray:
    """Return the principal axes of the uncertainty of the free parameters inside the terms.

    Along each, one unit raises the squares by one, as far as these are quadratic.
    """
    if not free.any():
        return np.zeros((1, len(free)))  # a grid of equal cells
    steep = slopes(law, runs) * np.sqrt(weights)
    count = len(free)
    inside = steep[:count][free]  # slopes by the parameters inside the terms
    coefficients = steep[count:]
    rest = inside - inside @ np.linalg.pinv(coefficients, rcond=1e-9) @ coefficients
    values, vectors = np.linalg.eigh(rest @ rest.T)
    least = max(values.max(initial=0) * 1e-6, 1e-12)
    axes = np.zeros((len(inside), count))
    axes[:, free] = vectors.T / np.sqrt(np.maximum(values, least))[:, None]
    return axes


def _edges(
    inside: np.ndarray,
    loss: np.ndarray,
    beyond: np.ndarray,
    bounds: np.ndarray,
    least: float,
    limit: float,
) -> tuple[Float[np.ndarray, "M E"], Bool[np.ndarray, " E"]]:
    """Return points on the edge of the region, and which parameters it bounds by the search."""
    points = [np.zeros((0, len(bounds)))]
    touched = np.zeros(len(bounds), bool)
    height = np.sqrt(np.maximum(loss - least, 0))
    wanted = np.sqrt(max(limit - least, 0.0))
    for axis in range(loss.ndim):
        for way in (1, -1):
            at, rise, outside = (np.moveaxis(x, axis, 0)[::way] for x in (inside, height, beyond))
            crosses = (rise[:-1] <= wanted) & (rise[1:] > wanted)
            inner = rise[:-1][crosses]
            outer = rise[1:][crosses]
            share = np.where(np.isfinite(outer), (wanted - inner) / (outer - inner), 1.0)[:, None]
            points.append(at[:-1][crosses] * (1 - share) + at[1:][crosses] * share)
            touched |= outside[1:][crosses].any(0)
    points = [np.clip(x, bounds[:, 0], bounds[:, 1]) for x in points]
    return np.concatenate([x.reshape(-1, inside.shape[-1]) for x in points]), touched
