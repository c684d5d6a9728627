"""Count how often the 95% intervals of scaling laws contain the truth, over 200 generated tables.

    python benchmarks/scaling_coverage.py

The script prints a line for each law and quantity. It takes minutes and ends with an error if a
share is outside of 90 to 98%.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from clip_jax.scaling.uncertainty import Form, crossing, fit_law
from tests.scaling.known import (
    KNOWN,
    NOISE,
    OTHERS,
    families,
    frontier_coverage,
    measured,
    true_crossing,
)

TABLES, DRAWS = 200, 200


def coverage(form: Form, tables: int, draws: int) -> dict[str, float]:
    """Return how often intervals contain parameters, and law and new run at ten times the size."""
    law, inside = KNOWN[form], []
    ahead = np.array(300.0), np.array(1e11)
    new = np.random.default_rng(9).standard_normal(tables) * NOISE
    for seed in range(tables):
        fitted = fit_law(form, measured(law, seed), "all", draws=draws, seed=seed)
        row = {name: fitted.interval(name) for name in law.names()}
        held = {name: low <= law.parameters[name] <= high for name, (low, high) in row.items()}
        truth, curve, run = law(*ahead), fitted.curve(*ahead), fitted.predict(*ahead)
        held["the law beyond"] = curve.low <= truth <= curve.high
        held["a new run"] = run.low <= truth * np.exp(new[seed]) <= run.high
        inside.append(held)
    return {name: float(np.mean([held[name] for held in inside])) for name in inside[0]}


def crossing_coverage(form: Form, tables: int, draws: int) -> float:
    """Return how often the interval of a crossing of two laws contains the truth."""
    truth, inside = true_crossing(form), []
    for seed in range(tables):
        estimate = crossing(*families(form, seed, draws))
        inside.append(estimate.low <= truth <= estimate.high)
    return float(np.mean(inside))


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    shares = {"power, frontier of runs that end above the law": frontier_coverage(TABLES, DRAWS)}
    for form in KNOWN:
        draws = 100 if form in ("repeated", "batched") else DRAWS  # these take longer
        parameters = coverage(form, TABLES, draws)
        shares |= {f"{form}, {name}": share for name, share in parameters.items()}
    shares |= {f"{form}, the crossing": crossing_coverage(form, TABLES, DRAWS) for form in OTHERS}
    for name, share in shares.items():
        print(f"{name}: {share:.1%}")
    if outside := [name for name, share in shares.items() if not 0.9 <= share <= 0.98]:
        sys.exit(f"not within 90 to 98%: {', '.join(outside)}")


if __name__ == "__main__":
    main()
