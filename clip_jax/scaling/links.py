"""Scales on which laws describe the error of a score.

A law of the error itself cannot describe scores that start at chance, since an error cannot exceed
one. The odds of an error and the negative logarithm of a score have no such bound. Every law can be
fitted on each scale; in generalized linear models these are link functions (McCullagh and Nelder
1989, section 2.2). A saturating law of the odds is a sigmoid in log compute.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

Numbers = np.ndarray | np.floating | float
LinkName = Literal["error", "odds", "log_score"]
LEAST = 1e-6  # smallest score above chance that a link describes
NEAR_CHANCE = 0.25  # share of the range of scores above chance in which a table starts at chance


@dataclass(frozen=True)
class Link:
    """An increasing function of the error, which a law describes."""

    name: LinkName = "error"
    chance: float = 0.0  # score of random guesses
    least: float = LEAST  # scores above chance are at least this

    def above_chance(self, error: Numbers) -> Numbers:
        """Return by how much scores exceed chance."""
        return np.maximum(1 - self.chance - np.asarray(error), self.least)

    def of(self, error: Numbers) -> Numbers:
        """Return the values that the law describes; all are positive."""
        if self.name == "error":
            return error
        above = self.above_chance(error)
        if self.name == "odds":
            return (1 - self.chance - above) / above
        return -np.log(above / (1 - self.chance))

    def error(self, value: Numbers) -> Numbers:
        """Return the errors of values, the inverse of `of`."""
        if self.name == "error":
            return value
        if self.name == "odds":
            return (1 - self.chance) / (1 + 1 / np.maximum(value, 1e-300))
        return -(1 - self.chance) * np.expm1(-np.asarray(value))

    def slope(self, error: Numbers) -> Numbers:
        """Return d log(value) / d error."""
        if self.name == "error":
            return 1 / np.asarray(error)
        above = self.above_chance(error)
        if self.name == "odds":
            return 1 / above + 1 / (1 - self.chance - above)
        return 1 / (above * self.of(error))


ERROR = Link()


def link_of(name: LinkName, error: Float[np.ndarray, " n"], chance: float = 0.0) -> Link:
    """Return a link for a table; scores at chance count as half of the smallest score above it."""
    if name == "error":
        return ERROR
    above = 1 - chance - error
    positive = above[above > 0]
    least = float(positive.min()) / 2 if len(positive) else LEAST
    return Link(name, chance, max(least, LEAST))


def starts_at_chance(error: Float[np.ndarray, " n"], chance: float = 0.0) -> bool:
    """Return whether the lowest score of a table is near chance.

    There the error is almost 1 and hardly changes, while the odds change by factors. So a power law
    of the error cannot describe such a table.
    """
    return float(1 - chance - error.max()) < NEAR_CHANCE * (1 - chance)


def margins(error: Numbers, least: float | None) -> Numbers:
    """Return the scale of validation errors: the logit of a score's error, or the log of an error.

    `least` is the smallest score that counts; None: the metric is not a score.
    """
    error = np.maximum(error, 1e-300)
    if least is None:
        return np.log(error)
    error = np.clip(error, LEAST, 1 - least)
    return np.log(error / (1 - error))


def from_margins(margin: Numbers, is_score: bool) -> Numbers:
    """Return the errors of margins."""
    if is_score:
        return 1 / (1 + np.exp(-np.clip(margin, -700, 700)))
    return np.exp(np.clip(margin, -700, 700))
