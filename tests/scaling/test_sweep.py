"""Sweeps: which trials a point has, and how halving chooses among them."""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from clip_jax.errors import InputError
from clip_jax.scaling import jobs
from clip_jax.scaling.ladder import LadderCommand, climb, grid
from clip_jax.scaling.rules import RulesConfig
from clip_jax.scaling.sweep import HalvingConfig, SweepConfig, halve
from tests.scaling.conftest import collected, stamps, tiny_ladder, train_all, write_spec


def ladder(sweep, **changes):
    both = tiny_ladder(samples=(1_024,), sweep=sweep, **changes)
    return replace(both, models={"w": both.base.model})


def test_a_point_has_a_trial_for_every_combination():
    swept = {"rates": (0.5, 2), "batch_sizes": (16, 64), "warmups": (1, 2)}
    sweep, rules = SweepConfig(weight_decays=(0.1, 0.2), **swept), RulesConfig(reference_width=16)
    points = grid(ladder(sweep, rules=rules), Path("root"))
    assert len(points) == len({point.name for point in points}) == 2**4
    by_name = {point.name: point.config for point in points}
    one = by_name["w@1K-rate0.5-batch64-warmup2-decay0.2-seed0"]
    # The base: 2e-3 and 2 steps of warm-up at batch 16; four times the batch, twice the rate.
    assert (one.batch_size, one.steps, one.optim.weight_decay) == (64, 16, 0.2)
    assert one.optim.learning_rate == pytest.approx(0.5 * 2 * 2e-3)
    assert one.optim.warmup_steps == 2 * 1  # a tenth of 16 steps at most, by the rules
    single = grid(ladder(SweepConfig(rates=(0.5,)), seeds=(0, 3)), Path("root"))
    assert [point.name for point in single] == ["w@1K-seed0", "w@1K-seed3"]


def test_sweeps_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match=r"sweep\.rates=\(1, 1\) must name each value once"):
        SweepConfig(rates=(1, 1))
    with pytest.raises(InputError, match=r"sweep\.warmups=\(\)"):
        SweepConfig(warmups=())
    with pytest.raises(InputError, match=r"sweep\.warmups=50 makes 100 steps of warm-up, of 64"):
        grid(ladder(SweepConfig(warmups=(1, 50))), Path("root"))


HALVING = HalvingConfig(metric="info_nce", factor=2, rounds=2)


def training(calls, losses, failing=()):
    """Instead of training, write what each run would measure where it stops."""

    def train(points):
        calls.append({point.name: point.config.end for point in points})
        for point in points:
            rate = point.config.optim.learning_rate
            row = {"step": point.config.end, "info_nce": losses(rate, point.config.seed)}
            if rate not in failing:
                point.workdir.mkdir(parents=True, exist_ok=True)
                with (point.workdir / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
        return {p.name: "diverged" for p in points if p.config.optim.learning_rate in failing}

    return train


def test_halving_trains_the_better_half_further(tmp_path):
    points = grid(ladder(SweepConfig(rates=(1, 2, 4, 8), halving=HALVING), seeds=(0, 1)), tmp_path)
    rates = sorted({point.config.optim.learning_rate for point in points})
    calls, lines = [], []
    # By the mean over seeds the second is best, the third next; the fourth fails.
    loss = dict(zip(rates, (3.0, 1.0, 2.0, 0.0), strict=True))
    train = training(calls, lambda rate, seed: loss[rate] + (2 if seed else -2), failing=rates[3:])
    failures = halve(points, HALVING, train, lines.append)
    name = "w@1K-rate{}-seed{}".format
    everyone = {name(rate, seed) for rate in (1, 2, 4, 8) for seed in (0, 1)}
    assert [set(call) for call in calls] == [
        everyone,
        {name(rate, seed) for rate in (2, 4) for seed in (0, 1)},
        {name(2, 0), name(2, 1)},
    ]
    assert [set(call.values()) for call in calls] == [{16}, {32}, {64}]
    assert failures == {name(8, 0): "diverged", name(8, 1): "diverged"}
    assert lines[0].startswith("round 1: 4 of 8 runs go on, by info_nce: w@1K-rate2-seed0")

    # Again, after everything was done: the same choices, by what was measured then.
    again = []
    train = training(again, lambda rate, seed: -rate, failing=rates)  # writes nothing
    halve(points, HALVING, lambda some: train(some) and {}, lines.append)
    assert [set(call) for call in again] == [set(call) for call in calls]


def test_points_are_halved_each_for_itself(tmp_path):
    sweep = SweepConfig(rates=(1, 2, 4), halving=replace(HALVING, rounds=1, best="max"))
    points, calls = grid(tiny_ladder(samples=(1_024,), sweep=sweep), tmp_path), []
    halve(points, sweep.halving, training(calls, lambda rate, seed: rate), print)
    kept = {f"{model}@1K-rate{rate}-seed0" for model in ("w16", "w32") for rate in (2, 4)}
    assert set(calls[1]) == kept  # of three trials two


def test_halving_stops_runs_and_goes_on_with_the_best(tmp_path):
    halving = 'HalvingConfig(metric="info_nce", rounds=1)'
    spec = write_spec(tmp_path, f"sweep=SweepConfig(rates=(0.01, 1), halving={halving})")
    command = LadderCommand(spec=spec, root=tmp_path / "runs", only="w16*")
    with mock.patch.object(jobs, "run", autospec=True, side_effect=train_all) as ran:
        result = climb(command, print)
    assert [len(call.args[0]) for call in ran.call_args_list] == [2, 1]
    assert all(point["done"] and not point["failure"] for point in result["points"])
    rows = {
        float(row["lr"]): (row["samples_seen"], row["stopped_of"]) for row in collected(tmp_path)
    }
    assert [rows[rate] for rate in sorted(rows)] == [("160", ""), ("80", "10")]
    before = stamps(command.root)
    with mock.patch.object(jobs, "run", autospec=True, return_value={}) as ran:
        climb(command, print)
    assert not any(call.args[0] for call in ran.call_args_list)
    assert before == stamps(command.root)
