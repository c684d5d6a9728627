"""Scaling laws as functions, and the frontier of the runs that they go through.

Compute C is size × samples; size N is the forward multiply-adds of one image-text pair, so that
ViT-B/32 and B/16, which have as many parameters, count as what they are; D is samples seen. The
units are the caller's, and β's unit follows from them. Two laws take a third quantity of a run:
how many of its samples were distinct, or how many make a batch.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

BINS = 5  # of the frontier: Cherti et al. 2023

Numbers = np.ndarray | np.floating | float  # NumPy turns an array without axes into a scalar


class Runs(NamedTuple):
    """Measured runs: what each cost and how wrong it is."""

    size: Float[np.ndarray, " n"]  # forward multiply-adds of one pair
    samples: Float[np.ndarray, " n"]  # pairs seen in training
    error: Float[np.ndarray, " n"]  # 1 − accuracy, or a loss; positive
    third: Float[np.ndarray, " n"] | None = None  # what Repeated or Batched takes besides

    @property
    def compute(self) -> Float[np.ndarray, " n"]:
        return self.size * self.samples

    def where(self, keep: Bool[np.ndarray, " n"]) -> "Runs":
        third = None if self.third is None else self.third[keep]
        return Runs(self.size[keep], self.samples[keep], self.error[keep], third)

    def under(self, law: "Law") -> Numbers:
        """Evaluate a law for each run."""
        return law(self.size, self.samples, self.third)


class PowerLaw(NamedTuple):
    """E = beta · C^alpha; alpha is negative, as Cherti et al. print it."""

    alpha: Numbers
    beta: Numbers

    def __call__(self, size: Numbers, samples: Numbers, _: Numbers | None = None) -> Numbers:
        # In logarithms: of steep lines, the two factors may exceed a float where the law does not.
        with np.errstate(over="ignore"):
            return np.exp(np.log(self.beta) + self.alpha * np.log(size * samples))


class Saturating(NamedTuple):
    """E = irreducible + scale · (C + offset)^−alpha."""

    alpha: Numbers
    offset: Numbers
    scale: Numbers
    irreducible: Numbers

    def __call__(self, size: Numbers, samples: Numbers, _: Numbers | None = None) -> Numbers:
        return self.irreducible + self.scale * (size * samples + self.offset) ** -self.alpha


class Additive(NamedTuple):
    """E = irreducible + size_scale·N^−size_alpha + samples_scale·D^−samples_alpha.

    Hoffmann et al. 2022, equation 2.
    """

    size_alpha: Numbers
    samples_alpha: Numbers
    size_scale: Numbers
    samples_scale: Numbers
    irreducible: Numbers

    def __call__(self, size: Numbers, samples: Numbers, _: Numbers | None = None) -> Numbers:
        of_size = self.size_scale * size**-self.size_alpha
        of_samples = self.samples_scale * samples**-self.samples_alpha
        return self.irreducible + of_size + of_samples


class Repeated(NamedTuple):
    """The additive law of samples seen again (Muennighoff et al. 2023, arXiv:2305.16264).

    Seen again, samples are worth less each time: U distinct ones that are seen D / U times count as
    U·(1 + fade·(1 − exp(−(D / U − 1) / fade))), `fade` epochs' worth at the most.
    """

    size_alpha: Numbers
    samples_alpha: Numbers
    fade: Numbers  # R* of the paper: epochs after which another is worth 1/e of a new one
    size_scale: Numbers
    samples_scale: Numbers
    irreducible: Numbers

    def __call__(self, size: Numbers, samples: Numbers, third: Numbers | None = None) -> Numbers:
        """Evaluate the law; `third` is the number of distinct samples, by default all of them."""
        plain = Additive(*self[:2], *self[3:])
        return plain(size, samples if third is None else worth(samples, third, self.fade))


class Batched(NamedTuple):
    """The additive law with D / (1 + batch / critical) samples (McCandlish et al. 2018).

    At the critical batch, `critical` samples, twice as many are seen for an error as with very
    small batches, in twice as many steps as with very large ones (arXiv:1812.06162, equation 2.12).
    """

    size_alpha: Numbers
    samples_alpha: Numbers
    critical: Numbers
    size_scale: Numbers
    samples_scale: Numbers
    irreducible: Numbers

    def __call__(self, size: Numbers, samples: Numbers, third: Numbers | None = None) -> Numbers:
        """Evaluate the law; `third` is the batch, by default a very small one."""
        plain = Additive(*self[:2], *self[3:])
        return plain(size, samples if third is None else samples / (1 + third / self.critical))


def worth(samples: Numbers, distinct: Numbers, fade: Numbers) -> Numbers:
    """Return how many new samples those are worth that are seen in several epochs."""
    distinct = np.minimum(distinct, samples)
    return distinct * (1 - fade * np.expm1(-(samples / distinct - 1) / fade))


Law = PowerLaw | Saturating | Additive | Repeated | Batched
OF_SIZE = (Additive, Repeated, Batched)  # laws that tell sizes of equal compute apart


class Optimum(NamedTuple):
    """What a law says of the best division of some compute."""

    size: Numbers
    samples: Numbers
    error: Numbers


def optimum(law: Law, compute: Numbers, sizes: tuple[float, float]) -> Optimum:
    """Divide compute such that the error is least: Hoffmann et al. 2022, equation 4.

    Of new samples in small batches. `sizes` are the least and the largest that may be chosen. A law
    of compute alone has nothing to divide: its size is 1.
    """
    if not isinstance(law, OF_SIZE):
        one = np.ones_like(compute * law.alpha)
        return Optimum(one, compute * one, law(compute, one))
    a, b = law.size_alpha, law.samples_alpha
    with np.errstate(divide="ignore", over="ignore"):  # of draws where size or samples don't count
        ratio = a * law.size_scale / (b * law.samples_scale)
        size = np.clip((ratio * compute**b) ** (1 / (a + b)), *sizes)
    return Optimum(size, compute / size, law(size, compute / size))


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
