"""Batch sizes and sequence lengths of a run."""

import itertools
from collections import Counter
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest

from clip_jax.data.batch_plan import BatchKind, SigLIP2Lengths, TokenBudget, doubling
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.images import NaFlex, Square
from clip_jax.models.vit import ViTConfig
from tests.conftest import NAFLEX, TINY


def spec_of(patches: int | None):
    return NaFlex(patches, 16) if patches else Square(256)


PLANS = {
    "doubling": doubling(8, Square(16), (3, 5)),
    "siglip2": SigLIP2Lengths().plan(64, 256, spec_of, 500, 3),
    "siglip2 from the first step": SigLIP2Lengths(fixed_share=0).plan(64, 256, spec_of, 90, 3),
    "budget": TokenBudget(multiple=4).plan(64, 256, spec_of, 300, 0),
}


@pytest.mark.parametrize("name", PLANS)
def test_every_sum_and_place_agrees_with_the_batches_one_by_one(name):
    plan = PLANS[name]
    steps = [*range(40), 353, 354, 480, 700]
    kinds = [plan.at(step) for step in range(701)]
    sums = [0, *itertools.accumulate(kind.pairs for kind in kinds)]
    for step in steps:
        assert plan.samples_after(step) == sums[step]
        first, units = plan.units_before(step), kinds[step].pairs // plan.unit
        located = [plan.locate(first + i) for i in range(units)]
        assert located == [(step, i, kinds[step]) for i in range(units)]
    assert plan.counts(0, 600) == Counter(kinds[:600])
    assert plan.counts(37, 410) == Counter(kinds[37:410])


def test_a_batch_that_doubles():
    plan = PLANS["doubling"]
    assert [plan.at(step).pairs for step in range(7)] == [8, 8, 8, 16, 16, 32, 32]


def test_siglip2_draws_lengths_in_the_stretched_rest_of_the_schedule():
    """Nine tenths of the learning-rate schedule are at the fixed resolution; the last tenth takes
    3.75 times as many steps, of which the longest length has two of half a batch for each draw."""
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


def test_lengths_depend_on_the_seed_and_the_step_alone():
    budget = TokenBudget(multiple=4)
    long, short, other = (
        [budget.plan(64, 256, spec_of, n, seed).at(step) for step in range(50)]
        for n, seed in ((80, 5), (50, 5), (50, 6))
    )
    assert long == short != other


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
