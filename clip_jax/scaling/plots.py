"""Plot a fit: runs, frontier, law with its 95% band, published laws, residuals."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from clip_jax.display import STYLE, plain
from clip_jax.scaling.laws import TRAINING_FLOPS, Additive, Law, Runs, pareto
from clip_jax.scaling.uncertainty import Fit, Prediction
from clip_jax.scaling.validation import Validation
from clip_jax.storage.files import AnyPath, written_whole

Axes = Any  # matplotlib's, which is imported only when something is drawn
Figure = Any

MARKERS = "osD^vPX*<>"
INK, OTHERS = "#222222", ("#c1440e", "#00798c", "#6b4c9a", "#7a7a00")


def figure(
    fit: Fit,
    *,
    others: Mapping[str, Law] | None = None,
    predictions: Mapping[str, tuple[float, Prediction]] | None = None,
    reach: float | None = None,
    error_label: str = "error",
    title: str = "",
) -> Figure:
    """Draw runs, frontier, fit and its band above the residuals, as a figure for a paper.

    `others` are published laws to draw, by label, in the same units. `predictions` are the compute
    and the prediction of runs that do not exist, by label. The law is drawn up to the compute
    `reach`, by default slightly beyond the runs.
    """
    import matplotlib
    from matplotlib.figure import Figure as NewFigure

    with matplotlib.rc_context(STYLE):
        page = NewFigure(figsize=(6.4, 4.6), layout="constrained")
        upper, lower = page.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
        panel(upper, fit, others=others, reach=reach)
        for label, (compute, prediction) in (predictions or {}).items():
            y, low, high = map(float, prediction)
            upper.errorbar(
                compute,
                y,
                yerr=[[y - low], [high - y]],
                marker="*",
                markersize=9,
                color=INK,
                markerfacecolor="white",
                capsize=2,
                linewidth=1,
                zorder=4,
            )
            upper.annotate(
                plain(label),
                (compute, high),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                rotation=90,
                fontsize=7,
            )
        off = 100 * (fit.runs.error / fit.errors(fit.runs) - 1)
        _points(lower, fit.runs, np.asarray(off), _in_fit(fit))
        lower.axhline(0, color=INK, linewidth=1)
        lower.set_xscale("log")
        lower.set_xlabel("compute: forward GMACs of a pair × pairs seen")
        lower.set_ylabel("deviation, %")
        lower.margins(y=0.15)
        top = upper.secondary_xaxis(
            "top", functions=(lambda c: c * TRAINING_FLOPS, lambda f: f / TRAINING_FLOPS)
        )
        top.set_xlabel("training FLOPs (3 × forward)")
        upper.set_ylabel(plain(error_label))
        upper.tick_params(labelbottom=False)
        page.suptitle(plain(title), x=0.01, ha="left", fontsize="medium")  # beside the legend
        entries = upper.get_legend_handles_labels()
        page.legend(*entries, loc="outside right upper", handletextpad=0.6)
        page.canvas  # noqa: B018 - creates the canvas of a figure without pyplot
    return page


def panel(
    axes: Axes, fit: Fit, *, others: Mapping[str, Law] | None = None, reach: float | None = None
) -> None:
    """Draw runs, frontier, the law with its band, and other laws on log-log axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    runs = fit.runs
    for model, color in _colors(runs).items():
        axes.plot([], [], linestyle="", marker="o", color=color, markersize=5, label=plain(model))
    for length, marker in _markers(runs).items():
        axes.plot(
            [],
            [],
            linestyle="none",
            marker=marker,
            markersize=5,
            markerfacecolor="none",
            markeredgecolor="#777777",
            label=f"{plain(length)} pairs",
        )
    _points(axes, runs, runs.error, _in_fit(fit))
    span = np.geomspace(runs.compute.min() / 1.6, reach or runs.compute.max() * 1.6, 200)
    size = np.ones_like(span)  # laws of compute alone take any
    if isinstance(fit.law, Additive):  # a line per model, over the range of samples
        samples = np.geomspace(runs.samples.min() / 1.5, runs.samples.max() * 1.5, 100)
        for model, color in _colors(runs).items():
            size_of_model = runs.size[np.asarray(runs.model) == model][0]
            curve = fit.curve(np.full_like(samples, size_of_model), samples)
            _band(axes, samples * size_of_model, curve, color)
    else:
        _band(axes, span, fit.curve(span, size), INK, label="fit, 95% band")
        if len(fit.fitted.error) != len(runs.error):
            axes.plot(
                fit.fitted.compute,
                fit.link.error(fit.fitted.error),
                linestyle="none",
                marker="o",
                markersize=9,
                markerfacecolor="none",
                markeredgecolor=INK,
                label="points of the fit",
            )
    for (label, law), color in zip((others or {}).items(), OTHERS, strict=False):
        axes.plot(span, law(span, size), color=color, linewidth=1.2, dashes=(5, 2), label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#eeeeee", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)


def validation(checked: Validation, metric: str) -> Figure:
    """Draw the predicted against the measured metric of runs, for every cut of the table."""
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure as NewFigure
    from matplotlib.ticker import FuncFormatter

    with matplotlib.rc_context(STYLE):
        page = NewFigure(figsize=(5.2, 4.4), layout="constrained")
        axes = page.subplots()
        points = axes.scatter(
            checked.metric(checked.measured),
            checked.metric(checked.predicted),
            c=np.exp(checked.factor),
            norm=LogNorm(),
            cmap="viridis_r",
            s=9,
            linewidths=0,
            rasterized=True,
        )
        ends = axes.get_xlim()
        axes.plot(ends, ends, color=INK, linewidth=1, zorder=0)
        axes.set_xlim(ends)
        axes.set_xlabel(plain(f"measured {metric}"))
        axes.set_ylabel(plain(f"predicted {metric}"))
        bar = page.colorbar(points, label="extrapolation factor")
        for axis in (bar.ax.yaxis.set_major_formatter, bar.ax.yaxis.set_minor_formatter):
            axis(FuncFormatter(lambda y, _: f"{y:g}"))
        page.canvas  # noqa: B018 - creates the canvas of a figure without pyplot
    return page


def of_validation(stem: AnyPath) -> AnyPath:
    """Return the path without ending of the picture of a validation."""
    return stem.with_name(f"{stem.name}_validation")


def both(stem: AnyPath) -> list[AnyPath]:
    """Return the paths `stem.svg` and `stem.png`."""
    return [stem.with_name(stem.name + ending) for ending in (".svg", ".png")]


def save(figure: Figure, stem: AnyPath) -> list[AnyPath]:
    """Write a figure as SVG and PNG; return the paths."""
    import matplotlib

    paths = both(stem)
    with matplotlib.rc_context(STYLE):
        for path, how in zip(paths, ({"metadata": {"Date": None}}, {"dpi": 200}), strict=True):
            with written_whole(path) as partial:
                figure.savefig(partial, **how)
    return paths


def _points(
    axes: Axes, runs: Runs, height: Float[np.ndarray, " n"], solid: Bool[np.ndarray, " n"]
) -> None:
    """Draw one point per run: colour by model, marker by samples, faint if not `solid`."""
    colors, markers = _colors(runs), _markers(runs)
    names = zip(*map(np.asarray, (runs.model, runs.length)), strict=True)
    for x, y, is_solid, (model, length) in zip(runs.compute, height, solid, names, strict=True):
        axes.plot(
            x,
            y,
            marker=markers[length],
            markersize=5,
            color=colors[model],
            alpha=0.95 if is_solid else 0.3,
            markeredgewidth=0,
            zorder=3,
        )


def _band(axes: Axes, x: np.ndarray, curve: Prediction, color: Any, **how: Any) -> None:
    """Draw a line with its 95% band."""
    axes.plot(x, curve.error, color=color, linewidth=1.3, **how)
    axes.fill_between(x, curve.low, curve.high, color=color, alpha=0.12, linewidth=0)


def _in_fit(fit: Fit) -> Bool[np.ndarray, " n"]:
    """Return which runs the law describes: all, or those on the Pareto frontier."""
    n = len(fit.runs.error)
    is_all = fit.seeds.sum() == n  # points are means over seeds
    return np.ones(n, bool) if is_all else pareto(fit.runs)


def _ordered(names: np.ndarray | None, by: Float[np.ndarray, " n"]) -> list[str]:
    """Return each name once, sorted by the runs' values in `by`."""
    return [*dict.fromkeys(np.asarray(names)[np.argsort(by, kind="stable")].tolist())]


def _colors(runs: Runs) -> dict[str, Any]:
    """Return a colour per model, dark for small and light for large ones."""
    import matplotlib

    models = _ordered(runs.model, runs.size)
    shades = np.linspace(0.05, 0.85, max(len(models), 2))
    return dict(zip(models, matplotlib.colormaps["viridis"](shades), strict=False))


def _markers(runs: Runs) -> dict[str, str]:
    return dict(zip(_ordered(runs.length, runs.samples), itertools.cycle(MARKERS), strict=False))
