"""Further forms of laws: an interaction of size and samples, and a power law with a break."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from clip_jax.scaling.laws import LAWS, Additive, Law, Numbers, Optimum, Runs

BREAK = 0.3  # sharpness of a break: it takes about half a decade of compute to either side
SLOPES = np.geomspace(0.01, 3.0, 14)  # first grid of both exponents of a broken power law


@dataclass(frozen=True)
class Interaction(Additive):
    """The additive law + interaction · N^−size_alpha · D^−samples_alpha.

    Without an interaction, more samples are worth the same to every size. A positive one makes them
    worth more to small models.
    """

    COEFFICIENTS = (*Additive.COEFFICIENTS, "interaction")
    NEEDS: ClassVar = {**Additive.NEEDS, "interaction": ("size", "samples")}
    interaction: Numbers

    def terms(self, size: Numbers, samples: Numbers, third: Numbers | None) -> tuple[Numbers, ...]:
        by_size = size**-self.size_alpha
        by_samples = samples**-self.samples_alpha
        return by_size, by_samples, 1.0, by_size * by_samples

    @classmethod
    def grid(cls, runs: Runs) -> tuple[np.ndarray, ...]:
        return cls.exponents(runs, every=2)

    def optimum(self, compute: Numbers, sizes: tuple[float, float]) -> Optimum:
        """Divide compute such that the error is lowest."""
        return self.searched(compute, sizes)


@dataclass(frozen=True)
class Broken(Law):
    """E = irreducible + scale · C^−alpha · (1 + (C / breaks)^(1/f))^(f · (alpha − later_alpha)).

    A power law whose exponent changes from alpha to later_alpha at the compute `breaks`: one break
    of Caballero et al. 2023 (arXiv:2210.14891, equation 1). Runs hardly ever determine the break's
    sharpness f, which is fixed.
    """

    COEFFICIENTS = ("scale", "irreducible")
    NEEDS: ClassVar = dict.fromkeys(
        ("alpha", "later_alpha", "breaks", "scale", "irreducible"), ("compute",)
    )
    alpha: Numbers
    later_alpha: Numbers
    breaks: Numbers
    scale: Numbers
    irreducible: Numbers

    def terms(self, size: Numbers, samples: Numbers, third: Numbers | None) -> tuple[Numbers, ...]:
        compute = size * samples
        bent = np.logaddexp(0, np.log(compute / self.breaks) / BREAK) * BREAK
        steeper = self.alpha - self.later_alpha
        return np.exp(-self.alpha * np.log(compute) + steeper * bent), 1.0

    @classmethod
    def grid(cls, runs: Runs) -> tuple[np.ndarray, ...]:
        least, most = runs.compute.min(), runs.compute.max()
        return SLOPES, SLOPES, np.geomspace(least, most, 10)


FORMS: dict[str, type[Law]] = {**LAWS, "interaction": Interaction, "broken": Broken}
