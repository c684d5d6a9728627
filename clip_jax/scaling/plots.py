"""Pictures of a fit: runs, frontier, law with its band, published laws beside it, residuals."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from clip_jax.display import STYLE, plain
from clip_jax.scaling.compare import Family, crossing, ratios, sizes_of
from clip_jax.scaling.fit import Fit, Prediction, best
from clip_jax.scaling.laws import Law, Runs, pareto
from clip_jax.storage.files import Place, written_whole

Axes = Any  # matplotlib's: imported only where something is drawn
Figure = Any

MARKERS = "osD^vPX*<>"
INK, OTHERS = "#222222", ("#c1440e", "#00798c", "#6b4c9a", "#7a7a00")


class Named(NamedTuple):
    """Runs, and what a reader calls them."""

    runs: Runs
    model: tuple[str, ...]  # one a run: its colour
    samples: tuple[str, ...]  # one a run: its marker


def figure(
    named: Named,
    fit: Fit,
    *,
    fit_label: str = "fit, 95% band",
    others: Mapping[str, Law] | None = None,
    predictions: Mapping[str, tuple[float, Prediction]] | None = None,
    reach: float | None = None,
    error_label: str = "error",
    compute_label: str = "compute: forward GMACs of a pair × pairs seen",
    training_flops: float | None = 6e9,
    title: str = "",
) -> Figure:
    """Draw runs, frontier, fit and its band over the residuals, in one column of a paper's page.

    Args:
      named: the runs.
      fit: the law through them.
      fit_label: what the legend says about it.
      others: published laws to lay over, by label, in the same units.
      predictions: of runs not made: compute and what the fit says, by label.
      reach: compute to which the law is drawn; by default a little beyond the runs.
      error_label: of the vertical axis.
      compute_label: of the horizontal axis.
      training_flops: of a unit of compute, for the axis on top; None leaves it out.
      title: above all.
    """
    import matplotlib
    from matplotlib.figure import Figure as NewFigure

    with matplotlib.rc_context(STYLE):
        page = NewFigure(figsize=(6.4, 4.6), layout="constrained")
        upper, lower = page.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
        panel(upper, named, fit, fit_label=fit_label, others=others, reach=reach)
        for label, (compute, prediction) in (predictions or {}).items():
            predicted(upper, label, compute, prediction)
        residuals(lower, named, fit)
        upper.set_ylabel(plain(error_label))
        lower.set_xlabel(compute_label)
        upper.tick_params(labelbottom=False)
        if training_flops is not None:
            top = upper.secondary_xaxis(
                "top", functions=(lambda c: c * training_flops, lambda f: f / training_flops)
            )
            top.set_xlabel("training FLOPs (3 × forward)")
        page.suptitle(plain(title))
        page.legend(
            *upper.get_legend_handles_labels(), loc="outside right upper", handletextpad=0.6
        )
        page.canvas  # noqa: B018 - a figure without pyplot makes its canvas at first use
    return page


def compared(
    families: Mapping[str, Family],
    *,
    error_label: str = "error",
    compute_label: str = "compute: forward GMACs of a pair × pairs seen",
) -> Figure:
    """Draw families' runs and laws, each at its best division of compute, over their ratios.

    Below, each error is a multiple of the first family's, with the 95% band. Crossings are dashed.
    """
    import matplotlib
    from matplotlib.figure import Figure as NewFigure

    sizes, first = sizes_of(list(families.values())), next(iter(families.values()))
    computes = np.concatenate([family.runs.compute for family in families.values()])
    span = np.geomspace(computes.min() / 1.6, computes.max() * 1.6, 200)
    with matplotlib.rc_context(STYLE):
        page = NewFigure(figsize=(6.4, 4.6), layout="constrained")
        upper, lower = page.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
        for (name, family), color in zip(families.items(), itertools.cycle((INK, *OTHERS))):
            upper.plot(
                family.runs.compute, family.runs.error, linestyle="none", marker="o",
                markersize=4.5, color=color, alpha=0.6, markeredgewidth=0,
            )  # fmt: skip
            law = best(family.fit, span, sizes)["error"]
            upper.plot(span, law.error, color=color, linewidth=1.4, label=plain(name))
            upper.fill_between(span, law.low, law.high, color=color, alpha=0.12, linewidth=0)
            if family is first:
                lower.axhline(0, color=color, linewidth=1)
                continue
            off = 100 * (np.array(ratios(first, family, span))[:, 1:4] - 1)
            lower.plot(span, off[:, 0], color=color, linewidth=1.2)
            lower.fill_between(span, off[:, 1], off[:, 2], color=color, alpha=0.12, linewidth=0)
            at = crossing(first, family).compute
            if at is not None and span[0] < at < span[-1]:
                for axes in (upper, lower):
                    axes.axvline(at, color=color, linewidth=0.8, dashes=(4, 3))
        _log_axes(upper)
        upper.set_ylabel(plain(error_label))
        upper.tick_params(labelbottom=False)
        lower.set_xscale("log")
        lower.set_ylabel(f"off {plain(next(iter(families)))}, %")
        lower.set_xlabel(compute_label)
        page.legend(
            *upper.get_legend_handles_labels(), loc="outside right upper", handletextpad=0.6
        )
        page.canvas  # noqa: B018 - a figure without pyplot makes its canvas at first use
    return page


def panel(
    axes: Axes,
    named: Named,
    fit: Fit,
    *,
    fit_label: str = "fit, 95% band",
    others: Mapping[str, Law] | None = None,
    reach: float | None = None,
    color: str = INK,
) -> None:
    """Draw runs, frontier, law with band and other laws on log-log axes."""
    runs = named.runs
    scatter(axes, named, _in_fit(named, fit))
    span = _span(runs, reach)
    one = np.ones_like(span)
    if _of_compute(fit):
        curve = fit.curve(span, one)
        axes.fill_between(span, curve.low, curve.high, color=color, alpha=0.12, linewidth=0)
        axes.plot(span, curve.error, color=color, linewidth=1.4, label=fit_label)
        if len(fit.fitted.error) != len(runs.error):
            axes.plot(
                fit.fitted.compute, fit.fitted.error, linestyle="none", marker="o", markersize=9,
                markerfacecolor="none", markeredgecolor=color, label="least error of each bin",
            )  # fmt: skip
    else:
        _by_size(axes, named, fit)
    for (label, law), other in zip((others or {}).items(), OTHERS, strict=False):
        axes.plot(span, law(span, one), color=other, linewidth=1.2, dashes=(5, 2), label=label)
    _log_axes(axes)


def scatter(axes: Axes, named: Named, solid: Bool[np.ndarray, " n"]) -> None:
    """Draw one point a run: colour says the model, marker the samples; faint if not `solid`."""
    for model, color in _colors(named).items():
        axes.plot([], [], linestyle="", marker="o", color=color, markersize=5, label=plain(model))
    for label, marker in _markers(named).items():
        axes.plot(
            [], [], linestyle="none", marker=marker, markersize=5, markerfacecolor="none",
            markeredgecolor="#777777", label=f"{plain(label)} pairs",
        )  # fmt: skip
    colors, markers = _colors(named), _markers(named)
    for i, (model, samples) in enumerate(zip(named.model, named.samples, strict=True)):
        axes.plot(
            named.runs.compute[i], named.runs.error[i], marker=markers[samples], markersize=5.5,
            color=colors[model], alpha=0.95 if solid[i] else 0.3, markeredgewidth=0, zorder=3,
        )  # fmt: skip


def predicted(axes: Axes, label: str, compute: float, prediction: Prediction) -> None:
    """Draw what a fit says of a run not made, with its interval."""
    y = float(prediction.error)
    reach = [[y - float(prediction.low)], [float(prediction.high) - y]]
    axes.errorbar(
        compute, y, yerr=reach, marker="*", markersize=9, color=INK, markerfacecolor="white",
        capsize=2, linewidth=1, zorder=4,
    )  # fmt: skip
    axes.annotate(
        plain(label), (compute, float(prediction.high)), xytext=(0, 3), textcoords="offset points",
        ha="center", va="bottom", rotation=90, fontsize=7,
    )  # fmt: skip


def residuals(axes: Axes, named: Named, fit: Fit) -> None:
    """Draw each run's distance from the law, in percent of the law."""
    runs = named.runs
    off = 100 * (runs.error / runs.under(fit.law) - 1)
    colors, markers, solid = _colors(named), _markers(named), _in_fit(named, fit)
    for i, (model, samples) in enumerate(zip(named.model, named.samples, strict=True)):
        axes.plot(
            runs.compute[i], off[i], marker=markers[samples], markersize=4.5, color=colors[model],
            alpha=0.95 if solid[i] else 0.3, markeredgewidth=0, zorder=3,
        )  # fmt: skip
    axes.axhline(0, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_ylabel("off the law, %")
    axes.margins(y=0.15)


def both(stem: Place) -> list[Place]:
    """Return `stem.svg` and `stem.png`, for a paper and for everything else."""
    return [stem.with_name(stem.name + ending) for ending in (".svg", ".png")]


def save(figure: Figure, stem: Place) -> list[Place]:
    """Write a figure in both formats."""
    import matplotlib

    paths = both(stem)
    with matplotlib.rc_context(STYLE):
        for path, how in zip(paths, ({"metadata": {"Date": None}}, {"dpi": 200}), strict=True):
            with written_whole(path) as partial:
                figure.savefig(partial, **how)
    return paths


def _of_compute(fit: Fit) -> bool:
    """Whether the law depends on compute alone, so that it is one line."""
    return "size_alpha" not in fit.law._fields


def _by_size(axes: Axes, named: Named, fit: Fit) -> None:
    """Draw an additive law as a line for each model, over the samples that it saw."""
    runs = named.runs
    for model, color in _colors(named).items():
        mine = np.array([name == model for name in named.model])
        size = runs.size[mine][0]
        samples = np.geomspace(runs.samples.min() / 1.5, runs.samples.max() * 1.5, 100)
        curve = fit.curve(np.full_like(samples, size), samples)
        axes.plot(samples * size, curve.error, color=color, linewidth=1.2)
        axes.fill_between(
            samples * size, curve.low, curve.high, color=color, alpha=0.12, linewidth=0
        )


def _in_fit(named: Named, fit: Fit) -> Bool[np.ndarray, " n"]:
    """Runs that the law speaks of: all, or the ones that no other beats."""
    runs = named.runs
    if len(fit.fitted.error) == len(runs.error):
        return np.ones(len(runs.error), bool)
    return pareto(runs)


def _span(runs: Runs, reach: float | None) -> np.ndarray:
    return np.geomspace(runs.compute.min() / 1.6, reach or runs.compute.max() * 1.6, 200)


def _colors(named: Named) -> dict[str, Any]:
    """One colour a model, dark for the small and light for the large."""
    import matplotlib

    sizes = dict(zip(named.model, named.runs.size, strict=True))
    ordered = sorted(sizes, key=lambda model: sizes[model])
    shades = np.linspace(0.05, 0.85, max(len(ordered), 2))
    return dict(zip(ordered, matplotlib.colormaps["viridis"](shades), strict=False))


def _markers(named: Named) -> dict[str, str]:
    samples = dict(zip(named.samples, named.runs.samples, strict=True))
    ordered: Sequence[str] = sorted(samples, key=lambda label: samples[label])
    return {label: MARKERS[i % len(MARKERS)] for i, label in enumerate(ordered)}


def _log_axes(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#eeeeee", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
