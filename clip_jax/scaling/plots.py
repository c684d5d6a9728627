"""Pictures of a fit: runs, frontier, law with its band, published laws beside it, residuals."""

import itertools
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from clip_jax.display import STYLE, plain
from clip_jax.scaling.laws import Additive, Law, Runs, pareto
from clip_jax.scaling.uncertainty import Fit, Prediction, crossing, ratios, sizes_of
from clip_jax.storage.files import AnyPath, written_whole

Axes = Any  # matplotlib's: imported only where something is drawn
Figure = Any

MARKERS = "osD^vPX*<>"
INK, OTHERS = "#222222", ("#c1440e", "#00798c", "#6b4c9a", "#7a7a00")
COMPUTE_LABEL = "compute: forward GMACs of a pair × pairs seen"


@contextmanager
def _page(error_label: str) -> Generator[tuple[Figure, Axes, Axes]]:
    """Make a column of a paper's page: log-log axes over flat ones, a legend beside them."""
    import matplotlib
    from matplotlib.figure import Figure as NewFigure

    with matplotlib.rc_context(STYLE):
        page = NewFigure(figsize=(6.4, 4.6), layout="constrained")
        upper, lower = page.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
        yield page, upper, lower
        upper.set_ylabel(plain(error_label))
        upper.tick_params(labelbottom=False)
        lower.set_xlabel(COMPUTE_LABEL)
        page.legend(
            *upper.get_legend_handles_labels(), loc="outside right upper", handletextpad=0.6
        )
        page.canvas  # noqa: B018 - a figure without pyplot makes its canvas at first use


def figure(
    fit: Fit,
    *,
    fit_label: str = "fit, 95% band",
    others: Mapping[str, Law] | None = None,
    predictions: Mapping[str, tuple[float, Prediction]] | None = None,
    reach: float | None = None,
    error_label: str = "error",
    training_flops: float | None = 6e9,
    title: str = "",
) -> Figure:
    """Draw runs, frontier, fit and its band over the residuals, in one column of a paper's page.

    Args:
      fit: the law, and the runs.
      fit_label: what the legend says about it.
      others: published laws to lay over, by label, in the same units.
      predictions: of runs not made: compute and what the fit says, by label.
      reach: compute to which the law is drawn; by default a little beyond the runs.
      error_label: of the vertical axis.
      training_flops: of a unit of compute, for the axis on top; None leaves it out.
      title: above all.
    """
    with _page(error_label) as (page, upper, lower):
        panel(upper, fit, fit_label=fit_label, others=others, reach=reach)
        for label, (compute, prediction) in (predictions or {}).items():
            _predicted(upper, label, compute, prediction)
        off = 100 * (fit.runs.error / fit.runs.under(fit.law) - 1)
        _points(lower, fit.runs, np.asarray(off), _in_fit(fit), 4.5)
        lower.axhline(0, color=INK, linewidth=1)
        lower.set_xscale("log")
        lower.set_ylabel("off the law, %")
        lower.margins(y=0.15)
        if training_flops is not None:
            top = upper.secondary_xaxis(
                "top", functions=(lambda c: c * training_flops, lambda f: f / training_flops)
            )
            top.set_xlabel("training FLOPs (3 × forward)")
        page.suptitle(plain(title))
    return page


def compared(families: Mapping[str, Fit], *, error_label: str = "error") -> Figure:
    """Draw families' runs and laws, each at its best division of compute, over their ratios.

    Below, each error is a multiple of the first family's, with the 95% band. Crossings are dashed.
    """
    names, fits = list(families), list(families.values())
    sizes, first = sizes_of(fits), fits[0]
    computes = np.concatenate([fit.runs.compute for fit in fits])
    span = np.geomspace(computes.min() / 1.6, computes.max() * 1.6, 200)
    with _page(error_label) as (page, upper, lower):
        for name, fit, color in zip(names, fits, itertools.cycle((INK, *OTHERS)), strict=False):
            upper.plot(
                fit.runs.compute, fit.runs.error, linestyle="none", marker="o", markersize=4.5,
                color=color, alpha=0.6, markeredgewidth=0,
            )  # fmt: skip
            law = fit.best(span, sizes)["error"]
            _band(upper, span, law, color, label=plain(name))
            if fit is first:
                lower.axhline(0, color=color, linewidth=1)
                continue
            off = 100 * (np.array(ratios(first, fit, span))[:, 1:4] - 1)
            _band(lower, span, Prediction(*off.T), color)
            at = crossing(first, fit).compute
            if at is not None and span[0] < at < span[-1]:
                for axes in (upper, lower):
                    axes.axvline(at, color=color, linewidth=0.8, dashes=(4, 3))
        _log_axes(upper)
        lower.set_xscale("log")
        lower.set_ylabel(f"off {plain(names[0])}, %")
    return page


def panel(
    axes: Axes,
    fit: Fit,
    *,
    fit_label: str = "fit, 95% band",
    others: Mapping[str, Law] | None = None,
    reach: float | None = None,
) -> None:
    """Draw runs, frontier, law with band and other laws on log-log axes."""
    runs, solid = fit.runs, _in_fit(fit)
    for model, color in _colors(runs).items():
        axes.plot([], [], linestyle="", marker="o", color=color, markersize=5, label=plain(model))
    for length, marker in _markers(runs).items():
        axes.plot(
            [], [], linestyle="none", marker=marker, markersize=5, markerfacecolor="none",
            markeredgecolor="#777777", label=f"{plain(length)} pairs",
        )  # fmt: skip
    _points(axes, runs, runs.error, solid, 5.5)
    span = np.geomspace(runs.compute.min() / 1.6, reach or runs.compute.max() * 1.6, 200)
    one = np.ones_like(span)
    if isinstance(fit.law, Additive):  # a line for each model, over the samples that runs saw
        samples = np.geomspace(runs.samples.min() / 1.5, runs.samples.max() * 1.5, 100)
        for model, color in _colors(runs).items():
            size = runs.size[np.asarray(runs.model) == model][0]
            curve = fit.curve(np.full_like(samples, size), samples)
            _band(axes, samples * size, curve, color)
    else:
        _band(axes, span, fit.curve(span, one), INK, label=fit_label)
        if len(fit.fitted.error) != len(runs.error):
            axes.plot(
                fit.fitted.compute, fit.fitted.error, linestyle="none", marker="o", markersize=9,
                markerfacecolor="none", markeredgecolor=INK, label="least error of each bin",
            )  # fmt: skip
    for (label, law), color in zip((others or {}).items(), OTHERS, strict=False):
        axes.plot(span, law(span, one), color=color, linewidth=1.2, dashes=(5, 2), label=label)
    _log_axes(axes)


def both(stem: AnyPath) -> list[AnyPath]:
    """Return `stem.svg` and `stem.png`, for a paper and for everything else."""
    return [stem.with_name(stem.name + ending) for ending in (".svg", ".png")]


def save(figure: Figure, stem: AnyPath) -> list[AnyPath]:
    """Write a figure in both formats."""
    import matplotlib

    paths = both(stem)
    with matplotlib.rc_context(STYLE):
        for path, how in zip(paths, ({"metadata": {"Date": None}}, {"dpi": 200}), strict=True):
            with written_whole(path) as partial:
                figure.savefig(partial, **how)
    return paths


def _points(
    axes: Axes,
    runs: Runs,
    height: Float[np.ndarray, " n"],
    solid: Bool[np.ndarray, " n"],
    size: float,
) -> None:
    """Draw one point a run: colour says the model, marker the samples; faint if not `solid`."""
    colors, markers = _colors(runs), _markers(runs)
    for i, (model, length) in enumerate(_labels(runs)):
        axes.plot(
            runs.compute[i], height[i], marker=markers[length], markersize=size,
            color=colors[model], alpha=0.95 if solid[i] else 0.3, markeredgewidth=0, zorder=3,
        )  # fmt: skip


def _band(axes: Axes, x: np.ndarray, curve: Prediction, color: Any, **how: Any) -> None:
    """Draw a line with its 95% band."""
    axes.plot(x, curve.error, color=color, linewidth=1.3, **how)
    axes.fill_between(x, curve.low, curve.high, color=color, alpha=0.12, linewidth=0)


def _predicted(axes: Axes, label: str, compute: float, prediction: Prediction) -> None:
    """Draw what a fit says of a run not made, with its interval."""
    y, low, high = map(float, prediction)
    axes.errorbar(
        compute, y, yerr=[[y - low], [high - y]], marker="*", markersize=9, color=INK,
        markerfacecolor="white", capsize=2, linewidth=1, zorder=4,
    )  # fmt: skip
    axes.annotate(
        plain(label), (compute, high), xytext=(0, 3), textcoords="offset points",
        ha="center", va="bottom", rotation=90, fontsize=7,
    )  # fmt: skip


def _in_fit(fit: Fit) -> Bool[np.ndarray, " n"]:
    """Runs that the law speaks of: all, or the ones that no other beats."""
    n = len(fit.runs.error)
    return np.ones(n, bool) if len(fit.fitted.error) == n else pareto(fit.runs)


def _labels(runs: Runs) -> list[tuple[str, str]]:
    """Name the model and the samples of each run."""
    return [*zip(np.asarray(runs.model).tolist(), np.asarray(runs.length).tolist(), strict=True)]


def _colors(runs: Runs) -> dict[str, Any]:
    """One colour a model, dark for the small and light for the large."""
    import matplotlib

    ordered = dict.fromkeys(_labels(runs)[i][0] for i in np.argsort(runs.size, kind="stable"))
    shades = np.linspace(0.05, 0.85, max(len(ordered), 2))
    return dict(zip(ordered, matplotlib.colormaps["viridis"](shades), strict=False))


def _markers(runs: Runs) -> dict[str, str]:
    ordered = dict.fromkeys(_labels(runs)[i][1] for i in np.argsort(runs.samples, kind="stable"))
    return dict(zip(ordered, itertools.cycle(MARKERS), strict=False))


def _log_axes(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#eeeeee", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
