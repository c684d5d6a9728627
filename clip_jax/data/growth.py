"""A batch that doubles on the way, as an alternative to a falling rate (arXiv:1711.00489)."""

from collections.abc import Sequence


def phases(batch_size: int, doubled_at: Sequence[int], steps: int) -> list[tuple[int, int]]:
    """Return the batch sizes of the first `steps` updates, each with how many have it."""
    ends = [*(min(step, steps) for step in doubled_at), steps]
    lengths = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    return [(batch_size << i, length) for i, length in enumerate(lengths) if length]


def batch_after(batch_size: int, doubled_at: Sequence[int], step: int) -> int:
    """Count the pairs of the update after `step` others."""
    return batch_size << sum(done <= step for done in doubled_at)


def samples_after(batch_size: int, doubled_at: Sequence[int], steps: int) -> int:
    """Count the pairs of the first `steps` updates."""
    return sum(size * count for size, count in phases(batch_size, doubled_at, steps))
