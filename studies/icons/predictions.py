"""Predict the two dearest points of the ladder from the others, and compare with measurements.

    python studies/icons/predictions.py predict studies/icons/results
    python studies/icons/predictions.py compare studies/icons/results

`predict` reads ladder_small.csv, which `scale collect` has written before the two points are
trained, and writes ladder_predictions.csv. `compare` reads that file and ladder.csv, and writes
ladder_measured.csv and ladder_measured.md.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ladder import WIDTHS, get_ladder
from tables import read, write

METRICS = {"error": ("test/info_nce", "validation/info_nce"), "score": ("classes/acc1", "val/acc1")}
# Laws of losses, and of accuracies on two scales: an accuracy that starts at chance has no power
# law of its error. That of its odds is one alternative.
FITS = (("error", "error"), ("score", "error"), ("score", "odds"))
PREDICTED = sorted(WIDTHS)[-2:]  # the dearest points: these widths, with the most pairs


def main(what: str, results: Path) -> None:
    if what == "predict":
        write(results / "ladder_predictions.csv", predictions(results / "ladder_small.csv"))
        return
    rows = [measured(row, read(results / "ladder.csv")) for row in read_predictions(results)]
    write(results / "ladder_measured.csv", rows)
    table = markdown(rows)
    (results / "ladder_measured.md").write_text(table, encoding="utf-8")
    print(table)


def predictions(path: Path) -> list[dict[str, Any]]:
    """Return the predictions of `scale fit` for each metric of each of the two points."""
    table = read(path)
    pairs = max(get_ladder().samples)
    model_of = {int(row["width"]): row["arch"] for row in table}
    points = {f"{model_of[width]}@{pairs}": width for width in PREDICTED}
    if known := points.keys() & {f"{row['arch']}@{row['samples_seen']}" for row in table}:
        raise SystemExit(f"{path} has runs of the points to predict: {', '.join(sorted(known))}.")
    rows = []
    for kind, link in FITS:
        first, *others = METRICS[kind]
        fit = ("-m", "clip_jax", "scale", "fit", str(path), "--json", "--form", "additive")
        command = (*fit, "--link", link, "--metric", first, "--also", *others, "--predict", *points)
        result = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, check=True)
        fits = json.loads(result.stdout)
        for law in (fits, *fits["also"]):
            for name, answer in law["predictions"].items():
                low, high = answer.get(f"{kind}_interval", ("", ""))
                point = {"width": points[name], "pairs": pairs, "metric": law["metric"]}
                predicted = {"predicted": answer[kind], "low": low, "high": high}
                law_of = "loss" if kind == "error" else link
                rows.append(point | {"law of": law_of} | predicted)
    return rows


def measured(row: dict[str, str], table: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Add what the runs of a point measured: the mean, each seed, and whether they are inside."""
    runs = [x for x in table if (x["width"], x["samples_seen"]) == (row["width"], row["pairs"])]
    values = [float(run[row["metric"]]) for run in sorted(runs, key=lambda run: run["seed"])]
    inside = ""
    if row["low"]:
        inside = sum(float(row["low"]) <= value <= float(row["high"]) for value in values)
    seeds = {f"seed {i}": value for i, value in enumerate(values)}
    return row | {"measured": float(np.mean(values)), **seeds, "inside": inside}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| metric | width | law of | predicted (95% of a run) | measured, mean | seeds inside |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        style = ".1%" if "acc" in row["metric"] else ".3f"
        predicted = "not determined"
        if row["predicted"]:
            value, low, high = (float(row[x]) for x in ("predicted", "low", "high"))
            predicted = f"{value:{style}} ({low:{style}} to {high:{style}})"
        count = sum(name.startswith("seed ") for name in row)
        cells = (
            f"`{row['metric']}`",
            row["width"],
            row["law of"],
            predicted,
            f"{row['measured']:{style}}",
            f"{row['inside']} of {count}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def read_predictions(results: Path) -> list[dict[str, str]]:
    return read(results / "ladder_predictions.csv")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
