"""Train on the digits sorted by number and read in blocks: does the model learn as well?

    python benchmarks/sorted_digits.py CONFIG WORKDIR [--seed 1 --data.seed 1 ...]

All pairs of a number are neighbours, in blocks of 32 pairs. Further options are passed to
`clip-jax train`.
"""

import argparse
import sys

import numpy as np

from clip_jax.cli import commands
from clip_jax.data import digits, pipeline
from clip_jax.data.sources import Record

BLOCK = 32


class Sorted(digits.DigitsSource):
    """The same pairs, sorted by number, as one file of blocks."""

    def load(self, index, rng):
        return super().load(self._place(index), rng)

    def key(self, index):
        return super().key(self._place(index))

    def _place(self, index: int) -> int:
        numbers = len(self._numbers)
        number, turn = divmod(index, -(-len(self) // numbers))
        return min(turn * numbers + number, len(self) - 1)

    def blocks(self):
        blocks, rest = divmod(len(self), BLOCK)
        return np.array([BLOCK] * blocks + [rest] * bool(rest))

    def size(self, first, last):
        return 256 * (last - first)

    def fetch(self, first, last):
        def record(index: int) -> Record:
            return Record(self.key(index), 256, lambda rng: self.load(index, rng))

        return [record(index) for index in range(first, last)]


if __name__ == "__main__":
    digits.DigitsSource = Sorted
    for module in (pipeline, *[m for n, m in sys.modules.items() if n.startswith("clip_jax.data")]):
        if hasattr(module, "DigitsSource"):
            module.DigitsSource = Sorted
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="such as configs/digits.py")
    parser.add_argument("workdir", help="run directory")
    args, more = parser.parse_known_args()
    order = ["--data.order", "blocks", "--workdir", args.workdir]
    sys.exit(commands.main(["train", args.config, *order, *more]))
