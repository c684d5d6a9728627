"""Scales on which laws describe the error of a score.

A law of the error itself cannot describe scores that start at chance, since an error hardly exceeds
that of random guesses. The odds of an error and the negative logarithm of a score have no such
bound. Every law can be fitted on each scale; in generalized linear models these are link functions
(McCullagh and Nelder 1989, section 2.2). A saturating law of the odds is a sigmoid in log compute.

A contrastive loss starts at chance, too: random guesses among n pairs have log n. On these scales
the loss over that of random guesses is treated as an error.
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
    guesses: float = 1.0  # error of random guesses
    least: float = LEAST  # errors are less than that of random guesses by at least this

    def better(self, error: Numbers) -> Numbers:
        """Return by how much errors are less than that of random guesses."""
        return np.maximum(self.guesses - np.asarray(error), self.least)

    def of(self, error: Numbers) -> Numbers:
        """Return the values that the law describes; all are positive."""
        if self.name == "error":
            return error
        better = self.better(error)
        if self.name == "odds":
            return (self.guesses - better) / better
        return -np.log(better / self.guesses)

    def error(self, value: Numbers) -> Numbers:
        """Return the errors of values, the inverse of `of`."""
        if self.name == "error":
            return value
        if self.name == "odds":
            return self.guesses / (1 + 1 / np.maximum(value, 1e-300))
        return -self.guesses * np.expm1(-np.asarray(value))

    def slope(self, error: Numbers) -> Numbers:
        """Return d log(value) / d error."""
        if self.name == "error":
            return 1 / np.asarray(error)
        better = self.better(error)
        if self.name == "odds":
            return 1 / better + 1 / (self.guesses - better)
        return 1 / (better * self.of(error))


ERROR = Link()


def link_of(name: LinkName, error: Float[np.ndarray, " n"], guesses: float = 1.0) -> Link:
    """Return a link for a table; runs at chance count as half as far from it as the nearest one."""
    if name == "error":
        return ERROR
    better = guesses - error
    positive = better[better > 0]
    least = float(positive.min()) / 2 if len(positive) else LEAST
    return Link(name, guesses, max(least, LEAST))


def starts_at_chance(error: Float[np.ndarray, " n"], guesses: float = 1.0) -> bool:
    """Return whether the highest error of a table is near that of random guesses.

    There the error hardly changes, while the odds change by factors. So a power law of the error
    cannot describe such a table.
    """
    return float(guesses - error.max()) < NEAR_CHANCE * guesses


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
