"""Compare image towers that teach themselves: accuracy, retrieval, and segmentation of images.

    python studies/icons/dense.py runs/variants studies/icons/results

It evaluates runs of variants.py by `clip-jax evaluate --dataset pasted_icons`. It writes dense.csv,
with a row for each run, and dense.md: means over seeds, and the differences from `sigmoid` of runs
with the same seed, with Student's interval.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tables
from at_widths import METRICS, interval
from what_helps import command, cost_of, is_finished

LABELS = {
    "sigmoid": "sigmoid",
    "sigmoid_crops": "and self-distillation",
    "sigmoid_masked": "and masked prediction",
    "sigmoid_both": "and both",
}
SEGMENTATION = {
    "pasted_icons/windows/miou": "mIoU, zero-shot",
    "pasted_icons/linear_probe/windows/miou": "mIoU, linear probe of patches",
}
WINDOWS = {"background": "ignored", "side": 64, "window": 32, "stride": 16, "patches": 10_000}


def main(root: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    folders = [folder for name in LABELS for folder in sorted(root.glob(f"{name}-seed*"))]
    rows = [segmented(folder) for folder in folders if is_finished(folder)]
    tables.write(output / "dense.csv", rows)
    table = markdown(rows)
    (output / "dense.md").write_text(table, encoding="utf-8")
    print(table)


def segmented(run: Path) -> dict[str, Any]:
    """Return the results of a run, and those of segmentation by its texts and by a probe."""
    variant, _, seed = run.name.rpartition("-seed")
    folder = run.parent.with_name("dense") / run.name
    if not (folder / "result.json").exists():
        tasks = ("--dataset", "pasted_icons", "--tasks", "zero-shot", "probe")
        flags = (x for name, value in WINDOWS.items() for x in (f"--segmentation.{name}", value))
        command("evaluate", run, *tasks, *flags, "--output", folder)
    results = {
        **json.loads((run / "result.json").read_text()),
        **json.loads((folder / "result.json").read_text()),
    }
    values = {metric: results[metric] for metric in (*METRICS, *SEGMENTATION)}
    return {"variant": variant, "seed": int(seed), **cost_of(run), **values}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a row for each metric; a variant's cell has its mean and the difference in points."""
    of = {(row["variant"], row["seed"]): row for row in rows}
    seeds = sorted(seed for variant, seed in of if variant == "sigmoid")
    variants = [name for name in LABELS if all((name, seed) in of for seed in seeds)]
    pairs = (
        f"{np.mean([of[name, seed]['pairs'] for seed in seeds]) / 1e3:.0f}K" for name in variants
    )
    lines = [
        f"| metric | {' | '.join(LABELS[name] for name in variants)} |",
        f"|{'---|' * (len(variants) + 1)}",
        f"| pairs | {' | '.join(pairs)} |",
    ]
    for metric, label in (METRICS | SEGMENTATION).items():
        points = {
            name: np.array([100 * of[name, seed][metric] for seed in seeds]) for name in variants
        }
        cells = [f"{points['sigmoid'].mean():.1f}%"]
        for name in variants[1:]:
            difference = interval(points[name] - points["sigmoid"])
            cells.append(f"{points[name].mean():.1f}%: {difference}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
