"""Bounds and estimates: what overlaps, what cannot, and what is not known."""

import pytest

from clip_jax import chips
from clip_jax.pods.bounds import bounds, by_part, step_seconds, unscheduled
from clip_jax.pods.collectives import Collective
from clip_jax.pods.work import Work

V5E = chips.table()["TPU v5e"]
SECOND = {"flops": V5E.peak_flops, "bytes": int(V5E.hbm_bandwidth)}  # of either, alone
CYCLES = 1_500_000_000  # of a second


def work(flops: float | None = 0.0, size: int = 0, cycles: int | None = 0, **more) -> Work:
    named = {"name": "x", "opcode": "fusion", "part": "MLP", "times": 1} | more
    return Work(flops=flops, bytes=size, cycles=cycles, **named)


def collective(received: int, between: int = 0, overlapped: bool = False) -> Collective:
    return Collective(
        kind="all-reduce",
        axes=("data",),
        part="update",
        source="",
        arrays=(),
        times=1,
        bytes=received,
        received=received,
        received_from_slices=between,
        overlapped=overlapped,
    )


def test_operations_one_after_the_other_take_longer_than_all_at_once():
    compute = work(SECOND["flops"], SECOND["bytes"] // 4, cycles=2 * CYCLES, schedule=CYCLES // 2)
    moving = work(0.0, SECOND["bytes"] // 2, times=2, part="copies")
    result = bounds(V5E, [compute, moving], [])
    assert result["compute"] == pytest.approx(1)
    assert result["memory"] == pytest.approx(1.25)
    assert step_seconds(result) == pytest.approx(
        {"bound": 1.25, "sequential_bound": 2, "schedule_estimate": 2, "cost_model": 2}
    )
    parts = by_part(V5E, [compute, moving], [])
    assert list(parts) == ["MLP", "copies"]
    assert parts["MLP"]["operations"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("more", "seconds"),
    [
        ({"schedule": 6 * CYCLES}, 6),
        ({"schedule": CYCLES, "matrix": 3 * CYCLES}, 3),  # bundles do not wait for the units
        ({"schedule": CYCLES // 2, "size": 2 * SECOND["bytes"]}, 2),
        ({"schedule": CYCLES // 2, "flops": 1.5 * SECOND["flops"]}, 1.5),
        ({"cycles": 7 * CYCLES}, 7),  # no schedule: the cost model's cycles
        ({"schedule": CYCLES, "cycles": 7 * CYCLES}, 1),
        ({"schedule": CYCLES, "part": "collectives"}, 0),  # timed by their links
    ],
)
def test_an_operation_takes_the_longest_of_schedule_memory_and_matrix_unit(more, seconds):
    result = bounds(V5E, [work(times=2, **more)], [])
    assert step_seconds(result)["schedule_estimate"] == pytest.approx(2 * seconds)
    cost_model = 2 * more.get("cycles", 0) / CYCLES
    assert step_seconds(result)["cost_model"] == pytest.approx(cost_model)


def test_operations_without_a_schedule_are_listed():
    works = [work(cycles=CYCLES, times=3, opcode="sort"), work(schedule=5), work(opcode="add")]
    assert unscheduled(V5E, works) == pytest.approx({"sort": 3})


def test_copies_beside_other_operations_cost_no_time_of_their_own():
    compute = work(SECOND["flops"])
    hidden = work(size=SECOND["bytes"] // 2, hidden=True)
    assert bounds(V5E, [compute, hidden], [])["operations"] == pytest.approx(1)
    result = bounds(V5E, [compute, *[hidden] * 3], [])
    assert result["operations"] == result["schedule"] == pytest.approx(1.5)


def test_a_kernel_without_a_figure_makes_its_bound_unknown():
    plain, kernel = work(SECOND["flops"], cycles=1), work(None, SECOND["bytes"], cycles=None)
    result = bounds(V5E, [plain, kernel], [])
    assert result["compute"] is result["operations"] is None
    bound = pytest.approx(1)  # its bytes are known
    unknown = {"sequential_bound": None, "schedule_estimate": None, "cost_model": None}
    assert step_seconds(result) == {"bound": bound} | unknown


def test_links_bound_a_step_and_add_to_it_where_nothing_overlaps():
    links = [collective(400 * 10**9), collective(200 * 10**9, overlapped=True)]
    result = bounds(V5E, [work(schedule=CYCLES, part="MLP"), work(part="collectives")], links)
    assert result["interconnect"] == pytest.approx(3)  # half of the bandwidth is inwards
    assert result["schedule"] == pytest.approx(1 + 2)
    assert step_seconds(result)["bound"] == pytest.approx(3)
    parts = by_part(V5E, [work(schedule=CYCLES), work(part="collectives")], links)
    assert {name: x["schedule"] for name, x in parts.items()} == pytest.approx(
        {"MLP": 1, "collectives": 2}
    )


def test_the_network_between_slices_bounds_a_step_where_it_is_known():
    slow = [collective(0, between=3_125 * 10**6, overlapped=True)]
    assert step_seconds(bounds(V5E, [work()], slow))["bound"] == pytest.approx(1)
    assert bounds(V5E, [work()], [])["network"] == 0
    assert bounds(chips.table()["TPU v4"], [work()], slow)["network"] is None
