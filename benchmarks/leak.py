"""Read many batches, and print by how much the memory of the process tree grew meanwhile.

    PYTHONPATH=. python benchmarks/leak.py [SAMPLES]

A mixture of six formats is read, unreadable images included, by a worker process and by threads.
Leaks grow with the number of samples, 300,000 by default. Growth is measured between the second and
the last tenth of the samples; the exit code is 1 if it is 2% or more.

Memory is measured after each hundredth of the samples: the proportional set size of what the main
process and the worker have allocated. Mapped files do not count, since the share of a library's
pages grows as soon as another program that maps it ends.
"""

import argparse
import dataclasses
import gc
import os
import statistics
import sys
import tempfile
from pathlib import Path

from clip_jax.data.batch_plan import constant
from clip_jax.data.order.mixture import MemberConfig, MixtureConfig
from clip_jax.data.pipeline import DataConfig, build
from clip_jax.data.sources.any import PathConfig
from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer
from clip_jax.models.images import Square
from tests.data.conftest import FORMATS, make_pairs

KINDS = ("tar", "table", "parquet", "array_record", "saved_dataset", "tfds")


def tree_bytes() -> int:
    """Return the allocated bytes of this process and its children."""
    own = Path("/proc/self/task")
    children = {pid for task in own.iterdir() for pid in (task / "children").read_text().split()}
    total = 0
    for pid in (str(os.getpid()), *children):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        allocated = [line for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
        total += sum(int(line.split()[1]) * 1024 for line in allocated)
    return total


def write(folder: Path) -> list[str]:
    """Write the same pairs in each format; return the paths."""
    pairs = [*make_pairs(500), ("broken.jpg", b"no image", "a caption")]
    for kind in KINDS:
        (folder / kind).mkdir()
    return [FORMATS[kind](folder / kind, pairs).path for kind in KINDS]


def held(samples: int, paths: list[str]) -> list[int]:
    """Return the allocated bytes after each hundredth of the samples."""
    members = tuple(MemberConfig(source=PathConfig(path=path)) for path in paths)
    config = DataConfig(
        source=MixtureConfig(members=members),
        crop_scale=(0.5, 1.0),
        workers=1,
        threads=2,
        max_bad_share=1.0,
    )
    config = dataclasses.replace(config, augment=dataclasses.replace(config.augment, flip=0.5))
    plan = constant(256, Square(64))
    batches = build(config, plan, tokenizer=ClipTokenizer(), context_length=32).batches()
    next(batches)  # the worker has started
    seen, sizes = 0, []
    while seen < samples:
        seen += len(next(batches).keys)
        if seen > len(sizes) * samples / 100:
            gc.collect()
            sizes.append(tree_bytes())
    batches.close()
    return sizes


def main(samples: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        sizes = held(samples, write(Path(folder)))
    tenth = len(sizes) // 10
    before, after = (statistics.median(x) for x in (sizes[tenth : 2 * tenth], sizes[-tenth:]))
    growth = after / before - 1
    print(f"{samples:,} samples: {before / 2**20:.1f} MiB, growth {growth:.2%}")
    return int(growth >= 0.02)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", nargs="?", type=int, default=300_000, help="samples to read")
    sys.exit(main(parser.parse_args().samples))
