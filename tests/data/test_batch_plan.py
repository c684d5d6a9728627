"""Batch sizes and sequence lengths of a run."""

import itertools
from collections import Counter
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.data.batch_plan import BatchKind, SigLIP2Lengths, TokenBudget, doubling, in_stages
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.images import NaFlex, Square
from clip_jax.models.vit import ViTConfig
from tests.conftest import NAFLEX, TINY


def spec_of(patches: int | None):
    return NaFlex(patches, 16) if patches else Square(256)


PATCHES = st.lists(st.sampled_from([64, 100, 128, 256]), min_size=1, unique=True).map(tuple)
STEPS, SEEDS = st.integers(1, 60), st.integers(0, 9)
SIGLIP2 = st.builds(
    SigLIP2Lengths,
    patches=PATCHES,
    fixed_share=st.sampled_from([0.0, 0.5, 0.9]),
    stretch=st.floats(1, 4),
)
BUDGET = st.builds(
    TokenBudget,
    patches=PATCHES,
    shares=st.none(),
    multiple=st.sampled_from([1, 4, 8]),
)


@st.composite
def plans(draw):
    """Draw a plan, with stages or without, and its number of steps."""
    steps = draw(STEPS)
    if draw(st.booleans()):
        doubled_at = draw(st.sets(st.integers(1, steps), max_size=3).map(sorted))
        plan = doubling(draw(st.sampled_from([1, 8, 12])), Square(16), doubled_at)
    else:
        plan = draw(SIGLIP2 | BUDGET).plan(32, 256, spec_of, steps, draw(SEEDS))
    first_steps = [0, *draw(st.sets(st.integers(1, steps), max_size=3).map(sorted))]
    images = [draw(st.sampled_from([None, Square(8)])) for _ in first_steps]
    return (in_stages(plan, first_steps, images) if len(first_steps) > 1 else plan), steps


@given(plans(), st.data())
def test_every_sum_and_position_agrees_with_the_batches_one_by_one(made, data):
    """Also after the last step, where the last kind of batch goes on."""
    plan, steps = made
    kinds = [plan.at(step) for step in range(steps + 5)]
    units = [(step, i) for step, kind in enumerate(kinds) for i in range(kind.pairs // plan.unit)]
    assert all(kind.pairs % plan.unit == 0 for kind in plan.kinds)
    sums = [0, *itertools.accumulate(kind.pairs for kind in kinds)]
    assert [plan.samples_after(step) for step in range(steps + 6)] == sums
    assert [plan.units_before(step) * plan.unit for step in range(steps + 6)] == sums
    located = [plan.locate(number) for number in range(len(units))]
    assert located == [(step, i, kinds[step]) for step, i in units]
    end = data.draw(st.integers(0, steps + 5))
    begin = data.draw(st.integers(0, end))
    assert plan.counts(begin, end) == Counter(kinds[begin:end])


def test_a_stage_changes_the_kinds_and_not_the_numbers_of_pairs():
    plan = doubling(4, Square(16), (3, 8))
    staged = in_stages(plan, (0, 2, 8), (None, Square(8), None))
    own, other = Square(16), Square(8)
    expected = [(4, own, 1)] * 2 + [(4, other, 2)] + [(8, other, 2)] * 5 + [(16, own, 3)] * 3
    got = [staged.at(step) for step in range(11)]
    assert [(kind.pairs, kind.images, kind.stage) for kind in got] == expected
    for step in range(12):
        assert staged.samples_after(step) == plan.samples_after(step)
    assert got[2].describe() == "4 pairs of a fixed resolution in stage 2"
    assert got[2].metrics() == {"stage": 2}


@given(st.sampled_from([1, 8, 12]), st.sets(st.integers(1, 40), max_size=4).map(sorted))
def test_a_batch_that_doubles(batch_size, doubled_at):
    plan = doubling(batch_size, Square(16), doubled_at)
    for step in range(50):
        doublings = sum(at <= step for at in doubled_at)
        assert plan.at(step) == BatchKind(batch_size * 2**doublings, Square(16))


@given(BUDGET, STEPS, STEPS, SEEDS)
def test_a_longer_run_begins_with_the_same_batches(lengths, steps, more, seed):
    short, long = (lengths.plan(32, 256, spec_of, n, seed) for n in (steps, steps + more))
    assert [short.at(step) for step in range(steps)] == [long.at(step) for step in range(steps)]


@given(SIGLIP2, STEPS, SEEDS)
def test_siglip2s_longest_batches_come_in_pairs_of_halves(lengths, steps, seed):
    plan, first = lengths.plan(32, 256, spec_of, steps, seed), lengths.first_step(steps)
    kinds = [plan.at(step) for step in range(steps)]
    assert {*kinds[:first]} <= {BatchKind(32, Square(256))}
    groups = itertools.groupby(kinds[first:], lambda kind: (kind.max_patches, kind.pairs))
    runs = [(*key, len([*group])) for key, group in groups]
    for number, (patches, pairs, count) in enumerate(runs, start=1):
        is_longest = patches == max(lengths.patches)
        assert pairs == (16 if is_longest else 32)
        may_end_between_halves = number == len(runs)
        assert not is_longest or count % 2 == 0 or may_end_between_halves
    schedule = [lengths.schedule_step(step, steps) for step in range(steps + 1)]
    assert schedule[: first + 1] == list(range(first + 1))
    slopes = np.diff(schedule[first:])
    np.testing.assert_allclose(slopes, 1 / lengths.stretch)


def test_siglip2_draws_lengths_in_the_stretched_rest_of_the_schedule():
    """Nine tenths of the learning-rate schedule have the fixed resolution. The last tenth is
    stretched to 3.75 times as many steps. There, each draw of the longest length gives two steps
    with half a batch."""
    lengths, steps = SigLIP2Lengths(), 12_750
    first = lengths.first_step(steps)
    assert first == 9_000
    plan = lengths.plan(64, 256, spec_of, steps, 0)
    assert all(plan.at(step) == BatchKind(64, Square(256)) for step in (0, 17, first - 1))
    kinds = [plan.at(step) for step in range(first, steps)]
    assert {kind.max_patches: kind.pairs for kind in kinds} == {
        128: 64,
        256: 64,
        576: 64,
        784: 64,
        1024: 32,
    }
    runs = [len([*run]) for n, run in itertools.groupby(k.max_patches for k in kinds) if n == 1024]
    assert all(run % 2 == 0 for run in runs)
    share = Counter(kind.max_patches for kind in kinds)
    draws = len(kinds) - share[1024] // 2
    for patches, count in share.items():
        drawn = count // 2 if patches == 1024 else count
        assert abs(drawn / draws - 0.2) < 4 * (0.16 / draws) ** 0.5
    assert lengths.schedule_step(first, steps) == first
    assert lengths.schedule_step(steps, steps) == pytest.approx(10_000)
    assert plan.samples_after(steps) == sum(kind.pairs for kind in kinds) + first * 64


def test_a_kind_of_batch_is_a_model_of_the_same_parameters():
    """Another size of patches is passed to the tower, which takes it or raises an error."""

    @dataclass(frozen=True, kw_only=True)
    class Flexible(ViTConfig):
        def with_patch_size(self, patch_size: int):
            return replace(self, patch_size=patch_size)

    sizes = {field.name: getattr(TINY.vision, field.name) for field in fields(TINY.vision)}
    flexible = replace(TINY, vision=Flexible(**sizes))
    size, half = TINY.vision.patch_size, TINY.vision.patch_size // 2
    kind = BatchKind(64, Square(TINY.vision.image_size), half)
    assert kind.model_of(flexible).vision.patch_size == half
    assert kind.describe() == f"64 pairs of a fixed resolution of {half} pixels"
    assert kind.metrics() == {"patch_size": half}
    assert kind._replace(patch_size=size).model_of(TINY) == TINY
    with pytest.raises(InputError, match=f"this model has a ViT with vision.patch_size={size}"):
        kind.model_of(TINY)
    for images, tokens in ((NaFlex(9, size), 9), (Square(TINY.vision.image_size), None)):
        model: CLIPConfig = BatchKind(64, images).model_of(NAFLEX)
        assert model.vision.max_patches == tokens
        assert model.dimensions() == NAFLEX.dimensions()


def test_another_seed_draws_other_lengths():
    plans = [TokenBudget(multiple=4).plan(64, 256, spec_of, 50, seed) for seed in (5, 6)]
    one, other = ([plan.at(step) for step in range(50)] for plan in plans)
    assert one != other


def test_a_budget_of_tokens_gives_batch_sizes_and_shares():
    lengths = TokenBudget(patches=(64, 100, 256), shares=(0.7, 0.1, 0.2), multiple=8)
    plan = lengths.plan(64, 256, spec_of, 4_000, 1)
    counts = {(kind.max_patches, kind.pairs): n for kind, n in plan.counts(0, 4_000).items()}
    assert counts.keys() == {(64, 256), (100, 160), (256, 64)}
    for share, count in zip((0.7, 0.1, 0.2), counts.values(), strict=True):
        assert abs(count / 4_000 - share) < 0.03
    assert plan.unit == np.gcd.reduce([256, 160, 64])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TokenBudget(shares=(0.5, 0.5)), "one probability for each"),
        (lambda: TokenBudget(patches=(1, 2), shares=(0.5, 0.6)), "sum 1"),
        (lambda: SigLIP2Lengths(patches=(64, 64)), "different numbers"),
        (lambda: SigLIP2Lengths(patches=()), "different numbers"),
        (lambda: TokenBudget(multiple=8).check(16, 256, 1), "4 images of 1024 patches"),
        (lambda: TokenBudget(multiple=8).check(64, 256, 3), "a multiple of accumulation=3"),
        (lambda: SigLIP2Lengths().check(6, 256, 2), r"multiple of 2 × accumulation=2"),
    ],
)
def test_lengths_that_cannot_be_are_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()
