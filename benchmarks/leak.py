"""Read batches, and print by which part the memory of the process tree grew on the way.

    PYTHONPATH=. python benchmarks/leak.py [SAMPLES]

Six formats at once in a mixture, with images that cannot be read, by a worker process and threads.
What leaks does so by sample: 300,000 by default. The growth is from the second tenth of the samples
to the last one, and the exit code is 1 if it is 2% or more. Memory is measured at every hundredth
of the samples: the proportional set size of what main process and worker together allocated (a page
that both have counts once). Not of files that they map: of a library's pages, they have a larger
share as soon as another program that maps it ends.
"""

import dataclasses
import gc
import os
import statistics
import sys
import tempfile
from pathlib import Path

from clip_jax.data.order.mixture import MemberConfig, MixtureConfig
from clip_jax.data.pipeline import DataConfig, build
from clip_jax.data.sources.any import PathConfig
from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer
from clip_jax.models.images import Square
from tests.data.conftest import FORMATS, make_pairs

KINDS = ("tar", "table", "parquet", "array_record", "saved_dataset", "tfds")


def tree_bytes() -> int:
    """Of this process and its children."""
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
    """Bytes at every hundredth of the samples."""
    members = tuple(MemberConfig(source=PathConfig(path=path)) for path in paths)
    config = DataConfig(
        source=MixtureConfig(members=members),
        crop_scale=(0.5, 1.0),
        workers=1,
        threads=2,
        max_bad_share=1.0,
    )
    config = dataclasses.replace(config, augment=dataclasses.replace(config.augment, flip=0.5))
    how = {"image_spec": Square(64), "context_length": 32, "batch_size": 256}
    batches = build(config, tokenizer=ClipTokenizer(), **how).batches()
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
    print(f"{samples:,} samples, {before / 2**20:.1f} MiB, grown by {growth:.2%}")
    return int(growth >= 0.02)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 300_000))
