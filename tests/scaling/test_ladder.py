"""The hardware of a ladder's spec."""

import pytest

from clip_jax.scaling.ladder import HardwareConfig


def test_hours_follow_from_the_peak():
    v5e = HardwareConfig(chip="TPU v5e", chips=256, mfu=0.5, start_seconds=360)
    hours = v5e.hours(256 * 197e12 * 0.5 * 3600)  # one hour of work
    assert hours == pytest.approx(1.1)
    core = HardwareConfig(chip="CPU core", peak_flops=1e10, mfu=0.5)
    assert core.hours(3.6e13) == pytest.approx(2)
    with pytest.raises(ValueError, match="'TPU v9' is not one of TPU v3, TPU v4, TPU v5e"):
        HardwareConfig(chip="TPU v9")
    with pytest.raises(ValueError, match=r"mfu=40.*at most 1"):
        HardwareConfig(mfu=40)
