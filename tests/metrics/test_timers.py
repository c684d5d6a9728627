"""Timers and goodput, by a clock that the test moves."""

import math

import pytest

from clip_jax.metrics.timers import Goodput, Timers
from tests.clock import HandClock


def test_seconds_are_summed_by_activity_since_the_start_and_since_the_last_lap():
    clock = HandClock()
    timers = Timers(clock)
    clock.advance(1)
    with timers.measure("input"):
        clock.advance(2)
    assert timers.lap() == (3, {"input": 2})
    with timers.measure("input"), timers.measure("save"):
        clock.advance(4)
    assert timers.lap() == (4, {"input": 4, "save": 4})
    assert timers.total == {"input": 6, "save": 4}
    assert timers.elapsed() == 7


def test_goodput_adds_up_over_starts_and_knows_what_was_lost():
    clock = HandClock()
    timers = Timers(clock)
    timers.total |= {"init": 1.0, "compile": 2.0, "save": 0.5}
    clock.advance(10)
    earlier = {"seconds/steps": 100.0, "seconds/init": 5.0, "seconds/lost": 1.0, "other": "x"}
    goodput = Goodput(timers, earlier, steps_kept=90.0)
    values = goodput.values()
    assert values["seconds/init"] == 6.0
    assert values["seconds/lost"] == 11.0  # ten seconds of steps after the checkpoint
    assert values["seconds/steps"] == 90 + 6.5
    assert values["seconds/total"] == 6 + 2 + 0.5 + 11 + 96.5
    assert values["goodput"] == pytest.approx(96.5 / 116)
    assert goodput.describe() == (
        "goodput 83.2%; seconds: init 6.0, compile 2.0, save 0.5, steps 96.5, lost 11.0"
    )
    untouched = Goodput(timers, earlier, steps_kept=math.inf).values()
    assert untouched["seconds/lost"] == 1.0
