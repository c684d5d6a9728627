"""Read batches for some seconds, and print how much memory the process tree held on the way.

    python tests/data/leak.py SECONDS RATE FOLDER [FOLDER ...]

All folders in one mixture, at no more than RATE samples a second (inf: as fast as it goes).
Prints samples read and the bytes of main process and worker together (proportional set size: a
page that both have counts once), measured at every hundredth of the time.
"""

import dataclasses
import gc
import json
import os
import sys
import time
from pathlib import Path

from clip_jax.data.mixture import MemberConfig, MixtureConfig
from clip_jax.data.pipeline import DataConfig, build
from clip_jax.data.sources.any import PathConfig
from clip_jax.data.tokenizer import Tokenizer


def tree_bytes() -> int:
    """Of this process and its children."""
    own = Path("/proc/self/task")
    children = {pid for task in own.iterdir() for pid in (task / "children").read_text().split()}
    total = 0
    for pid in (str(os.getpid()), *children):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def main(seconds: float, rate: float, folders: list[str]) -> None:
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
    batches = build(config, tokenizer=Tokenizer(), **how).batches()
    next(batches)  # the worker is there
    start, samples, held = time.perf_counter(), 0, []
    for batch in batches:
        samples += len(batch.keys)
        passed = time.perf_counter() - start
        if passed > len(held) * seconds / 100:
            gc.collect()
            held.append(tree_bytes())
        if passed > seconds:
            break
        time.sleep(max(samples / rate - passed, 0))
    batches.close()
    print(json.dumps({"samples": samples, "bytes": held}))


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
