"""Compare embeddings of fewer channels: a run trained for them, and base.py, which is not.

    python studies/icons/at_widths.py runs/variants studies/icons/results

It evaluates the runs `widths` and `base` of variants.py by `clip-jax evaluate --dim`, and writes
at_widths.csv, with a row for each run and width, and at_widths.md: means over seeds, and the
differences of runs with the same seed with Student's interval.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tables
from scipy import stats
from variants import WIDTHS
from what_helps import ACCURACY, command, is_finished

from clip_jax import load_config

METRICS = {
    ACCURACY: "zero-shot top-1",
    "test/image_retrieval_recall@1": "text to image recall@1",
    "test/text_retrieval_recall@1": "image to text recall@1",
}
NAMES = ("base", "widths")


def main(root: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    finished = [[x for x in sorted(root.glob(f"{name}-seed*")) if is_finished(x)] for name in NAMES]
    seeds = set.intersection(*({x.name.rpartition("-")[2] for x in runs} for runs in finished))
    runs = [run for of_name in finished for run in of_name if run.name.rpartition("-")[2] in seeds]
    rows = [row for run in runs for row in of(run)]
    tables.write(output / "at_widths.csv", rows)
    table = markdown(rows)
    (output / "at_widths.md").write_text(table, encoding="utf-8")
    print(table)


def of(run: Path) -> Iterable[dict[str, Any]]:
    """Yield a row for each width of a finished run."""
    name, _, seed = run.name.rpartition("-seed")
    folder = run.parent.with_name("at_widths") / run.name
    if not (folder / "result.json").exists():
        command("evaluate", run, "--dim", *WIDTHS, "--output", folder)
    for width in WIDTHS:
        yield {"variant": name, "seed": int(seed), "width": width} | results(folder / str(width))
    complete = load_config(run / "config.json").model.embed_dim
    yield {"variant": name, "seed": int(seed), "width": complete} | results(run)


def results(folder: Path) -> dict[str, float]:
    values = json.loads((folder / "result.json").read_text())
    return {metric: values[metric] for metric in METRICS}


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = ["| channels | metric | base | trained for widths | difference (points) |"]
    lines.append("|---|---|---|---|---|")
    value = {(row["variant"], row["seed"], row["width"]): row for row in rows}
    seeds = sorted({seed for _, seed, _ in value})
    for width in sorted({width for *_, width in value}):
        for metric, label in METRICS.items():
            base, other = (
                np.array([100 * value[name, seed, width][metric] for seed in seeds])
                for name in NAMES
            )
            cells = (width, label, f"{base.mean():.1f}%", f"{other.mean():.1f}%")
            lines.append(f"| {' | '.join(map(str, cells))} | {interval(other - base)} |")
    return "\n".join(lines) + "\n"


def interval(differences: np.ndarray) -> str:
    mean = f"{differences.mean():+.1f}"
    if len(differences) == 1:
        return mean
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return f"{mean} ({differences.mean() - half:+.1f} to {differences.mean() + half:+.1f})"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
