"""How well orders mix 1.28 million samples that lie sorted by class, 1,280 of each of a thousand.

    PYTHONPATH=. python benchmarks/order.py

Classes in a batch, pairs of one class in it, how far classes' shares of 20 batches scatter (all
over what independent draws would give), and how far apart in batches two neighbours of the file
come. Blocks hold 60 samples. WebDataset's buffers are open_clip's: eight workers, 128 shards
given to them in random order, each worker with a buffer of 5,000 samples and batches of its
own.
"""

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
    runs = [order.at(stream, 0, steps * streams.width).record for stream in streams.own]
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
