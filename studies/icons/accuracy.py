"""Print zero-shot accuracy with 95% intervals, from the `images.csv` of runs or evaluations.

    python studies/icons/accuracy.py runs/icons/evals/classes/images.csv

An interval is that of a bootstrap over icon sets, not over icons: icons of one set are alike. With
several files, the differences from the first one follow, on the same sets.
"""

import sys
from pathlib import Path

import numpy as np
import tables

DRAWS = 10_000
METRICS = ("acc1", "acc5")


def main(paths: list[str]) -> None:
    tables = [read(Path(path)) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        for metric in METRICS:
            print(f"{path} {metric}: {interval(*by_set(table, metric))}")
    first, *others = tables
    for path, table in zip(paths[1:], others, strict=True):
        for metric in METRICS:
            number, values = by_set(table, metric)
            difference = values - by_set(first, metric)[1]
            print(f"{path} minus {paths[0]} {metric}: {interval(number, difference)}")


def read(path: Path) -> list[dict[str, str]]:
    """Read the rows of a file, in the order of the images."""
    return sorted(tables.read(path), key=lambda row: row["image"])


def by_set(table: list[dict[str, str]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the set and the value of each image."""
    sets = [set_of(row) for row in table]
    return np.unique(sets, return_inverse=True)[1], np.array([float(row[metric]) for row in table])


def set_of(row: dict[str, str]) -> str:
    """Return the set of an image: its file is named after it."""
    return Path(row["image"]).stem


def interval(number: np.ndarray, values: np.ndarray) -> str:
    """Return the mean over all icons and its 95% interval, from sets drawn with replacement."""
    total = np.bincount(number, values)
    count = np.bincount(number)
    drawn = np.random.default_rng(0).integers(0, len(count), (DRAWS, len(count)))
    means = total[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return f"{values.mean():.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    main(sys.argv[1:])
