"""Compare the runs of variants.py: a row for each run, a table with intervals, and a picture.

    python studies/icons/what_helps.py runs/variants studies/icons/results

It first averages the last five checkpoints of `base` and of `constant`, and evaluates the averages
as the runs were. It writes variants.csv with a row for each run, variants_by_set.csv with the
correct test icons of each set, and the comparison: what_helps.csv, what_helps.md, what_helps.svg.
Runs that variants.csv has already and the folder lacks stay: they may be from another machine.

A difference in accuracy is that from `base` on the same icons with the same seed. Its interval is
that of a bootstrap in which both sets and seeds are drawn with replacement. A difference in loss
has Student's interval over the seeds.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tables
from accuracy import DRAWS, by_set, read, set_of
from matplotlib import rcParams
from matplotlib.figure import Figure
from scipy import stats
from variants import LABELS  # and the source of captions that a run's config.json names

from clip_jax import load_config

AVERAGED = {"base": "checkpoints", "constant": "constant_checkpoints"}  # runs, and their averages
FIRST = {"small_first": "small"}  # runs that continue others, whose cost counts, too
IMAGES = "classes/images.csv"
ACCURACY, LOSS = "classes/acc1", "test/info_nce"
RUNS, BY_SET = "variants.csv", "variants_by_set.csv"
METRICS = (
    *("val/acc1", ACCURACY, "classes/acc5", "validation/info_nce", LOSS),
    *("test/image_retrieval_recall@1", "test/text_retrieval_recall@1"),
)


class Run(NamedTuple):
    """One run, or an average of one."""

    variant: str
    seed: int
    row: dict[str, Any]  # of variants.csv
    sets: dict[str, tuple[int, int]]  # icons and correct icons of each test set


def main(root: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    of_name = {(run.variant, run.seed): run for run in stored(output)}
    for folder in sorted(root.glob("*-seed*")):
        of_name |= {(run.variant, run.seed): run for run in finished(folder)}
    runs = sorted(of_name.values(), key=lambda run: ([*LABELS].index(run.variant), run.seed))
    tables.write(output / RUNS, [run.row for run in runs])
    tables.write(output / BY_SET, [row for run in runs for row in rows_by_set(run)])
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.variant, []).append(run)
    rows = [compare(group, groups["base"]) for group in groups.values()]
    tables.write(output / "what_helps.csv", rows)
    table = markdown(rows)
    (output / "what_helps.md").write_text(table, encoding="utf-8")
    print(table)
    draw(rows, output / "what_helps.svg")


def stored(output: Path) -> Iterable[Run]:
    """Yield the runs of the tables that this script has written before."""
    if not (output / RUNS).exists():
        return
    sets: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    for row in tables.read(output / BY_SET):
        counts = (int(row["icons"]), int(row["correct"]))
        sets.setdefault((row["variant"], row["seed"]), {})[row["set"]] = counts
    for row in tables.read(output / RUNS):
        name = (row["variant"], row["seed"])
        yield Run(row["variant"], int(row["seed"]), row, sets[name])


def rows_by_set(run: Run) -> Iterable[dict[str, Any]]:
    for name, (icons, correct) in run.sets.items():
        counts = {"icons": icons, "correct": correct}
        yield {"variant": run.variant, "seed": run.seed, "set": name, **counts}


def finished(folder: Path) -> Iterable[Run]:
    """Yield a run, if it is finished, and the average of its checkpoints."""
    variant, _, seed = folder.name.rpartition("-seed")
    if variant not in LABELS or not is_finished(folder):
        return
    result = json.loads((folder / "result.json").read_text())
    cost = cost_of(folder)
    if first := FIRST.get(variant):
        before = cost_of(folder.with_name(f"{first}-seed{seed}"))
        cost = {name: before[name] + value for name, value in cost.items()}
    yield run_of(variant, seed, cost, result, folder / "evals")
    if name := AVERAGED.get(variant):
        averaged = folder.parent.with_name("averaged") / folder.name
        evaluate_average(folder, averaged)
        values = json.loads((averaged / "evals/result.json").read_text())
        result = {key: values[f"original/{key}"] for key in METRICS}
        yield run_of(name, seed, cost, result, averaged / "evals/original")


def is_finished(folder: Path) -> bool:
    """Return whether a run has trained to its end, and was evaluated there."""
    path = folder / "result.json"
    return path.exists() and ACCURACY in json.loads(path.read_text())


def cost_of(folder: Path) -> dict[str, float]:
    """Return what the steps of a run took; FLOPs are counted by the package."""
    config = load_config(folder / "config.json")
    return {
        "steps": config.steps,
        "pairs": config.samples_after(config.steps),
        "training_flops": config.flops_after(config.steps),
    }


def run_of(
    variant: str,
    seed: str,
    cost: Mapping[str, float],
    result: Mapping[str, float],
    evaluations: Path,
    images: str = IMAGES,
) -> Run:
    row = {"variant": variant, "seed": seed, **cost} | {name: result[name] for name in METRICS}
    rows = read(evaluations / images)
    names = sorted({set_of(image) for image in rows})
    number, correct = by_set(rows, "acc1")
    counts = zip(np.bincount(number).tolist(), np.bincount(number, correct), strict=True)
    sets = {name: (icons, round(right)) for name, (icons, right) in zip(names, counts, strict=True)}
    return Run(variant, int(seed), row, sets)


def evaluate_average(run: Path, output: Path) -> None:
    """Average the last five checkpoints of a run, and evaluate it by the run's evaluators."""
    if (output / "evals/result.json").exists():
        return
    config = load_config(run / "config.json")
    steps = (*config.checkpoint.also, config.steps)
    command("average", *(f"{run}@{step}" for step in steps), output / "model", "--overwrite")
    command("evaluate", run, "--beside", output / "model", "--output", output / "evals")


def command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "clip_jax", *map(str, words)], check=True)


def compare(group: Sequence[Run], base: Sequence[Run]) -> dict[str, Any]:
    """Return means over seeds, and the differences from the runs of base with the same seeds."""
    of_base = {run.seed: run for run in base}
    pairs = [(run, of_base[run.seed]) for run in group if run.seed in of_base]
    row: dict[str, Any] = {"variant": group[0].variant, "seeds": len(pairs)}
    for name in ("steps", "pairs", "training_flops", *METRICS):
        row[name] = float(np.mean([float(run.row[name]) for run, _ in pairs]))
    if group is base:
        return row
    low, high = accuracy_interval(pairs)
    row |= {"accuracy_low": low, "accuracy_high": high}
    row["accuracy_difference"] = float(differences(pairs, ACCURACY).mean())
    losses = differences(pairs, LOSS)
    row["loss_difference"] = float(losses.mean())
    if len(losses) > 1:
        half = stats.t.ppf(0.975, len(losses) - 1) * losses.std(ddof=1) / len(losses) ** 0.5
        row |= {
            "loss_low": row["loss_difference"] - half,
            "loss_high": row["loss_difference"] + half,
        }
    return row


def differences(pairs: Sequence[tuple[Run, Run]], metric: str) -> np.ndarray:
    return np.array([float(a.row[metric]) - float(b.row[metric]) for a, b in pairs])


def accuracy_interval(pairs: Sequence[tuple[Run, Run]]) -> tuple[float, float]:
    """Return the 95% interval of the difference in accuracy: sets and seeds are drawn."""
    names = sorted(pairs[0][0].sets)
    count = np.array([pairs[0][0].sets[name][0] for name in names])
    more = [[a.sets[name][1] - b.sets[name][1] for name in names] for a, b in pairs]
    total = np.array(more)  # [seeds, sets]
    rng = np.random.default_rng(0)
    sets = rng.integers(0, len(count), (DRAWS, 1, len(count)))
    seeds = rng.integers(0, len(total), (DRAWS, len(total), 1))
    means = total[seeds, sets].sum((1, 2)) / (len(total) * count[sets].sum((1, 2)))
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| variant | seeds | pairs | top-1 | difference (points) | test loss | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            LABELS[row["variant"]],
            str(row["seeds"]),
            f"{row['pairs'] / 1e3:.0f}K",
            f"{row[ACCURACY]:.1%}",
            difference(row, "accuracy", 100, 1),
            f"{row[LOSS]:.3f}",
            difference(row, "loss", 1, 3),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def difference(row: Mapping[str, Any], name: str, factor: float, digits: int) -> str:
    if f"{name}_difference" not in row:
        return ""
    names = (f"{name}_difference", f"{name}_low", f"{name}_high")
    mean, *ends = (f"{factor * row[x]:+.{digits}f}" for x in names if x in row)
    return f"{mean} ({' to '.join(ends)})" if ends else mean


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the difference of each variant in accuracy, with its interval."""
    rows = [row for row in rows if "accuracy_difference" in row][::-1]
    rcParams["svg.hashsalt"] = "icons"  # the same bytes each time
    figure = Figure(figsize=(7, 0.35 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        ends = [100 * row["accuracy_low"], 100 * row["accuracy_high"]]
        axes.plot(ends, [i, i], color="tab:blue")
        axes.plot(100 * row["accuracy_difference"], i, "o", color="tab:blue")
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [LABELS[row["variant"]] for row in rows])
    figure.supxlabel(
        "difference from base in zero-shot top-1 (points, 95% interval)", fontsize="medium"
    )
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
