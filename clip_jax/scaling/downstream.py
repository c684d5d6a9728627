"""Relate two metrics of runs, such as accuracy to loss, or robustness to ImageNet accuracy.

Scores are taken as logits and losses as logarithms, in which such relations are close to straight
lines (Taori et al. 2020, arXiv:2007.00644; Miller et al. 2021, arXiv:2107.04649). So the odds of an
error are a power of the loss: a law of the loss predicts an accuracy in two steps.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from clip_jax.errors import InputError
from clip_jax.scaling import run_table
from clip_jax.scaling.columns import numeric
from clip_jax.scaling.run_table import Selection, is_score, text
from clip_jax.storage.files import AnyPath


@dataclass(frozen=True, kw_only=True)
class RelateConfig(Selection):
    """Fit a metric of runs against another one."""

    table: AnyPath  # Table of runs (CSV), as written by `scale collect`.
    metric: str  # Column to predict, such as imagenet1k_acc1 or imagenetv2_acc1.
    against: str  # Column to predict it from, such as info_nce or imagenet1k_acc1.
    # Values of `against` to predict the metric at, as VALUE, or as VALUE:LOW:HIGH with the 95%
    # interval of a loss that `scale fit` predicts.
    at: tuple[str, ...] = ()
    # Column that divides runs into families. States how far each lies above or below the line.
    compare: str | None = None
    baseline: str | None = None  # Family of the line. None: all runs, for a family all others.

    def __post_init__(self) -> None:
        if self.baseline is not None and self.compare is None:
            raise InputError("baseline names a family; set --compare to the column of families.")
        if self.metric == self.against:
            raise InputError(f"metric and against are both {self.metric!r}; set two metrics.")


class Linear(NamedTuple):
    """y = x · coefficients; the coefficient of a column of zeros is 0."""

    coefficients: Float[np.ndarray, " k"]
    covariance: Float[np.ndarray, "k k"]
    variance: float  # of an observation
    t: float  # quantile of Student's t for 95% intervals

    def predict(self, x: Float[np.ndarray, " k"], n: int = 1) -> tuple[float, float]:
        """Return the mean of `n` new observations at x, and half of its 95% interval."""
        half = self.t * np.sqrt(x @ self.covariance @ x + self.variance / n)
        return float(x @ self.coefficients), float(half)

    def coefficient(self, i: int) -> tuple[float, float]:
        """Return a coefficient, and half of its 95% interval."""
        return float(self.coefficients[i]), self.t * float(self.covariance[i, i]) ** 0.5


def least_squares(x: Float[np.ndarray, "n k"], y: Float[np.ndarray, " n"]) -> Linear:
    """Fit y by ordinary least squares. Needs more observations than independent columns."""
    freedom = len(y) - int(np.linalg.matrix_rank(x))
    inverse = np.linalg.pinv(x)
    coefficients = inverse @ y
    variance = float(np.sum((y - x @ coefficients) ** 2) / freedom)
    t = float(special.stdtrit(freedom, 0.975))
    return Linear(coefficients, variance * inverse @ inverse.T, variance, t)


def fit_line(u: Float[np.ndarray, " n"], v: Float[np.ndarray, " n"]) -> Linear:
    """Fit v = slope · u + intercept. Raises InputError for two runs, or if all have the same u."""
    if len(u) < 3 or np.ptp(u) == 0:
        raise InputError(
            f"{len(u)} runs do not determine a line; it needs three or more, with different values "
            "of --against. Add runs, or change --where, --compare or --baseline."
        )
    return least_squares(np.vander(u, 2), v)


def is_curved(u: Float[np.ndarray, " n"], v: Float[np.ndarray, " n"]) -> bool:
    """Return whether a parabola fits five or more runs better than a line, at a level of 1%."""
    if len(u) < 5 or len({*u.tolist()}) < 3:
        return False
    bend, covariance = np.polyfit(u - u.mean(), v, 2, cov=True)
    return bool(abs(bend[0]) > special.stdtrit(len(u) - 3, 0.995) * covariance[0, 0] ** 0.5)


def relate(config: RelateConfig) -> dict[str, Any]:
    """Return the line, its predictions and the families' distances from it, as JSON values.

    Raises InputError for values that have no logit or logarithm, and for too few runs.
    """
    table = run_table.read(config.table, config.columns).select(config.against, config.where)
    table = table.select(config.metric)
    table.check(*([config.compare] if config.compare else []))
    u, v = (straight(name, table.numbers(name)) for name in (config.against, config.metric))
    names = np.array([text(row, config.compare or "") for row in table.rows])
    if config.baseline is not None and config.baseline not in names:
        raise InputError(
            f"baseline={config.baseline!r} is no family of {config.compare}, which are "
            f"{', '.join(sorted({*names.tolist()}))}; choose one of them."
        )
    base = np.ones(len(u), bool) if config.baseline is None else names == config.baseline
    line = fit_line(u[base], v[base])
    slope, reach = line.coefficient(0)
    intercept, _ = line.coefficient(1)
    predictions = {}
    families = {}
    outside = []
    for value in config.at:
        at = _at(config.against, value)
        middle, half = line.predict(np.array([at[0], 1.0]))
        half = float(np.hypot(half, slope * np.ptp(at) / 2))  # with the interval of the value
        predicted, *interval = _back(config.metric, middle, half)
        predictions[value] = {"value": predicted, "interval": interval}
        if _is_outside(at, u[base]):
            outside.append(f"{config.against} {value}")
    for name in sorted({*names.tolist()} - {"", config.baseline}):
        members = names == name
        count = int(members.sum())
        others = ~members if config.baseline is None else base
        at = np.array([u[members].mean(), 1.0])
        expected, half = fit_line(u[others], v[others]).predict(at, count)
        level, _, _ = _back(config.metric, expected, 0.0)
        measured = _back(config.metric, float(v[members].mean()), half)
        difference, *interval = (x - level for x in measured)
        families[name] = {"runs": count, "difference": difference, "interval": interval}
        if _is_outside(u[members], u[others]):
            outside.append(name)
    warnings = [f"{x} lies outside the range of the line's runs: extrapolated" for x in outside]
    if is_curved(u[base], v[base]):
        warnings.append("the runs curve away from the line, so its predictions are biased")
    return {
        "metric": config.metric,
        "against": config.against,
        "runs": int(base.sum()),
        "slope": {"value": slope, "interval": [slope - reach, slope + reach]},
        "intercept": intercept,
        "spread": line.variance**0.5,
        "warnings": warnings,
        "predictions": predictions,
        "families": families,
    }


def straight(metric: str, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return logits of a score, or logarithms of a loss. Raises InputError where there are none."""
    most = 1.0 if is_score(metric) else np.inf
    if not ((values > 0) & (values < most)).all():
        raise InputError(
            f"{metric} reaches from {values.min():g} to {values.max():g}; it must be above 0 and "
            f"below {most:g}. Exclude runs with --where, or convert a percentage with --columns."
        )
    return special.logit(values) if is_score(metric) else np.log(values)


def _at(metric: str, text: str) -> Float[np.ndarray, " n"]:
    """Read VALUE or VALUE:LOW:HIGH as logits or logarithms."""
    form = f"at={text!r}: write VALUE or VALUE:LOW:HIGH."
    try:
        numbers = [numeric(x) for x in text.split(":")]
        at = straight(metric, np.array(numbers))
    except ValueError as error:
        raise InputError(f"{form} {error}") from error
    if len(numbers) not in (1, 3) or not min(numbers[1:], default=0) <= numbers[0] <= numbers[-1]:
        raise InputError(f"{form} The value must be between LOW and HIGH.")
    return at


def _is_outside(u: Float[np.ndarray, " n"], runs: Float[np.ndarray, " m"]) -> bool:
    return bool(u.min() < runs.min() or u.max() > runs.max())


def _back(metric: str, middle: float, half: float) -> list[float]:
    """Return a value of the metric, and its interval, from where the line is straight."""
    back = special.expit if is_score(metric) else np.exp
    return [float(back(middle + x)) for x in (0.0, -half, half)]


def describe(result: dict[str, Any]) -> str:
    """Format the result of `relate` as text."""
    metric, against = result["metric"], result["against"]
    of, by = (f"logit({x})" if is_score(x) else f"ln({x})" for x in (metric, against))
    slope, (low, high) = result["slope"]["value"], result["slope"]["interval"]
    lines = [
        f"{of} = {result['intercept']:.4g} {slope:+.4g} · {by} through {result['runs']} runs",
        f"  slope {slope:.4g} (95%: {low:.4g} to {high:.4g})",
    ]
    form, factor, unit = (".1%", 100, " points") if is_score(metric) else (".4g", 1, "")
    for value, at in result["predictions"].items():
        middle, low, high = (format(x, form) for x in (at["value"], *at["interval"]))
        lines.append(f"{against} {value}: {metric} {middle} (95%: {low} to {high})")
    for name, at in result["families"].items():
        off, low, high = (f"{factor * x:+.3g}" for x in (at["difference"], *at["interval"]))
        lines.append(f"{name}, {at['runs']} runs: {off}{unit} from the line (95%: {low} to {high})")
    return "\n".join(lines + [f"warning: {line}" for line in result["warnings"]])
