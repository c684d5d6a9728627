"""Measure how many changed copies of images `prepare --drop-near-duplicates` detects.

    PYTHONPATH=. python benchmarks/near_duplicates.py [SCENES]

Each of 250 generated scenes is recompressed, halved in size, cropped or brightened. The script
prints the share of copies that is detected at the default distance, by the bits of a band, which
grow with the data set. The last row counts look-alikes (other objects before the same background)
that are taken for duplicates.
"""

import argparse

import numpy as np

from clip_jax.prepare import near
from clip_jax.prepare.filters import FilterConfig
from tests.prepare.conftest import CHANGES, scene

BITS = (12, 16, 20, 24, 28)


def detected(originals: list[np.ndarray], others: list[np.ndarray], bits: int) -> int:
    """Count the images that are near their original, which is at the same place in the list."""
    return sum(
        any(
            near.near_earlier(np.array([(0, a), (1, b)], near.ROW), band, bits, distance)[0].size
            for band in range(near.BANDS)
        )
        for a, b in zip(originals, others, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenes", nargs="?", type=int, default=250, help="number of scenes")
    count = parser.parse_args().scenes
    scenes = [scene(i) for i in range(count)]
    originals = [near.perceptual_hash(x) for x in scenes]
    print(f"| change | {' | '.join(f'{bits} bits, %' for bits in BITS)} |\n|{'---|' * 6}")
    for name, change in CHANGES.items():
        copies = [near.perceptual_hash(change(x)) for x in scenes]
        shares = [f"{100 * detected(originals, copies, bits) / count:.1f}" for bits in BITS]
        print(f"| {name} | {' | '.join(shares)} |", flush=True)
    alike = [near.perceptual_hash(scene(i, things=1)) for i in range(count)]
    print(f"| look-alikes | {' | '.join(str(detected(originals, alike, b)) for b in BITS)} |")


distance = FilterConfig().near_distance
if __name__ == "__main__":
    main()
