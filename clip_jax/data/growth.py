"""Batch sizes that double during a run instead of a learning-rate decay (arXiv:1711.00489)."""

from collections.abc import Sequence


def phases(batch_size: int, doubled_at: Sequence[int], steps: int) -> list[tuple[int, int]]:
    """Return the batch sizes of the first `steps` updates, each with its number of updates."""
    ends = [*(min(step, steps) for step in doubled_at), steps]
    lengths = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    return [(batch_size << i, length) for i, length in enumerate(lengths) if length]


def batch_after(batch_size: int, doubled_at: Sequence[int], step: int) -> int:
    """Return the number of pairs in the update that follows the first `step` updates."""
    return batch_size << sum(done <= step for done in doubled_at)


def samples_after(batch_size: int, doubled_at: Sequence[int], steps: int) -> int:
    """Return the number of pairs in the first `steps` updates."""
    return sum(size * count for size, count in phases(batch_size, doubled_at, steps))
