"""Compare image towers by a linear probe: runs with a sigmoid loss, with captions, with both.

    python studies/icons/probes.py runs/variants studies/icons/results

It evaluates runs of variants.py by `clip-jax evaluate --tasks probe`, and writes probes.csv, with a
row for each run, and probes.md: means over seeds, and the differences from `sigmoid` with the same
seed on the same icons. Their interval is that of a bootstrap over sets and seeds.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tables
from what_helps import (
    ACCURACY,
    LOSS,
    Run,
    accuracy_interval,
    command,
    cost_of,
    is_finished,
    run_of,
)

LABELS = {
    "sigmoid": "sigmoid",
    "sigmoid_causal": "sigmoid and captions, token by token",
    "sigmoid_parallel": "sigmoid and captions, half of them in parallel",
    "cappa": "captions alone, three quarters in parallel",
}
DATA = "folder:icons/classes"
PROBE, IMAGES = "classes/linear_probe/acc1", "classes/linear_probe/images.csv"


def main(root: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    folders = [folder for name in LABELS for folder in sorted(root.glob(f"{name}-seed*"))]
    runs = [probed(folder) for folder in folders if is_finished(folder)]
    tables.write(output / "probes.csv", [run.row for run in runs])
    table = markdown(runs)
    (output / "probes.md").write_text(table, encoding="utf-8")
    print(table)


def probed(folder: Path) -> Run:
    """Return a run with the accuracy of a linear probe, by set."""
    variant, _, seed = folder.name.rpartition("-seed")
    probe = folder.parent.with_name("probes") / folder.name
    if not (probe / "result.json").exists():
        command("evaluate", folder, "--dataset", DATA, "--tasks", "probe", "--output", probe)
    result = json.loads((folder / "result.json").read_text())
    run = run_of(variant, seed, cost_of(folder), result, probe, IMAGES)
    run.row[PROBE] = json.loads((probe / "result.json").read_text())[PROBE]
    return run


def markdown(runs: Sequence[Run]) -> str:
    lines = [
        "| losses | seeds | pairs | top-1 | test loss | linear probe | difference (points) |",
        "|---|---|---|---|---|---|---|",
    ]
    sigmoid = {run.seed: run for run in runs if run.variant == "sigmoid"}
    for variant in LABELS:
        pairs = [(run, sigmoid[run.seed]) for run in runs if run.variant == variant]
        if pairs:
            lines.append(f"| {' | '.join(cells(variant, pairs))} |")
    return "\n".join(lines) + "\n"


def cells(variant: str, pairs: Sequence[tuple[Run, Run]]) -> tuple[str, ...]:
    """Format the runs of a variant, each beside that of `sigmoid` with the same seed."""

    def mean(metric: str, of: int = 0) -> float:
        return float(np.mean([pair[of].row[metric] for pair in pairs]))

    is_contrastive, difference = variant != "cappa", ""
    if variant != "sigmoid":
        low, high = accuracy_interval(pairs)
        points = mean(PROBE) - mean(PROBE, of=1)
        difference = f"{100 * points:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return (
        LABELS[variant],
        str(len(pairs)),
        f"{mean('pairs') / 1e3:.0f}K",
        f"{mean(ACCURACY):.1%}" if is_contrastive else "–",
        f"{mean(LOSS):.3f}" if is_contrastive else "–",
        f"{mean(PROBE):.1%}",
        difference,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
