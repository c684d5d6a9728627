"""Measure how often the interval of a new run holds runs that the fit has not seen.

    python benchmarks/held_out_runs.py TABLE [--long] [--checkout DIRECTORY] [--splits 12]
    python benchmarks/held_out_runs.py --truths 10 [--checkout DIRECTORY]

For each metric of a table of scores, the script leaves runs out of the fit and predicts them by the
default of `scale fit`: at several levels of compute all dearer runs, the largest sizes, and the
longest schedules. It prints for each extrapolation factor (compute of the predicted run over the
largest of the fitted ones) how many predictions carry a 95% interval, the share of the measured
scores inside of these with its 95% interval of a bootstrap over metrics and splits, the median
width in points, and the mean interval score of Gneiting and Raftery 2007 (Winkler 1972) in points.
`--truths` makes tables of 48 runs by laws that no form of the package describes, holds out the runs
with more than a tenth of the largest compute, and prints the same for each of these laws.
`--checkout` measures another version of the package.
"""

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FACTORS = (1.0, 3.0, 10.0, np.inf)
LEAST = 12  # runs of a fit
TAIL = 0.025
DRAWS = 1_000


class Predicted(NamedTuple):
    """A held-out run and its prediction, as scores in percent."""

    metric: str
    split: str
    factor: float
    measured: float
    value: float
    low: float
    high: float
    carries: bool  # whether the interval is stated as one of 95%


def long_table(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read a table with a row per run and metric; return rows of runs by metric."""
    metrics: dict[str, list[dict[str, Any]]] = {}
    for row in csv.DictReader(path.open(encoding="utf-8")):
        size = float(row["gflops_per_sample"]) / 2
        run = {"arch": row["arch"], "gmacs_per_sample": size, "score": float(row["value"])}
        run["samples_seen"] = float(row["samples_seen_num"])
        metrics.setdefault(f"{row['downstream']} {row['metric']}", []).append(run)
    return metrics


def wide_table(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read a table with a row per run; return rows of runs by metric, those of scores."""
    rows = [*csv.DictReader(path.open(encoding="utf-8"))]
    names = [x for x in rows[0] if x.endswith(("_acc1", "_r5"))]
    metrics: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        for row in rows:
            if row[name]:
                run = {x: float(row[x]) for x in ("gmacs_per_sample", "samples_seen")}
                run |= {"arch": row["arch"], "score": float(row[name])}
                metrics.setdefault(name, []).append(run)
    return metrics


def truths(rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """Make tables of 6 sizes and 8 numbers of samples by laws of no fitted form."""
    size, samples = map(np.ravel, np.meshgrid(np.geomspace(1, 300, 6), np.geomspace(1e6, 1e10, 8)))
    compute = size * samples
    noise = np.exp(0.02 * rng.standard_normal(48))
    additive = 0.1 + 0.3 * size**-0.4 + 30 * samples**-0.3
    logit = 0.3 * np.log(size) + 0.5 * np.log(samples / 1e8)
    outcomes = {"logistic from chance": 1 - 0.001 - 0.9 * noise / (1 + np.exp(-logit))}
    for name, at in (("inside", 1e9), ("at the edge", 3e11)):
        bent = (compute / 1e6) ** -0.05 * (1 + compute / at) ** -0.05
        outcomes[f"slope doubles {name}"] = 0.8 * bent * noise
    outcomes["interaction"] = (0.1 + 0.2 * size**-0.4 + 100 * size**-0.1 * samples**-0.4) * noise
    outcomes["Student t noise"] = additive * np.exp(0.02 * rng.standard_t(3, 48))
    effect = np.tile(0.03 * rng.standard_normal(6), 8)
    outcomes["checkpoints of one run"] = additive * np.exp(effect) * noise**0.5
    outcomes["untuned small runs"] = additive * noise * np.exp(0.3 * size**-0.5)
    outcomes["three decimals"] = np.round(0.02 * additive * noise, 3).clip(0.001)
    tables = {}
    for name, error in outcomes.items():
        columns = zip(size.tolist(), samples.tolist(), error.tolist(), strict=True)
        tables[name] = [
            {
                "arch": f"m{n:.3g}",
                "gmacs_per_sample": n,
                "samples_seen": d,
                "score": 1 - min(e, 0.9995),
                "name": f"m{n:.3g}" if name.startswith("checkpoints") else f"m{n:.3g}@{d:.3g}",
            }
            for n, d, e in columns
        ]
    return tables


def splits(rows: list[dict[str, Any]], count: int) -> dict[str, np.ndarray]:
    """Return which runs are held out, by split."""
    size, samples = (np.array([x[n] for x in rows]) for n in ("gmacs_per_sample", "samples_seen"))
    compute = size * samples
    levels = np.unique(compute)
    held = {f"compute > {level:.4g}": compute > level * 1.0001 for level in levels}
    held = {name: x for name, x in held.items() if x.any() and (~x).sum() >= LEAST}
    names = [*held]
    keep = np.unique(np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int))
    chosen = {names[i]: held[names[i]] for i in keep}
    for name, values in (("size", size), ("samples", samples)):
        for largest in np.unique(values)[-3:]:
            chosen[f"{name} >= {largest:.4g}"] = values >= largest * 0.9999
    return {name: x for name, x in chosen.items() if (~x).sum() >= LEAST}


def predictions(
    metric: str, split: str, rows: list[dict[str, Any]], held: np.ndarray
) -> list[Predicted]:
    """Fit the other runs by the default of the package, and predict the held-out ones."""
    from clip_jax.errors import InputError
    from clip_jax.scaling.fit import FitConfig, _hold_out
    from clip_jax.scaling.run_table import RunTable

    known = [row for row, is_held in zip(rows, held, strict=True) if not is_held]
    others = [row for row, is_held in zip(rows, held, strict=True) if is_held]
    largest = max(row["gmacs_per_sample"] * row["samples_seen"] for row in known)
    marked = [row | {"test": "no"} for row in known] + [row | {"test": "yes"} for row in others]
    run = "name" if metric.startswith("checkpoints") else None
    config = FitConfig(metric="score", hold_out=("test=yes",), draws=100, run=run)
    table = RunTable(marked)
    if hasattr(config, "resolved"):  # older versions chose the form here
        config = config.resolved([table])
    try:
        held_out = _hold_out(table, config)
    except InputError:
        return []
    predicted = []
    for run in held_out.runs:
        low, high = run.answer.metric.interval
        size = min(
            others, key=lambda x: (x["arch"] != run.model, abs(x["samples_seen"] - run.samples))
        )
        predicted.append(
            Predicted(
                metric=metric,
                split=split,
                factor=size["gmacs_per_sample"] * run.samples / largest,
                measured=100 * (1 - run.measured),
                value=100 * run.answer.metric.value,
                low=100 * low,
                high=100 * high,
                carries=bool(getattr(run.answer, "validated", True)),
            )
        )
    return predicted


def summary(rows: list[Predicted]) -> list[str]:
    """Format a line for each factor."""
    lines = []
    for least, most in zip((0.0, *FACTORS), FACTORS, strict=False):
        group = [x for x in rows if least < x.factor <= most]
        carried = [x for x in group if x.carries]
        if not group:
            continue
        name = f"<= {most:g}" if most < np.inf else f"> {least:g}"
        words = f"factor {name}: {len(group)} predictions, {len(carried) / len(group):.0%} carry"
        if carried:
            low, high, measured = (
                np.array([getattr(x, n) for x in carried]) for n in ("low", "high", "measured")
            )
            inside = (low <= measured) & (measured <= high)
            missed = np.maximum(low - measured, 0) + np.maximum(measured - high, 0)
            score = high - low + missed / TAIL
            width = np.median(high - low)
            words += (
                f", {inside.mean():.1%} inside ({between(carried, inside)}), median width "
                f"{width:.1f}, interval score {score.mean():.1f}"
            )
        off = np.mean([abs(x.value - x.measured) for x in group])
        lines.append(f"{words}, off by {off:.2f}")
    return lines


def between(rows: list[Predicted], inside: np.ndarray) -> str:
    """Return the 95% interval of a share by a bootstrap over metrics, then splits of each."""
    rng = np.random.default_rng(0)
    counts: dict[str, dict[str, list[int]]] = {}
    for row, is_inside in zip(rows, inside.tolist(), strict=True):
        count = counts.setdefault(row.metric, {}).setdefault(row.split, [0, 0])
        count[0] += is_inside
        count[1] += 1
    metrics = [np.array([*of_metric.values()]) for of_metric in counts.values()]
    shares = []
    for _ in range(DRAWS):
        drawn = [metrics[i] for i in rng.integers(len(metrics), size=len(metrics))]
        total = sum(x[rng.integers(len(x), size=len(x))].sum(0) for x in drawn)
        shares.append(total[0] / total[1])
    low, high = np.quantile(shares, [TAIL, 1 - TAIL])
    return f"{low:.0%} to {high:.0%}"


def print_truths(tables: int) -> None:
    """Print how often intervals hold new runs of each made-up law."""
    rows: dict[str, list[Predicted]] = {}
    for seed in range(tables):
        for name, runs in truths(np.random.default_rng(seed)).items():
            compute = np.array([x["gmacs_per_sample"] * x["samples_seen"] for x in runs])
            held = compute > compute.max() / 10
            rows.setdefault(name, []).extend(predictions(name, str(seed), runs, held))
    for name, predicted in rows.items():
        print(f"{name}:")
        print("\n".join(f"  {line}" for line in summary(predicted)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, nargs="?", help="Table of scores (CSV).")
    parser.add_argument("--truths", type=int, default=0, help="Tables of each made-up law.")
    parser.add_argument("--long", action="store_true", help="The table has a row per metric.")
    parser.add_argument("--splits", type=int, default=12, help="Levels of compute per metric.")
    parser.add_argument("--metrics", nargs="*", default=[], help="Metrics. None: all.")
    parser.add_argument("--checkout", default=str(Path(__file__).parents[1]), help="Package.")
    parser.add_argument("--json", type=Path, help="File for all predictions.")
    args = parser.parse_args()
    sys.path.insert(0, args.checkout)
    np.seterr(all="ignore")
    if args.truths:
        print_truths(args.truths)
        return
    tables = (long_table if args.long else wide_table)(args.table)
    rows: list[Predicted] = []
    start = time.process_time()
    fits = 0
    for metric, runs in tables.items():
        if args.metrics and metric not in args.metrics:
            continue
        for split, held in splits(runs, args.splits).items():
            rows += predictions(metric, split, runs, held)
            fits += 1
        print(metric, f"{time.process_time() - start:.0f} s", file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps([x._asdict() for x in rows]))
    kinds = {"compute": "dearer runs", "size": "largest sizes", "samples": "longest schedules"}
    for kind, name in kinds.items():
        print(f"{name}:")
        print(
            "\n".join(
                f"  {line}" for line in summary([x for x in rows if x.split.startswith(kind)])
            )
        )
    print("all:")
    print("\n".join(f"  {line}" for line in summary(rows)))
    print(f"{fits} fits, {time.process_time() - start:.0f} s")


if __name__ == "__main__":
    main()
