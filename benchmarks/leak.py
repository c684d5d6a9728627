"""Read batches, and print how much memory the process tree held on the way.

    python benchmarks/leak.py SAMPLES FOLDER [FOLDER ...]

All folders in one mixture. Prints the bytes of main process and worker together, measured at every
hundredth of the samples: the proportional set size of what they allocated (a page that both have
counts once). Not of files that they map: of a library's pages, they have a larger share as soon as
another program that maps it ends.
"""

import dataclasses
import gc
import json
import os
import sys
from pathlib import Path

from clip_jax.data.mixture import MemberConfig, MixtureConfig
from clip_jax.data.pipeline import DataConfig, build
from clip_jax.data.sources.any import PathConfig
from clip_jax.data.tokenizers.clip import ClipTokenizer


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


def main(samples: int, folders: list[str]) -> None:
    members = tuple(MemberConfig(source=PathConfig(path=folder)) for folder in folders)
    config = DataConfig(
        source=MixtureConfig(members=members),
        crop_scale=(0.5, 1.0),
        workers=1,
        threads=2,
        max_bad_share=1.0,
    )
    config = dataclasses.replace(config, augment=dataclasses.replace(config.augment, flip=0.5))
    how = {"image_size": 64, "context_length": 32, "batch_size": 256}
    batches = build(config, tokenizer=ClipTokenizer(), **how).batches()
    next(batches)  # the worker is there
    seen, held = 0, []
    while seen < samples:
        seen += len(next(batches).keys)
        if seen > len(held) * samples / 100:
            gc.collect()
            held.append(tree_bytes())
    batches.close()
    print(json.dumps(held))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
