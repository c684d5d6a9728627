"""Mixtures: shares, each member's own position, and weights that change on the way."""

import collections

import numpy as np
import pytest

from clip_jax.data.digits import DigitsConfig
from clip_jax.data.order.mixture import (
    MemberConfig,
    MixtureConfig,
    MixtureSource,
    PhaseConfig,
    _Pattern,
)
from tests.data.conftest import Numbers


def mixture(weights, phases=()):
    members = tuple(MemberConfig(source=DigitsConfig(), weight=float(x)) for x in weights)
    return MixtureConfig(members=members, phases=phases)


def keys(config, sizes, positions):
    """Member and number of the samples at these positions."""
    source = MixtureSource(config, [Numbers(size) for size in sizes])
    order, rng = source.order(seed=3), np.random.default_rng(0)
    found = [(source.key(i), source.load(i, rng)[1]) for i in map(order.__getitem__, positions)]
    assert all(key.endswith(f"/{number}") for key, number in found)
    return [(int(key.split("/")[0]), int(number)) for key, number in found]


def test_shares_are_the_weights():
    members = [member for member, _ in keys(mixture((3, 1)), (9, 9), range(256))]
    assert collections.Counter(members) == {0: 192, 1: 64}
    assert abs(members[:40].count(1) - 10) <= 1  # evenly spread, not in runs


def test_a_small_weight_is_read_and_a_tiny_one_refused():
    """Where 4096 samples have none of a member, the period in which weights are kept is larger."""
    pattern = _Pattern((1.0, 1e-4))
    assert (pattern.period, pattern.counts.tolist()) == (8192, [8191, 1])
    assert _Pattern((1.0, 1e-3, 0.0)).counts.tolist() == [4092, 4, 0]  # as before
    with pytest.raises(ValueError, match="the smallest is less than one of 4194304 samples"):
        mixture((1.0, 1e-9))


PHASES = (
    PhaseConfig(from_sample=277, weights=(1.0, 0.0, 1.0)),
    PhaseConfig(from_sample=401, weights=(1.0, 1.0, 1.0)),
)


@pytest.mark.parametrize("config", [mixture((1.0, 2.5, 0.4)), mixture((1.0, 2.5, 0.0), PHASES)])
def test_every_member_has_its_own_epochs(config):
    """Whatever the weights, and however they change, a member goes on where it stood."""
    sizes = (20, 30, 10)
    found = keys(config, sizes, range(600))
    for member, size in enumerate(sizes):
        of_member = [key for which, key in found if which == member]
        epochs = [of_member[i : i + size] for i in range(0, len(of_member) - size + 1, size)]
        assert len(epochs) > 3
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_a_change_leaves_the_past_alone():
    before = keys(mixture((1, 1)), (50, 70), range(300))
    phases = (PhaseConfig(from_sample=200, weights=(0.0, 1.0, 1.0)),)
    after = keys(mixture((1, 1, 0), phases), (50, 70, 30), range(300))
    assert before[:200] == after[:200]
    assert {member for member, _ in after[200:]} == {1, 2}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: MixtureConfig(), "members is empty"),
        (lambda: mixture((0, 0)), "not all 0"),
        (lambda: mixture((1,), (PhaseConfig(from_sample=1, weights=(1.0, 1.0)),)), "needs 1, one"),
        (lambda: mixture((1.0, 2.5, 0.0), PHASES[::-1]), "put them in ascending order"),
    ],
)
def test_wrong_config(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
