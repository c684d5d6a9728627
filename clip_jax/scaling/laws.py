"""Scaling laws, their least-squares fits, and the frontier of runs.

Compute C is N · D. Size N is the forward multiply-adds of one image-text pair, since these differ
between models with equal numbers of parameters, such as ViT-B/32 and B/16. D is samples seen. The
units are the caller's, and β's unit follows from them. Two laws use a third quantity of a run: the
number of distinct samples, or the batch size.

A new form is a subclass of `Law`: its terms, coefficients, the grid on which a search begins, and
`NEEDS`, the quantities of which runs must have three values for each parameter to be determined.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize

BINS = 5  # of the frontier, as in Cherti et al. 2023
TRAINING_FLOPS = 6e9  # per forward GMAC: 2 FLOPs per multiply-add × 3 for both passes

# Grid search for the parameters in which a law is not linear.
EXPONENTS = np.geomspace(0.01, 3.0, 24)  # first grid for an exponent
STEEP = np.array([3.0])  # the exponent of a quantity with one or two values
FADES = np.geomspace(0.1, 1_000, 12)  # first grid for Repeated.fade, in epochs
HALF = np.array([0.5])  # the exponents of Batched in theory
OF_BATCH = np.geomspace(0.1, 2.0, 5)  # first grid for these exponents
BATCHES = 5  # batch sizes that determine them
SAME = 1e-3  # smallest offset, as a share of the smallest compute
CELLS = np.linspace(-1, 1, 5)  # refined grid, in steps of the previous one
FEW_CELLS = CELLS[::2]  # of four exponents or more, whose grid would be too large
ROUNDS = 11  # each halves the step, to 2⁻¹¹ of the first grid's
RIDGE = 1e-12  # keeps a matrix invertible if two terms coincide
DIVISIONS = 400  # sizes of which the best one is chosen
TINY = 1e-300  # least prediction that has a logarithm
BETTER = 1e-7  # share of the squares by which another law must be better
ZERO = 1e-9  # share of the error below which a term is zero
AT_ONCE = 2_000_000  # numbers per array of terms; uses a few hundred MB

Numbers = np.ndarray | np.floating | float  # NumPy turns arrays without axes into scalars
Quantity = str  # size, samples, compute or third: names of what Runs have


class Runs(NamedTuple):
    """Measured runs: sizes, samples, errors and labels."""

    size: Float[np.ndarray, " n"]  # forward multiply-adds of one pair
    samples: Float[np.ndarray, " n"]  # pairs seen in training
    error: Float[np.ndarray, " n"]  # 1 − accuracy, or a loss; positive
    third: Float[np.ndarray, " n"] | None = None  # third quantity, for Repeated and Batched
    model: np.ndarray | None = None  # names, for the colours of a plot
    length: np.ndarray | None = None  # samples as text, for the markers of a plot
    # Other quantities that a law without them may miss, such as batch sizes.
    others: Float[np.ndarray, "n k"] | None = None
    setting: np.ndarray | None = None  # equal for runs that differ in nothing but their seeds
    run: np.ndarray | None = None  # names of runs, of which several points are checkpoints
    binomial: Float[np.ndarray, " n"] | None = None  # variance of the error by few test samples

    @property
    def compute(self) -> Float[np.ndarray, " n"]:
        return self.size * self.samples

    def where(self, keep: Bool[np.ndarray, " n"] | Int[np.ndarray, " k"]) -> "Runs":
        held = {name: x[keep] for name, x in self._asdict().items() if x is not None}
        return self._replace(**held)

    def under(self, law: "Law") -> Numbers:
        """Evaluate a law for each run."""
        return law(self.size, self.samples, self.third)

    def values(self, quantity: Quantity) -> int:
        """Count the distinct values of a quantity; those within 2% of each other are one."""
        numbers = np.sort(np.log(getattr(self, quantity)))
        return 1 + int((np.diff(numbers) > 0.02).sum())


class Optimum(NamedTuple):
    """The best division of some compute by a law, and its error."""

    size: Numbers
    samples: Numbers
    error: Numbers


# ------------------------------------------------------------------ the laws


@dataclass(frozen=True)
class Law:
    """E = Σ coefficient · term, where the terms depend on the other parameters.

    Each parameter is a number, or an array for many laws.
    """

    COEFFICIENTS: ClassVar[tuple[str, ...]] = ()  # parameters that multiply the terms
    # For each parameter, the quantities of which runs must have three values, or another number.
    NEEDS: ClassVar[Mapping[str, tuple[Quantity, ...]]] = {}
    VALUES: ClassVar[Mapping[str, int]] = {}  # other numbers than three, by parameter

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    @property
    def parameters(self) -> dict[str, Numbers]:
        return {name: getattr(self, name) for name in self.names()}

    def map(self, function: Callable[[np.ndarray], Numbers]) -> "Law":
        """Apply a function to the array of each parameter."""
        return type(self)(*(function(np.asarray(x)) for x in self.parameters.values()))

    def terms(self, size: Numbers, samples: Numbers, third: Numbers | None) -> tuple[Numbers, ...]:
        """Return the factor of each of COEFFICIENTS."""
        raise NotImplementedError

    @classmethod
    def grid(cls, runs: Runs) -> tuple[np.ndarray, ...]:
        """Return the first grid of each parameter inside the terms, evenly spaced in log."""
        raise NotImplementedError

    def __call__(self, size: Numbers, samples: Numbers, third: Numbers | None = None) -> Numbers:
        terms = zip(self.COEFFICIENTS, self.terms(size, samples, third), strict=True)
        return sum(getattr(self, name) * term for name, term in terms)

    @classmethod
    def fitted(
        cls, runs: Runs, error: Float[np.ndarray, "#R n"], weights: Float[np.ndarray, "R n"]
    ) -> "Law":
        """Fit R tables of errors by squared residuals of log E; every parameter is `[R]`.

        The tables share the sizes, samples and third quantity of `runs`.
        """
        values, coefficients = search(cls.factors(runs), cls.grid(runs), error, weights)
        named = zip((*cls.inside(), *cls.COEFFICIENTS), (*values.T, *coefficients.T), strict=True)
        return cls(**dict(named))

    @classmethod
    def inside(cls) -> tuple[str, ...]:
        """Return the names of the parameters inside the terms, in which a law is not linear."""
        return tuple(name for name in cls.names() if name not in cls.COEFFICIENTS)

    @classmethod
    def factors(cls, runs: Runs) -> Callable[..., np.ndarray]:
        """Return the function from parameters inside the terms, `[...]`, to terms `[..., K, n]`."""

        def terms(*values: np.ndarray | np.floating) -> np.ndarray:
            law = cls(
                **{
                    name: np.expand_dims(x, -1)
                    for name, x in zip(cls.inside(), values, strict=True)
                },
                **dict.fromkeys(cls.COEFFICIENTS, 1.0),
            )
            each = law.terms(runs.size, runs.samples, runs.third)
            return np.stack(np.broadcast_arrays(*each, runs.size)[:-1], axis=-2)

        return terms

    @classmethod
    def free(cls, runs: Runs) -> int:
        """Count the parameters that these runs determine, for degrees of freedom."""
        return len(cls.names())

    def optimum(self, compute: Numbers, sizes: tuple[float, float]) -> Optimum:
        """Divide compute such that the error is lowest, with new samples in small batches.

        `sizes` are the smallest and largest allowed size. A law of compute alone has nothing to
        divide, so its size is 1.
        """
        size = np.ones_like(compute * next(iter(self.parameters.values())))
        return Optimum(size, compute * size, self(compute, size))


@dataclass(frozen=True)
class PowerLaw(Law):
    """E = beta · C^alpha, with negative alpha as in Cherti et al."""

    NEEDS: ClassVar = {"alpha": ("compute",), "beta": ("compute",)}
    alpha: Numbers
    beta: Numbers

    def __call__(self, size: Numbers, samples: Numbers, third: Numbers | None = None) -> Numbers:
        # In logarithms, since factors of steep lines may overflow where the law does not.
        with np.errstate(over="ignore"):
            return np.exp(np.log(self.beta) + self.alpha * np.log(size * samples))

    @classmethod
    def fitted(
        cls, runs: Runs, error: Float[np.ndarray, "#R n"], weights: Float[np.ndarray, "R n"]
    ) -> "Law":
        """Fit straight lines in log-log."""
        x = np.log(runs.compute)
        y = np.log(error)
        total = weights.sum(-1)
        x_mean = (weights * x).sum(-1) / total
        y_mean = (weights * y).sum(-1) / total
        dx = x - x_mean[:, None]
        dy = y - y_mean[:, None]
        # A single bin has no slope: NaN. That of two may be too steep for a float.
        with np.errstate(invalid="ignore", over="ignore"):
            slope = (weights * dx * dy).sum(-1) / (weights * dx * dx).sum(-1)
            beta = np.exp(y_mean - slope * x_mean)
        return cls(slope, np.where(beta > 0, beta, np.nan))


@dataclass(frozen=True)
class Saturating(Law):
    """E = irreducible + scale · (C + offset)^−alpha."""

    COEFFICIENTS = ("scale", "irreducible")
    NEEDS: ClassVar = dict.fromkeys(("alpha", "offset", "scale", "irreducible"), ("compute",))
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

    Hoffmann et al. 2022, equation 2. Unlike laws of compute, it distinguishes sizes.
    """

    COEFFICIENTS = ("size_scale", "samples_scale", "irreducible")
    NEEDS: ClassVar = {
        "size_alpha": ("size",),
        "size_scale": ("size",),
        "samples_alpha": ("samples",),
        "samples_scale": ("samples",),
        "irreducible": ("size", "samples"),
    }
    size_alpha: Numbers
    samples_alpha: Numbers
    size_scale: Numbers
    samples_scale: Numbers
    irreducible: Numbers

    def worth(self, samples: Numbers, third: Numbers) -> Numbers:
        """Return the equivalent number of new samples seen in small batches."""
        return samples

    def terms(self, size: Numbers, samples: Numbers, third: Numbers | None) -> tuple[Numbers, ...]:
        worth = samples if third is None else self.worth(samples, third)
        return size**-self.size_alpha, worth**-self.samples_alpha, 1.0

    @classmethod
    def exponents(cls, runs: Runs, every: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return the first grid of both exponents.

        Two sizes are two constants, whatever the exponent: a steep one can express any difference.
        """
        free = (runs.values("size") > 2, runs.values("samples") > 2)
        sizes, samples = (EXPONENTS[::every] if x else STEEP for x in free)
        return sizes, samples

    @classmethod
    def grid(cls, runs: Runs) -> tuple[np.ndarray, ...]:
        return cls.exponents(runs)

    @classmethod
    def free(cls, runs: Runs) -> int:
        # Of size and of samples: nothing from one value, a difference from two.
        missing = (max(3 - runs.values(name), 0) for name in ("size", "samples"))
        return len(cls.names()) - sum(missing)

    @property
    def size_exponent(self) -> Numbers:
        """The exponent of compute with which the best size grows."""
        return self.samples_alpha / (self.size_alpha + self.samples_alpha)

    def optimum(self, compute: Numbers, sizes: tuple[float, float]) -> Optimum:
        """Divide compute such that the error is lowest: Hoffmann et al. 2022, equation 4."""
        a, b = self.size_alpha, self.samples_alpha
        # Size or samples may not matter: then the other has all compute; or neither.
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            ratio = np.asarray(a * self.size_scale) / (b * self.samples_scale)
            ratio = np.nan_to_num(ratio, nan=1.0, posinf=np.inf)
            size = np.clip((ratio * compute**b) ** (1 / (a + b)), *sizes)
        return Optimum(size, compute / size, self(size, compute / size))

    def searched(self, compute: Numbers, sizes: tuple[float, float]) -> Optimum:
        """Divide compute by a search of sizes, for laws whose best size has no closed form."""
        axes = (1,) * np.ndim(compute * self.irreducible)
        size = np.geomspace(*sizes, DIVISIONS).reshape(-1, *axes)
        error = np.asarray(self(size, compute / size))
        best = np.take_along_axis(size + 0 * error, error.argmin(0)[None], 0)[0]
        return Optimum(best, compute / best, error.min(0))


@dataclass(frozen=True)
class Repeated(Additive):
    """The additive law for repeated samples (Muennighoff et al. 2023, arXiv:2305.16264).

    Repeated samples are worth less each time: U distinct samples seen D / U times count as
    U·(1 + fade·(1 − exp(−(D / U − 1) / fade))), so repetitions are worth at most `fade` epochs. The
    third quantity is the number of distinct samples; None: all.
    """

    NEEDS: ClassVar = {**Additive.NEEDS, "fade": ("samples", "third")}
    fade: Numbers  # R* of the paper: epochs after which one more is worth 1/e of a new one

    def worth(self, samples: Numbers, third: Numbers) -> Numbers:
        distinct = np.minimum(third, samples)
        return distinct * (1 - self.fade * np.expm1(-(samples / distinct - 1) / self.fade))

    @classmethod
    def grid(cls, runs: Runs) -> tuple[np.ndarray, ...]:
        return *cls.exponents(runs, every=3), FADES


@dataclass(frozen=True)
class Batched(Additive):
    """The additive law + negatives·batch^−n + steps·(batch / D)^s, which has a best batch size.

    A contrastive loss gains from the negatives of a larger batch: optimization errs by
    O(batch^−½) for too few of them (Yuan et al. 2022, arXiv:2202.12387, theorem 1). It loses from
    fewer steps, D / batch, as stochastic gradients do: O(steps^−½). So both exponents are ½, unless
    runs have five batch sizes, which determine them. The best batch size is
    (n·negatives / (s·steps) · D^s)^(1 / (n + s)). The third quantity is the batch size; None: the
    best one.
    """

    COEFFICIENTS = (*Additive.COEFFICIENTS, "negatives", "steps")
    NEEDS: ClassVar = {
        **Additive.NEEDS,
        **dict.fromkeys(("negatives", "steps", "negatives_alpha", "steps_alpha"), ("third",)),
    }
    VALUES: ClassVar = {"negatives_alpha": BATCHES, "steps_alpha": BATCHES}
    negatives: Numbers
    steps: Numbers
    negatives_alpha: Numbers = 0.5
    steps_alpha: Numbers = 0.5

    def best_batch(self, samples: Numbers) -> Numbers:
        """Return the batch size with the lowest error, inf or 0 if only one term counts."""
        gain = np.asarray(self.negatives) * self.negatives_alpha
        loss = np.asarray(self.steps) * self.steps_alpha
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = gain / loss * np.asarray(samples) ** self.steps_alpha
            best = ratio ** (1 / (self.negatives_alpha + self.steps_alpha))
        return np.nan_to_num(best, nan=1.0, posinf=np.inf)

    def batch_to_use(self, samples: Numbers) -> Numbers:
        """Return the best batch size, of at least one and at most all samples."""
        return np.clip(self.best_batch(samples), 1.0, samples)

    def terms(self, size: Numbers, samples: Numbers, third: Numbers | None) -> tuple[Numbers, ...]:
        rest = size**-self.size_alpha, samples**-self.samples_alpha, 1.0
        if third is None:
            third = self.batch_to_use(samples)
        return *rest, third**-self.negatives_alpha, (third / samples) ** self.steps_alpha

    @classmethod
    def grid(cls, runs: Runs) -> tuple[np.ndarray, ...]:
        if cls.has_batches(runs):
            return *cls.exponents(runs, every=3), OF_BATCH, OF_BATCH
        return *cls.exponents(runs, every=2), HALF, HALF

    @classmethod
    def has_batches(cls, runs: Runs) -> bool:
        """Return whether runs have batch sizes enough to determine both exponents."""
        return runs.third is not None and runs.values("third") >= BATCHES

    @classmethod
    def free(cls, runs: Runs) -> int:
        return super().free(runs) - (0 if cls.has_batches(runs) else 2)

    def optimum(self, compute: Numbers, sizes: tuple[float, float]) -> Optimum:
        """Divide compute such that the error is lowest, each at its best batch size."""
        return self.searched(compute, sizes)


LAWS: dict[str, type[Law]] = {
    "power": PowerLaw,
    "saturating": Saturating,
    "additive": Additive,
    "repeated": Repeated,
    "batched": Batched,
}


# ------------------------------------------------------------------ least squares


def search(
    terms: Callable[..., np.ndarray],
    grid: tuple[np.ndarray, ...],
    error: Float[np.ndarray, "#R n"],
    weights: Float[np.ndarray, "R n"],
) -> tuple[Float[np.ndarray, "R E"], Float[np.ndarray, "R K"]]:
    """Minimise Σ weights·(log error − log prediction)² by variable projection.

    For fixed exponents, the best nonnegative coefficients have a closed form once the logarithm
    is linearised around the previous round's prediction; a grid, refined around its best cell,
    finds the exponents. Unlike gradient methods, this does not depend on a start, and it solves
    thousands of tables at once.

    `terms` maps arrays `[...]`, one per exponent, to `[..., K, n]`. `grid` is the first grid:
    increasing positive values of each exponent, evenly spaced in log. Returns the exponents and
    the K coefficients of each table.
    """
    axes = sum(len(x) > 1 for x in grid)
    of_axis = CELLS if axes < 4 else FEW_CELLS
    at_once = max(AT_ONCE // (len(of_axis) ** axes * weights.shape[1]), 1)
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
    products = shared[:, :, None] * shared[:, None]  # [G, K, K, n]
    normal = np.moveaxis(products @ (weights / error**2).T, -1, 0)
    target = np.moveaxis(shared @ (weights / error).T, -1, 0)
    coefficients, loss = nonnegative(normal, target)
    at = np.log(first)[loss.argmin(axis=1)]  # [R, E]

    low, high = np.log([[x[0] for x in grid], [x[-1] for x in grid]])
    step = np.log([x[1] / x[0] if len(x) > 1 else 1.0 for x in grid])
    steps = np.meshgrid(*[of_axis if len(x) > 1 else [0.0] for x in grid], indexing="ij")
    cells = np.stack(steps, axis=-1).reshape(-1, len(grid))
    every = np.arange(len(weights))
    root = np.sqrt(weights)
    coefficients = coefficients[every, loss.argmin(axis=1)]
    for _ in range(ROUNDS):
        predicted = (coefficients[:, None] @ terms(*np.exp(at).T))[:, 0]
        around = np.clip(predicted, error / 3, error * 3)
        tried = np.clip(at[:, None] + cells * step, low, high)  # [R, cells, E]
        scaled = terms(*np.moveaxis(np.exp(tried), -1, 0)) * (root / around)[:, None, None]
        target = root * linearised(error, around)
        aimed = (scaled @ target[:, None, :, None])[..., 0]
        solution, loss = nonnegative(scaled @ scaled.swapaxes(-1, -2), aimed)
        best = loss.argmin(axis=1)
        at = tried[every, best]
        coefficients = solution[every, best]
        step = step / 2
    return np.exp(at), coefficients


def fit_one(kind: type[Law], runs: Runs, weights: Float[np.ndarray, " n"]) -> Law:
    """Fit one table: by the search of `kind`, and from there to all digits by SciPy."""
    law = kind.fitted(runs, runs.error[None], weights[None]).map(lambda x: x[0])
    return fit_near(law, runs, weights)


def fit_near(law: Law, runs: Runs, weights: Float[np.ndarray, " n"]) -> Law:
    """Fit one table to all digits, from a law that is close."""
    kind = type(law)
    if not kind.COEFFICIENTS:
        return law  # a straight line in log-log, which is exact
    bounds = np.log([[x[0], x[-1]] for x in kind.grid(runs)])
    free = bounds[:, 1] > bounds[:, 0]
    count = int(free.sum())
    inside = np.log([float(law.parameters[name]) for name in kind.inside()])
    coefficients = np.array([float(law.parameters[name]) for name in kind.COEFFICIENTS])
    terms = kind.factors(runs)
    unit = terms(*np.exp(inside)).max(axis=-1) / np.median(runs.error)
    root = np.sqrt(weights)

    def law_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        moved = inside.copy()
        moved[free] = values[:count]
        return np.exp(moved), values[count:] / unit

    def residuals(values: np.ndarray) -> np.ndarray:
        powers, factors = law_of(values)
        return root * np.log(np.maximum(factors @ terms(*powers), TINY) / runs.error)

    low = np.concatenate([bounds[free, 0], np.zeros(len(unit))])
    high = np.concatenate([bounds[free, 1], np.full(len(unit), np.inf)])
    start = np.clip([*inside[free], *(coefficients * unit)], low, high)
    solved = optimize.least_squares(
        residuals, start, bounds=(low, high), x_scale="jac", xtol=1e-12, ftol=1e-13, gtol=1e-12
    )
    if solved.cost > (1 - BETTER) * 0.5 * np.square(residuals(start)).sum():
        return law
    powers, factors = law_of(np.where(solved.x < ZERO, np.where(low == 0, 0.0, solved.x), solved.x))
    named = dict(zip((*kind.inside(), *kind.COEFFICIENTS), (*powers, *factors), strict=True))
    # A term that vanishes says nothing about its exponent, but the search says where it ended.
    vanished = [x for x in kind.COEFFICIENTS if x != "irreducible" and named[x] == 0]
    return law if vanished else kind(**named)


def faces(count: int) -> list[list[int]]:
    """Return the nonempty subsets of coefficients."""
    some = (itertools.combinations(range(count), n + 1) for n in range(count))
    return [list(face) for face in itertools.chain(*some)]


def inverses(normal: Float[np.ndarray, "*B k k"]) -> Float[np.ndarray, "*B k k"]:
    """Invert matrices of very different magnitudes, some of them singular."""
    unit = np.sqrt(np.diagonal(normal, axis1=-2, axis2=-1))
    scaled = normal / (unit[..., None] * unit[..., None, :])
    ridge = RIDGE * np.eye(normal.shape[-1])
    return np.linalg.inv(scaled + ridge) / (unit[..., None] * unit[..., None, :])


def linearised(error: np.ndarray, around: np.ndarray) -> np.ndarray:
    """Return targets for prediction / `around`, with the residuals of log E to first order."""
    return 1 + np.log(error / around)


def nonnegative(
    normal: Float[np.ndarray, "*B K K"], target: Float[np.ndarray, "*B K"]
) -> tuple[Float[np.ndarray, "*B K"], Float[np.ndarray, "*B"]]:
    """Solve nonnegative least squares from the normal equations.

    Tries every subset of coefficients: two or three have few, and there are millions of problems,
    which scipy.optimize.nnls would solve one by one. Returns the coefficients, and the loss up to a
    constant.
    """
    unit = np.sqrt(np.diagonal(normal, axis1=-2, axis2=-1))
    scaled = normal / (unit[..., None] * unit[..., None, :]) + RIDGE * np.eye(unit.shape[-1])
    aimed = np.moveaxis(target / unit, -1, 0)
    best = np.zeros_like(aimed)
    least = np.zeros(target.shape[:-1])
    rows = np.concatenate([np.moveaxis(scaled, (-2, -1), (0, 1)), aimed[:, None]], axis=1)
    for face, solution in _solutions(rows, []):
        loss = -(solution * aimed[face]).sum(0)
        better = (solution >= 0).all(0) & (loss < least)
        least = np.where(better, loss, least)
        best = np.where(better, 0.0, best)
        best[face] = np.where(better, solution, best[face])
    return np.moveaxis(best, 0, -1) / unit, least


def _solutions(
    rows: Float[np.ndarray, "K L *B"], face: list[int]
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield all sets of coefficients that begin with `face`, and the solutions for these alone.

    `rows` are normal equations with their targets, in which those of `face` are solved. Each set
    takes one more elimination (the sweep operator, Goodnight 1979), for all problems at once.
    """
    for i in range(max(face, default=-1) + 1, len(rows)):
        solved = rows[i] / rows[i, i]
        others = rows - rows[:, i, None] * solved
        others[i] = solved
        longer = [*face, i]
        yield longer, others[longer, -1]
        yield from _solutions(others, longer)


# ------------------------------------------------------------------ the frontier


def bin_edges(compute: Float[np.ndarray, " n"], bins: int = BINS) -> Float[np.ndarray, " edges"]:
    """Return edges of equal-width bins of log10 C over [min, max + 0.1], as in Cherti et al."""
    log = np.log10(compute)
    return np.linspace(log.min(), log.max() + 0.1, bins + 1)


def frontier(
    compute: Float[np.ndarray, " n"],
    error: Float[np.ndarray, "*R n"],
    edges: Float[np.ndarray, " edges"],
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, "*R bins"]]:
    """Return the compute at the centre of each bin, `[bins]`, and its lowest error, `[..., bins]`.

    The error of an empty bin is infinite. Runs with infinite error do not count.
    """
    bin_of_run = np.digitize(np.log10(compute), edges) - 1
    least = [np.where(bin_of_run == i, error, np.inf).min(axis=-1) for i in range(len(edges) - 1)]
    return 10 ** ((edges[1:] + edges[:-1]) / 2), np.stack(least, axis=-1)


def pareto(runs: Runs) -> Bool[np.ndarray, " n"]:
    """Return which runs no other run beats with at most their compute."""
    as_cheap = runs.compute[None] <= runs.compute[:, None]
    better = runs.error[None] < runs.error[:, None]
    return ~np.any(as_cheap & better, axis=1)
