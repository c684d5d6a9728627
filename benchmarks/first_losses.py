"""Compare the first 100 losses of the digits config: two processes of four devices, one of eight.

    PYTHONPATH=. python benchmarks/first_losses.py

Devices are simulated on the CPU. The exit code is 1 if two losses differ by more than 1e-5.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import DIGITS, ROOT, losses

STEPS = 100


def first_losses(workdir: Path, processes: int, devices: int) -> dict[int, float]:
    command = [
        sys.executable,
        ROOT / "launch/local.py",
        "--processes",
        processes,
        "--devices",
        devices,
        "train",
        DIGITS,
        "--workdir",
        workdir,
        "--stop-after",
        STEPS,
        "--report-every",
        1,
    ]
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return losses(workdir)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        one = first_losses(Path(scratch) / "one", 1, 8)
        two = first_losses(Path(scratch) / "two", 2, 4)
    assert len(one) == len(two) == STEPS
    difference = max(abs(one[step] - two[step]) for step in one)
    print(f"largest difference of {STEPS} losses: {difference:.1e}; the last {one[STEPS]:.4f}")
    sys.exit(difference > 1e-5)
