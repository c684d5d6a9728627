"""How often the 95% intervals of scaling laws contain the truth, over 200 made-up tables.

    python benchmarks/scaling_coverage.py

It takes minutes, prints a line for each law, and fails where a share is not within 90 to 98%.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.scaling.known import (
    KNOWN,
    OTHERS,
    coverage,
    crossing_coverage,
    frontier_coverage,
)

TABLES, DRAWS = 200, 200


def main() -> None:
    shares = {"power, frontier of runs that end above the law": frontier_coverage(TABLES, DRAWS)}
    for form in KNOWN:
        draws = 100 if form in ("repeated", "batched") else DRAWS  # which take longer
        parameters = coverage(form, TABLES, draws)
        shares |= {f"{form}, {name}": share for name, share in parameters.items()}
    shares |= {f"{form}, the crossing": crossing_coverage(form, TABLES, DRAWS) for form in OTHERS}
    for name, share in shares.items():
        print(f"{name}: {share:.1%}")
    if outside := [name for name, share in shares.items() if not 0.9 <= share <= 0.98]:
        sys.exit(f"not within 90 to 98%: {', '.join(outside)}")


if __name__ == "__main__":
    main()
