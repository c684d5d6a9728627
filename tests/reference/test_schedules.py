"""Schedules of the learning rate beside open_clip's, at every step."""

import types

import pytest
from open_clip_train import scheduler

from clip_jax.optim import Constant, CoolDown, Cosine, OptimConfig, schedule


@pytest.mark.parametrize(
    ("kind", "theirs", "options"),
    [
        (Cosine(), scheduler.cosine_lr, ()),
        (Constant(), scheduler.const_lr, ()),
        (CoolDown(steps=30), scheduler.const_lr_cooldown, (30,)),
        (CoolDown(steps=30, shape="power", power=1.7), scheduler.const_lr_cooldown, (30, 1.7)),
    ],
)
def test_schedules_are_open_clips_at_every_step(kind, theirs, options):
    optimizer = types.SimpleNamespace(param_groups=[{}])
    rate = schedule(OptimConfig(learning_rate=1e-3, warmup_steps=10, schedule=kind), 100)
    other = theirs(optimizer, 1e-3, 10, 100, *options)
    assert [rate(step) for step in range(100)] == pytest.approx(
        [other(step) for step in range(100)], rel=1e-12
    )
