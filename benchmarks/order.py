"""Measure how well different orders mix 1.28 million samples that are sorted by class.

    PYTHONPATH=. python benchmarks/order.py

The data have 1,000 classes of 1,280 samples each, in shuffle blocks of 60. For each order the
script prints:

- the number of classes in a batch,
- the number of pairs of one class in a batch,
- the scatter of the classes' shares of 20 batches,
- the distance in batches between samples that are neighbours in the file.

The ratios in brackets, the pairs and the scatter are relative to independent draws. WebDataset's
buffers are those of open_clip: eight workers share 128 shards in random order, and each has a
buffer of 5,000 samples and makes batches of its own.
"""

import argparse
import random
from collections.abc import Iterator

import numpy as np

from clip_jax.data.order.blocks import BlockOrder, OfPositions, Streams

CLASSES, EACH, BLOCK, SHARDS, WORKERS, BUFFER = 1000, 1280, 60, 128, 8, 5000
COUNT = CLASSES * EACH


def blocks(batch_size: int, shuffle_blocks: int) -> np.ndarray:
    streams, sizes = Streams(batch_size), np.full(COUNT // BLOCK, BLOCK)
    shares = OfPositions(streams, int(sizes.sum()))
    order = BlockOrder(sizes, seed=0, shuffle_blocks=shuffle_blocks, shares=shares)
    steps = int(sizes.sum()) // batch_size
    runs = [order.at(stream, 0, steps * streams.width).record for stream in streams.of_process]
    return np.stack([run.reshape(steps, -1) for run in runs], 1).reshape(steps, batch_size)


def web_dataset(batch_size: int) -> np.ndarray:
    rng = random.Random(0)
    shards = list(range(SHARDS))
    rng.shuffle(shards)
    size = COUNT // SHARDS

    def worker(own: list[int]) -> Iterator[int]:
        buffer: list[int] = []
        for shard in own:
            for sample in range(shard * size, (shard + 1) * size):
                buffer.append(sample)
                if len(buffer) >= BUFFER:
                    at = rng.randrange(len(buffer))
                    buffer[at], buffer[-1] = buffer[-1], buffer[at]
                    yield buffer.pop()
        rng.shuffle(buffer)
        yield from buffer

    streams = [np.fromiter(worker(shards[i::WORKERS]), np.int64) for i in range(WORKERS)]
    steps = len(streams[0]) // batch_size
    parts = [stream[: steps * batch_size].reshape(steps, batch_size) for stream in streams]
    return np.stack(parts, 1).reshape(-1, batch_size)


def describe(name: str, batches: np.ndarray) -> str:
    batch_size = batches.shape[1]
    counts = [
        np.bincount(batch // EACH, minlength=CLASSES) for batch in batches[:: len(batches) // 8]
    ]
    distinct = np.mean([np.count_nonzero(count) for count in counts])
    pairs = np.mean([(count * (count - 1) // 2).sum() for count in counts])
    expected = CLASSES * (1 - (1 - 1 / CLASSES) ** batch_size)
    turns = (batches // EACH)[: len(batches) // 20 * 20].reshape(-1, 20 * batch_size)
    shares = np.stack([np.bincount(turn, minlength=CLASSES) for turn in turns])
    scatter = shares.std() / shares.mean() ** 0.5
    step = np.full(COUNT, -1, np.int64)
    step[batches.reshape(-1)] = np.repeat(np.arange(len(batches)), batch_size)
    both = (step[:-1] >= 0) & (step[1:] >= 0)
    apart = np.abs(np.diff(step))[both]
    return (
        f"| {batch_size:,} | {name} | {distinct:,.0f} ({distinct / expected:.2f}) "
        f"| {pairs / (batch_size * (batch_size - 1) / 2 / CLASSES):.2f} | {scatter:.2f} "
        f"| {apart.mean():,.1f} |"
    )


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(
        "| batch | order | classes in a batch | pairs of one class | scatter of shares "
        "| neighbours apart, batches |\n" + "|---" * 6 + "|"
    )
    for batch_size in (1024, 32768):
        steps = COUNT // batch_size
        anywhere = np.random.default_rng(0).permutation(COUNT)[: steps * batch_size]
        print(describe("global", anywhere.reshape(steps, batch_size)), flush=True)
        for size in (256, 1024, 4096):
            made = blocks(batch_size, size)
            print(describe(f"{size:,} shuffle blocks", made), flush=True)
        print(describe("WebDataset's buffers", web_dataset(batch_size)), flush=True)


if __name__ == "__main__":
    main()
