"""Scaling laws, their fits by least squares, and the frontier of the runs that they go through.

Compute C is size × samples; size N is the forward multiply-adds of one image-text pair, so that
ViT-B/32 and B/16, which have as many parameters, count as what they are; D is samples seen. The
units are the caller's, and β's unit follows from them. Two laws take a third quantity of a run:
how many of its samples were distinct, or how many make a batch.

A new form is a subclass of `Law`: its terms, its coefficients, and where a fit begins to search.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Float

BINS = 5  # of the frontier: Cherti et al. 2023
TRAINING_FLOPS = 6e9  # of one forward GMAC: two a multiply-add, three passes

# The search for the numbers in which a law is not linear.
EXPONENTS = np.geomspace(0.01, 3.0, 24)  # where it starts for an exponent
FADES = np.geomspace(0.1, 1_000, 12)  # and for the epochs after which samples are spent
SAME = 1e-3  # an offset this small beside the least compute is none
CELLS = np.linspace(-1, 1, 5)  # of a refined grid, in steps of the one before
ROUNDS = 9  # the step halves each time: 2⁻⁹ of the first grid's
RIDGE = 1e-13  # keeps a matrix invertible where two terms coincide
AT_ONCE = 2_000_000  # numbers of a table of terms: a few hundred MB in all

Numbers = np.ndarray | np.floating | float  # NumPy turns an array without axes into a scalar


class Runs(NamedTuple):
    """Measured runs: what each cost, how wrong it is, and what a reader calls it."""

    size: Float[np.ndarray, " n"]  # forward multiply-adds of one pair
    samples: Float[np.ndarray, " n"]  # pairs seen in training
    error: Float[np.ndarray, " n"]  # 1 − accuracy, or a loss; positive
    third: Float[np.ndarray, " n"] | None = None  # what Repeated or Batched takes besides
    model: np.ndarray | None = None  # names, for the colours of a plot
    length: np.ndarray | None = None  # samples as text, for the markers of a plot

    @property
    def compute(self) -> Float[np.ndarray, " n"]:
        return self.size * self.samples

    def where(self, keep: Bool[np.ndarray, " n"]) -> "Runs":
        held = {name: x[keep] for name, x in self._asdict().items() if x is not None}
        return self._replace(**held)

    def under(self, law: "Law") -> Numbers:
        """Evaluate a law for each run."""
        return law(self.size, self.samples, self.third)


class Optimum(NamedTuple):
    """What a law says of the best division of some compute."""

    size: Numbers
    samples: Numbers
    error: Numbers


# ------------------------------------------------------------------ the laws


@dataclass(frozen=True)
class Law:
    """E = Σ coefficient · term, where the terms depend on the other parameters.

    Each parameter is a number, or an array of many laws at once.
    """

    COEFFICIENTS: ClassVar[tuple[str, ...]] = ()  # the parameters that stand before the terms

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    @property
    def parameters(self) -> dict[str, Numbers]:
        return {name: getattr(self, name) for name in self.names()}

    def map(self, function: Callable[[np.ndarray], Numbers]) -> Self:
        """Apply a function to the array of each parameter."""
        return type(self)(*(function(np.asarray(x)) for x in self.parameters.values()))

    def terms(self, size: Numbers, samples: Numbers, third: Numbers | None) -> tuple[Numbers, ...]:
        """Return what stands behind each of COEFFICIENTS."""
        raise NotImplementedError

    @classmethod
    def grid(cls, runs: Runs) -> tuple[np.ndarray, ...]:
        """Where to begin the search for each parameter inside of the terms: evenly in its log."""
        raise NotImplementedError

    def __call__(self, size: Numbers, samples: Numbers, third: Numbers | None = None) -> Numbers:
        terms = zip(self.COEFFICIENTS, self.terms(size, samples, third), strict=True)
        return sum(getattr(self, name) * term for name, term in terms)

    @classmethod
    def fitted(
        cls, runs: Runs, error: Float[np.ndarray, "#R n"], weights: Float[np.ndarray, "R n"]
    ) -> Self:
        """Minimise the squared relative residuals of R tables; every parameter is `[R]`.

        The tables share the runs' sizes, samples, and the third where the law takes one.
        """
        inside = [name for name in cls.names() if name not in cls.COEFFICIENTS]

        def terms(*values: np.ndarray) -> np.ndarray:
            law = cls(
                **{name: x[..., None] for name, x in zip(inside, values, strict=True)},
                **dict.fromkeys(cls.COEFFICIENTS, 1.0),
            )
            each = law.terms(runs.size, runs.samples, runs.third)
            return np.stack(np.broadcast_arrays(*each), axis=-1)

        values, coefficients = search(terms, cls.grid(runs), error, weights)
        named = zip((*inside, *cls.COEFFICIENTS), (*values.T, *coefficients.T), strict=True)
        return cls(**dict(named))

    def optimum(self, compute: Numbers, sizes: tuple[float, float]) -> Optimum:
        """Divide compute such that the error is least, with new samples in small batches.

        `sizes` are the least and the largest that may be chosen. A law of compute alone has nothing
        to divide: its size is 1.
        """
        one = np.ones_like(compute * next(iter(self.parameters.values())))
        return Optimum(one, compute * one, self(compute, one))


@dataclass(frozen=True)
class PowerLaw(Law):
    """E = beta · C^alpha; alpha is negative, as Cherti et al. print it."""

    alpha: Numbers
    beta: Numbers

    def __call__(self, size: Numbers, samples: Numbers, third: Numbers | None = None) -> Numbers:
        # In logarithms: of steep lines, the two factors may exceed a float where the law does not.
        with np.errstate(over="ignore"):
            return np.exp(np.log(self.beta) + self.alpha * np.log(size * samples))

    @classmethod
    def fitted(
        cls, runs: Runs, error: Float[np.ndarray, "#R n"], weights: Float[np.ndarray, "R n"]
    ) -> Self:
        """Fit straight lines in log-log."""
        x, y, total = np.log(runs.compute), np.log(error), weights.sum(-1)
        x_mean, y_mean = (weights * x).sum(-1) / total, (weights * y).sum(-1) / total
        dx, dy = x - x_mean[:, None], y - y_mean[:, None]
        with np.errstate(invalid="ignore"):  # one bin alone has no slope: NaN
            slope = (weights * dx * dy).sum(-1) / (weights * dx * dx).sum(-1)
        return cls(slope, np.exp(y_mean - slope * x_mean))


@dataclass(frozen=True)
class Saturating(Law):
    """E = irreducible + scale · (C + offset)^−alpha."""

    COEFFICIENTS = ("scale", "irreducible")
    alpha: Numbers
    offset: Numbers
    scale: Numbers
    irreducible: Numbers

    def terms(self, size: Numbers, samples: Numbers, third: Numbers | None) -> tuple[Numbers, ...]:
        return (size * samples + self.offset) ** -self.alpha, 1.0

    @classmethod
    def grid(cls, runs: Runs) -> tuple[np.ndarray, ...]:
        return EXPONENTS, np.geomspace(SAME * runs.compute.min(), runs.compute.max(), 16)


@dataclass(frozen=True)
class Additive(Law):
    """E = irreducible + size_scale·N^−size_alpha + samples_scale·D^−samples_alpha.

    Hoffmann et al. 2022, equation 2. It and its kinds tell sizes of equal compute apart.
    """

    COEFFICIENTS = ("size_scale", "samples_scale", "irreducible")
    size_alpha: Numbers
    samples_alpha: Numbers
    size_scale: Numbers
    samples_scale: Numbers
    irreducible: Numbers

    def worth(self, samples: Numbers, third: Numbers) -> Numbers:
        """Return how many new samples in small batches those are worth that a run has seen."""
        return samples

    def terms(self, size: Numbers, samples: Numbers, third: Numbers | None) -> tuple[Numbers, ...]:
        worth = samples if third is None else self.worth(samples, third)
        return size**-self.size_alpha, worth**-self.samples_alpha, 1.0

    @classmethod
    def grid(cls, runs: Runs) -> tuple[np.ndarray, ...]:
        return EXPONENTS, EXPONENTS

    @property
    def size_exponent(self) -> Numbers:
        """The power of compute with which the best size grows."""
        return self.samples_alpha / (self.size_alpha + self.samples_alpha)

    def optimum(self, compute: Numbers, sizes: tuple[float, float]) -> Optimum:
        """Divide compute such that the error is least: Hoffmann et al. 2022, equation 4."""
        a, b = self.size_alpha, self.samples_alpha
        with np.errstate(divide="ignore", over="ignore"):  # where size or samples don't count
            ratio = a * self.size_scale / (b * self.samples_scale)
            size = np.clip((ratio * compute**b) ** (1 / (a + b)), *sizes)
        return Optimum(size, compute / size, self(size, compute / size))


@dataclass(frozen=True)
class Repeated(Additive):
    """The additive law of samples seen again (Muennighoff et al. 2023, arXiv:2305.16264).

    Seen again, samples are worth less each time: U distinct ones that are seen D / U times count as
    U·(1 + fade·(1 − exp(−(D / U − 1) / fade))), `fade` epochs' worth at the most. The third
    quantity is the number of distinct samples, by default all of them.
    """

    fade: Numbers  # R* of the paper: epochs after which another is worth 1/e of a new one

    def worth(self, samples: Numbers, third: Numbers) -> Numbers:
        distinct = np.minimum(third, samples)
        return distinct * (1 - self.fade * np.expm1(-(samples / distinct - 1) / self.fade))

    @classmethod
    def grid(cls, runs: Runs) -> tuple[np.ndarray, ...]:
        return EXPONENTS[::3], EXPONENTS[::3], FADES


@dataclass(frozen=True)
class Batched(Additive):
    """The additive law with D / (1 + batch / critical) samples (McCandlish et al. 2018).

    At the critical batch, `critical` samples, twice as many are seen for an error as with very
    small batches, in twice as many steps as with very large ones (arXiv:1812.06162, equation 2.12).
    The third quantity is the batch, by default a very small one.
    """

    critical: Numbers

    def worth(self, samples: Numbers, third: Numbers) -> Numbers:
        return samples / (1 + third / self.critical)

    @classmethod
    def grid(cls, runs: Runs) -> tuple[np.ndarray, ...]:
        batch = np.asarray(runs.third)
        critical = np.geomspace(batch.min() / 100, batch.max() * 100, 12)
        return EXPONENTS[::3], EXPONENTS[::3], critical


LAWS: dict[str, type[Law]] = {
    "power": PowerLaw, "saturating": Saturating, "additive": Additive, "repeated": Repeated,
    "batched": Batched,
}  # fmt: skip


# ------------------------------------------------------------------ least squares


def search(
    terms: Callable[..., np.ndarray],
    grid: tuple[np.ndarray, ...],
    error: Float[np.ndarray, "#R n"],
    weights: Float[np.ndarray, "R n"],
) -> tuple[Float[np.ndarray, "R E"], Float[np.ndarray, "R K"]]:
    """Minimise Σ weights·(1 − prediction / error)² by variable projection.

    For given exponents, say, the best coefficients, none negative, follow in closed form; a grid
    that closes in finds the exponents. It cannot stop at a bad start as gradient methods do, and
    thousands of tables are solved at once.

    `terms` maps arrays `[...]`, one an exponent, to `[..., n, K]`. `grid` has where to begin:
    increasing positive values of each exponent, evenly spaced in log. Returns the exponents and
    the K coefficients of each table.
    """
    at_once = max(AT_ONCE // (len(CELLS) ** len(grid) * weights.shape[1]), 1)
    error = np.broadcast_to(error, weights.shape)
    if len(weights) > at_once:
        pieces = [
            search(terms, grid, error[i : i + at_once], weights[i : i + at_once])
            for i in range(0, len(weights), at_once)
        ]
        exponents, coefficients = map(np.concatenate, zip(*pieces, strict=True))
        return exponents, coefficients
    first = np.stack(np.meshgrid(*grid, indexing="ij"), axis=-1).reshape(-1, len(grid))
    shared = terms(*first.T)
    products = np.einsum("gni,gnj->ngij", shared, shared)
    normal = np.tensordot(weights / error**2, products, 1)
    target = np.tensordot(weights / error, shared.transpose(1, 0, 2), 1)
    coefficients, loss = _nonnegative(normal, target)
    at = np.log(first)[loss.argmin(axis=1)]  # [R, E]

    low, high = np.log([[x[0] for x in grid], [x[-1] for x in grid]])
    step = np.log([x[1] / x[0] for x in grid])
    cells = np.stack(np.meshgrid(*[CELLS] * len(grid), indexing="ij"), axis=-1)
    cells = cells.reshape(-1, len(grid))
    every, root = np.arange(len(weights)), np.sqrt(weights)
    for _ in range(ROUNDS):
        tried = np.clip(at[:, None] + cells * step, low, high)  # [R, cells, E]
        scaled = terms(*np.moveaxis(np.exp(tried), -1, 0)) * (root / error)[:, None, :, None]
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

    Tries every subset of coefficients: with two or three of them there are few, and of small
    problems there are millions, which scipy.optimize.nnls would solve one by one. Returns the
    coefficients and the loss up to a constant.
    """
    unit = np.sqrt(np.diagonal(normal, axis1=-2, axis2=-1))  # terms are of any magnitude
    normal, target = normal / (unit[..., None] * unit[..., None, :]), target / unit
    best, least = np.zeros_like(target), np.zeros(target.shape[:-1])
    k = target.shape[-1]
    for chosen in itertools.chain(*(itertools.combinations(range(k), n + 1) for n in range(k))):
        rows = list(chosen)
        matrix = normal[..., rows, :][..., rows] * (1 + RIDGE * np.eye(len(rows)))
        solution = np.linalg.solve(matrix, target[..., rows, None])[..., 0]
        loss = -(solution * target[..., rows]).sum(-1)
        better = (solution >= 0).all(-1) & (loss < least)
        least = np.where(better, loss, least)
        full = np.zeros_like(target)
        full[..., rows] = solution
        best = np.where(better[..., None], full, best)
    return best / unit, least


# ------------------------------------------------------------------ the frontier


def bin_edges(compute: Float[np.ndarray, " n"], bins: int = BINS) -> Float[np.ndarray, " edges"]:
    """Edges of equal-width bins of log10 C over [min, max + 0.1], as Cherti et al. bin."""
    log = np.log10(compute)
    return np.linspace(log.min(), log.max() + 0.1, bins + 1)


def frontier(
    compute: Float[np.ndarray, " n"],
    error: Float[np.ndarray, "*R n"],
    edges: Float[np.ndarray, " edges"],
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, "*R bins"]]:
    """Find the least error of each bin; it stands at the bin's centre.

    Returns compute `[bins]` and error `[..., bins]`, infinite where a bin is empty. A run with
    infinite error takes no part.
    """
    bin_of_run = np.digitize(np.log10(compute), edges) - 1
    least = [np.where(bin_of_run == i, error, np.inf).min(axis=-1) for i in range(len(edges) - 1)]
    return 10 ** ((edges[1:] + edges[:-1]) / 2), np.stack(least, axis=-1)


def pareto(runs: Runs) -> Bool[np.ndarray, " n"]:
    """Say which runs no other beats with as little compute."""
    as_cheap = runs.compute[None] <= runs.compute[:, None]
    better = runs.error[None] < runs.error[:, None]
    return ~np.any(as_cheap & better, axis=1)
