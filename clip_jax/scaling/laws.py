"""Scaling laws as functions, and the frontier of the runs that they go through.

Compute C is size × samples; size N is the forward multiply-adds of one image-text pair, so that
ViT-B/32 and B/16, which have as many parameters, count as what they are; D is samples seen. The
units are the caller's, and β's unit follows from them.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

BINS = 5  # of the frontier: Cherti et al. 2023

Numbers = np.ndarray | np.floating | float  # NumPy turns an array without axes into a scalar


class Runs(NamedTuple):
    """Measured runs: what each cost and how wrong it is."""

    size: Float[np.ndarray, "n"]  # forward multiply-adds of one pair
    samples: Float[np.ndarray, "n"]  # pairs seen in training
    error: Float[np.ndarray, "n"]  # 1 − accuracy, or a loss; positive

    @property
    def compute(self) -> Float[np.ndarray, "n"]:
        return self.size * self.samples

    def where(self, keep: Bool[np.ndarray, "n"]) -> "Runs":
        return Runs(self.size[keep], self.samples[keep], self.error[keep])


class PowerLaw(NamedTuple):
    """E = beta · C^alpha; alpha is negative, as Cherti et al. print it."""

    alpha: Numbers
    beta: Numbers

    def __call__(self, size: Numbers, samples: Numbers) -> Numbers:
        return self.beta * (size * samples) ** self.alpha


class Saturating(NamedTuple):
    """E = irreducible + scale · (C + offset)^−alpha."""

    alpha: Numbers
    offset: Numbers
    scale: Numbers
    irreducible: Numbers

    def __call__(self, size: Numbers, samples: Numbers) -> Numbers:
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

    def __call__(self, size: Numbers, samples: Numbers) -> Numbers:
        of_size = self.size_scale * size**-self.size_alpha
        of_samples = self.samples_scale * samples**-self.samples_alpha
        return self.irreducible + of_size + of_samples


Law = PowerLaw | Saturating | Additive


def bin_edges(compute: Float[np.ndarray, "n"], bins: int = BINS) -> Float[np.ndarray, "edges"]:
    """Edges of equal-width bins of log10 C over [min, max + 0.1], as Cherti et al. bin."""
    log = np.log10(compute)
    return np.linspace(log.min(), log.max() + 0.1, bins + 1)


def frontier(
    compute: Float[np.ndarray, "n"],
    error: Float[np.ndarray, "*R n"],
    edges: Float[np.ndarray, "edges"],
) -> tuple[Float[np.ndarray, "bins"], Float[np.ndarray, "*R bins"]]:
    """Find the least error of each bin; it stands at the bin's centre.

    Returns compute `[bins]` and error `[..., bins]`, infinite where a bin is empty. A run with
    infinite error takes no part.
    """
    bin_of_run = np.digitize(np.log10(compute), edges) - 1
    least = [np.where(bin_of_run == i, error, np.inf).min(axis=-1) for i in range(len(edges) - 1)]
    return 10 ** ((edges[1:] + edges[:-1]) / 2), np.stack(least, axis=-1)


def pareto(runs: Runs) -> Bool[np.ndarray, "n"]:
    """Say which runs no other beats with as little compute."""
    as_cheap = runs.compute[None] <= runs.compute[:, None]
    better = runs.error[None] < runs.error[:, None]
    return ~np.any(as_cheap & better, axis=1)
