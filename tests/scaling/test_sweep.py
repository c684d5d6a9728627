"""Sweeps: which trials a point has."""

from dataclasses import replace
from pathlib import Path

import pytest

from clip_jax.errors import InputError
from clip_jax.scaling.ladder import grid
from clip_jax.scaling.rules import RulesConfig
from clip_jax.scaling.sweep import SweepConfig
from tests.scaling.conftest import tiny_ladder


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
