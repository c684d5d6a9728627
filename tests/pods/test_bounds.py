"""Bounds: what overlaps, what cannot, and what is not known."""

import pytest

from clip_jax.metrics.chips import chips
from clip_jax.pods.bounds import bounds, by_part, step_seconds
from clip_jax.pods.work import Work

V5E = chips()["TPU v5e"]
SECOND = {"flops": V5E.peak_flops, "bytes": int(V5E.hbm_bandwidth)}  # of either, alone


def work(flops: float | None = 0.0, size: int = 0, cycles: int | None = 0, **more) -> Work:
    named = {"name": "x", "part": "MLP", "times": 1} | more
    return Work(flops=flops, bytes=size, cycles=cycles, **named)


def test_operations_one_after_the_other_take_longer_than_all_at_once():
    compute = work(SECOND["flops"], SECOND["bytes"] // 4, cycles=3_000_000_000)
    moving = work(0.0, SECOND["bytes"] // 2, times=2, part="copies")
    result = bounds(V5E, [compute, moving], 0, 0)
    assert result["compute"] == pytest.approx(1)
    assert result["memory"] == pytest.approx(1.25)
    assert step_seconds(result) == pytest.approx(
        {"bound": 1.25, "sequential_bound": 2, "compiler_estimate": 2}
    )
    parts = by_part(V5E, [compute, moving])
    assert list(parts) == ["MLP", "copies"]
    assert parts["MLP"]["operations"] == pytest.approx(1)


def test_copies_beside_other_operations_cost_no_time_of_their_own():
    compute = work(SECOND["flops"])
    hidden = work(size=SECOND["bytes"] // 2, hidden=True)
    assert bounds(V5E, [compute, hidden], 0, 0)["operations"] == pytest.approx(1)
    assert bounds(V5E, [compute, *[hidden] * 3], 0, 0)["operations"] == pytest.approx(1.5)


def test_a_kernel_without_a_figure_makes_its_bound_unknown():
    plain, kernel = work(SECOND["flops"], cycles=1), work(None, SECOND["bytes"], cycles=None)
    result = bounds(V5E, [plain, kernel], 0, 0)
    assert result["compute"] is result["operations"] is None
    bound = pytest.approx(1)  # its bytes are known
    unknown = {"sequential_bound": None, "compiler_estimate": None}
    assert step_seconds(result) == {"bound": bound} | unknown


def test_links_bound_a_step_too():
    inside, between = bounds(V5E, [work()], 400 * 10**9, 0), bounds(V5E, [work()], 0, 3_125 * 10**6)
    assert step_seconds(inside)["bound"] == pytest.approx(2)  # half is inwards
    assert step_seconds(between)["bound"] == pytest.approx(1)
    assert bounds(chips()["TPU v4"], [work()], 0, 5)["network"] is None
