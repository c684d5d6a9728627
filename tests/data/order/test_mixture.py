"""Mixtures: shares by weight, each member's own position and epochs, and changes of weights."""

from dataclasses import replace
from unittest import mock

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.data.digits import DigitsConfig
from clip_jax.data.order.blocks import BlockOrder, Equal, Streams
from clip_jax.data.order.mixture import (
    MemberConfig,
    MixtureConfig,
    MixtureSource,
    PhaseConfig,
    _Pattern,
)
from clip_jax.data.sources import blocks_of
from tests.data.conftest import Numbers


def mixture(weights, phases=()):
    members = tuple(MemberConfig(source=DigitsConfig(), weight=float(x)) for x in weights)
    return MixtureConfig(members=members, phases=phases)


def keys(config, sizes, positions):
    """Return (member, number) of the samples at these positions."""
    source = MixtureSource(config, [Numbers(size) for size in sizes])
    order, rng = source.order(seed=3), np.random.default_rng(0)
    found = [(source.key(i), source.load(i, rng)[1]) for i in map(order.__getitem__, positions)]
    assert all(key.endswith(f"/{number}") for key, number in found)
    return [(int(key.split("/")[0]), int(number)) for key, number in found]


WEIGHTS = st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.5]), min_size=3, max_size=3).filter(any)
PHASES = st.lists(
    st.builds(PhaseConfig, from_sample=st.integers(0, 300), weights=WEIGHTS.map(tuple)), max_size=3
).map(lambda phases: tuple(sorted(phases, key=lambda phase: phase.from_sample)))
LENGTHS = st.lists(st.integers(1, 30), min_size=3, max_size=3)


# grain's permutations of few numbers are slow.
unshuffled = mock.patch.object(grain.MapDataset, "shuffle", lambda dataset: dataset)


def test_a_member_is_shuffled_in_each_epoch_of_its_own():
    sizes = (40, 60)
    found = keys(mixture((1, 1)), sizes, range(240))
    for member, size in enumerate(sizes):
        of_member = [number for which, number in found if which == member]
        first, second = of_member[:size], of_member[size : 2 * size]
        assert sorted(first) == sorted(second) == list(range(size))
        assert first != second
        assert sorted(first) not in (first, second)


@given(weights=WEIGHTS, phases=PHASES, sizes=LENGTHS)
@unshuffled
def test_members_have_their_shares_and_go_on_where_they_stood(weights, phases, sizes):
    """Weights may change at any position. In each phase the members' samples are evenly spread."""
    found = keys(mixture(weights, phases), sizes, range(400))
    for member, size in enumerate(sizes):
        numbers = [number for which, number in found if which == member]
        assert numbers == [i % size for i in range(len(numbers))]
    starts = [0, *(phase.from_sample for phase in phases)]
    ends = [*starts[1:], 400]
    weights_of_phases = [weights, *(phase.weights for phase in phases)]
    for start, end, each in zip(starts, ends, weights_of_phases, strict=True):
        members = np.array([member for member, _ in found[start:end]])
        for member, weight in enumerate(each):
            counts = np.cumsum(members == member)
            shares = np.arange(1, end - start + 1) * weight / sum(each)
            assert (abs(counts - shares) < 2).all()
            assert weight or not counts.any()


@given(weights=WEIGHTS, phases=PHASES, sizes=LENGTHS, at=st.integers(0, 300), added=WEIGHTS)
@unshuffled
def test_a_later_phase_and_a_new_member_leave_the_past_alone(weights, phases, sizes, at, added):
    earlier = tuple(phase for phase in phases if phase.from_sample <= at)
    before = keys(mixture(weights, earlier), sizes, range(at))
    padded = [replace(phase, weights=(*phase.weights, 0.0)) for phase in earlier]
    longer = (*padded, PhaseConfig(from_sample=at, weights=(*added, 1.0)))
    assert before == keys(mixture([*weights, 0.0], longer), [*sizes, 7], range(at))


@given(weights=WEIGHTS, phases=PHASES, sizes=LENGTHS, data=st.data())
def test_in_the_block_order_too_each_stream_goes_on_in_each_member(weights, phases, sizes, data):
    """A stream reads each member in the member's own block order, from any offset on."""
    source = MixtureSource(mixture(weights, phases), [Numbers(size) for size in sizes])
    streams, starts = Streams(12), np.cumsum([0, *sizes])
    order = source.stream_order(3, streams, 16)
    stream = data.draw(st.integers(0, streams.count - 1))
    whole = order.at(stream, 0, 60)
    members = np.searchsorted(starts, whole.record, "right") - 1
    for member, size in enumerate(sizes):
        alone = BlockOrder(
            blocks_of(source.members[member]),
            seed=3 + member,
            shuffle_blocks=16,
            shares=Equal(streams, size),
        )
        places = members == member
        if places.any():
            run = alone.at(stream, 0, int(np.count_nonzero(places)))
            np.testing.assert_array_equal(whole.record[places], run.record + starts[member])
            np.testing.assert_array_equal(whole.epoch[places], run.epoch)
            np.testing.assert_array_equal(whole.first[places], run.first + starts[member])
            np.testing.assert_array_equal(whole.last[places], run.last + starts[member])
    offset = data.draw(st.integers(0, 59))
    again = source.stream_order(3, streams, 16).at(stream, offset, 60 - offset)
    for array, expected in zip(again, whole, strict=True):
        np.testing.assert_array_equal(array, expected[offset:])


def test_a_small_weight_is_read_and_a_tiny_one_refused():
    """If a member would have none of 4096 samples, the period of the weights is longer."""
    pattern = _Pattern((1.0, 1e-4))
    assert (pattern.period, pattern.counts.tolist()) == (8192, [8191, 1])
    assert _Pattern((1.0, 1e-3, 0.0)).counts.tolist() == [4092, 4, 0]  # as before
    with pytest.raises(ValueError, match="the smallest is less than one of 4194304 samples"):
        mixture((1.0, 1e-9))


def test_the_order_of_members_is_a_public_format():
    """As the order of blocks: a resumed run would repeat and lose samples in another one."""
    assert _Pattern((2.5, 1.0, 0.3)).member[:10].tolist() == [0, 1, 0, 0, 0, 1, 2, 0, 0, 1]


DESCENDING = tuple(PhaseConfig(from_sample=at, weights=(1.0,)) for at in (9, 8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: MixtureConfig(), "members is empty"),
        (lambda: mixture((0, 0)), "not all 0"),
        (lambda: mixture((1,), (PhaseConfig(from_sample=1, weights=(1.0, 1.0)),)), "needs 1, one"),
        (lambda: mixture((1.0,), DESCENDING), "put them in ascending order"),
    ],
)
def test_wrong_config(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
