"""Schedules of the learning rate beside open_clip's, at every step."""

import types

import pytest
from open_clip_train import scheduler

from clip_jax.optim import Constant, CoolDown, Cosine, OptimConfig, schedule


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        (Cosine(), lambda s, *a: s.cosine_lr(*a)),
        (Constant(), lambda s, *a: s.const_lr(*a)),
        (CoolDown(steps=30), lambda s, *a: s.const_lr_cooldown(*a, 30)),
        (CoolDown(steps=30, shape="power", power=1.7),
         lambda s, *a: s.const_lr_cooldown(*a, 30, cooldown_power=1.7)),
    ],
    ids=["cosine", "constant", "linear", "power"],
)  # fmt: skip
def test_schedules_are_open_clips_at_every_step(kind, theirs):
    optimizer = types.SimpleNamespace(param_groups=[{}])
    rate = schedule(OptimConfig(learning_rate=1e-3, warmup_steps=10, schedule=kind), 100)
    other = theirs(scheduler, optimizer, 1e-3, 10, 100)
    assert [rate(step) for step in range(100)] == pytest.approx(
        [other(step) for step in range(100)], rel=1e-12
    )
