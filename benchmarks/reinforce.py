"""Reinforce generated pairs by threads and on Ray, where a node dies, and compare the files.

    PYTHONPATH=. python benchmarks/reinforce.py [PAIRS]

Images are noise of 16 pixels; two teachers with random weights embed two augmentations of each and
its caption. Ray has two simulated nodes. One is killed when a third of the shards is written.
Prints time and peak memory (proportional set size, with all processes) of both, and whether all
shards are equal byte for byte.
"""

import argparse
import contextlib
import hashlib
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.prepare import make, watch
from clip_jax.convert.formats import write_weights
from clip_jax.convert.weights import Weights, default_preprocess
from clip_jax.data.augment import AugmentationsConfig
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.prepare.writer import prepare

PAIRS, SHARDS = 100_000, 20
WIDTHS = (48, 64)


def write_teacher(folder: Path, width: int) -> Path:
    config = CLIPConfig(
        embed_dim=width,
        vision=ViTConfig(image_size=16, patch_size=8, width=width, depth=2, num_heads=2),
        text=TextConfig(context_length=16, width=width, depth=2, num_heads=2),
    )
    params = jax.tree.map(np.asarray, jax.jit(CLIP(config).init)(jax.random.key(width)))
    path = folder / f"teacher-{width}"
    weights = Weights(config=config, params=params, preprocess=default_preprocess(config))
    write_weights(weights, path, "clip-jax")
    return path


def kill_node(cluster: Any, node: Any, folder: Path) -> None:
    """Kill a node without warning, processes and all, when a third of the shards is written."""
    while len(list(folder.glob("pairs-*.json"))) < SHARDS // 3:
        time.sleep(0.2)
    cluster.remove_node(node, allow_graceful=False)
    print(
        f"a node is dead, {len(list(folder.glob('pairs-*.json')))} shards are written", flush=True
    )


def timed(name: str, config: PrepareConfig) -> dict[str, str]:
    """Prepare; print time and memory; return the digest of each shard."""
    most, stop = [0.0, 0.0], threading.Event()
    watching = threading.Thread(target=watch, args=(most, stop))
    watching.start()
    start = time.perf_counter()
    counts = prepare(config)["counts"]
    seconds = time.perf_counter() - start
    stop.set()
    watching.join()
    pairs = sum(counts.values())
    print(
        f"{name}: {seconds:.0f} s, {pairs / seconds:,.0f} pairs/s, {most[0]:.2f} GiB this process, "
        f"{most[1]:.2f} GiB with its workers, {counts}",
        flush=True,
    )
    assert config.destination is not None
    shards = sorted(Path(config.destination).glob("*.array_record"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="?", type=int, default=PAIRS, help="number of pairs")
    pairs = parser.parse_args().pairs
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        make(folder / "in", pairs, 16)
        how: dict[str, Any] = {
            "source": f"{folder}/in/*.tar",
            "reinforce": tuple(write_teacher(folder, width) for width in WIDTHS),
            "augmentations": AugmentationsConfig(size=16),
            "samples_per_shard": -(-pairs // SHARDS),
            "batch_size": 256,
        }
        here = timed("threads", PrepareConfig(**how, destination=folder / "here"))
        os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
        # The head takes no tasks; each of the two nodes has one core, so one actor.
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        stack.callback(cluster.shutdown)
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        os.environ["RAY_ADDRESS"] = cluster.address
        killer = threading.Thread(target=kill_node, args=(cluster, nodes[1], folder / "there"))
        killer.start()
        there = timed("ray", PrepareConfig(**how, destination=folder / "there", on="ray"))
        killer.join()
        print(f"{len(here)} shards are " + ("equal" if here == there else "DIFFERENT"))
        sys.exit(here != there)


if __name__ == "__main__":
    main()
