"""The runs of a ladder follow its rules; sweeps, branches and teachers multiply them."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clip_jax import flops
from clip_jax.config import StageConfig
from clip_jax.errors import InputError
from clip_jax.losses import DistillationConfig, LiveTeacher, SoftmaxConfig, StoredTeacher
from clip_jax.optim import Constant, CoolDown, OptimConfig
from clip_jax.scaling import climb, collect, run_table
from clip_jax.scaling.grid import grid
from clip_jax.scaling.ladder import BranchesConfig, RulesConfig, SweepConfig, load_ladder
from clip_jax.serialize import to_dict
from tests.conftest import ROOT
from tests.scaling.conftest import POINTS, tiny_ladder


def test_every_point_follows_the_rules():
    rules = RulesConfig(reference_width=16, width_exponent=-1, max_warmup_share=0.2)
    ladder = tiny_ladder(samples=(128, 512), batch_sizes=(16, 64), seeds=(0, 7), rules=rules)
    points = grid(ladder, Path("root"))
    names = itertools.product(("w16", "w32"), (128, 512), (0, 7))
    assert [point.name for point in points] == ["{}@{}-seed{}".format(*x) for x in names]
    by_name = {point.name: point.config for point in points}
    # The base: 2e-3 and 2 steps of warm-up at batch 16 and width 16.
    small, large = by_name["w16@128-seed0"], by_name["w32@512-seed7"]
    assert (small.steps, small.batch_size, small.seed, small.data.seed) == (8, 16, 0, 0)
    assert (small.optim.learning_rate, small.optim.warmup_steps) == (2e-3, 1)  # 0.2 of 8 steps
    assert (large.steps, large.batch_size, large.seed, large.data.seed) == (8, 64, 7, 7)
    assert large.optim.learning_rate == pytest.approx(2e-3 * 2 / 2)
    assert large.model.vision.width == 32
    assert {point.workdir for point in points} == {Path("root") / name for name in by_name}


def test_the_cool_down_is_a_share_of_each_run():
    base = replace(tiny_ladder().base, optim=OptimConfig(schedule=CoolDown(steps=2)))
    shared = RulesConfig(cool_down_share=0.25)
    ladder = tiny_ladder(base=base, samples=(128, 512), rules=shared)
    assert {
        (p.config.steps, p.config.optim.schedule.steps) for p in grid(ladder, Path("root"))
    } == {
        (8, 2),
        (32, 8),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, r"models=\(\) must have no value twice, and at least one"),
        ({"seeds": (0, 0)}, r"seeds=\(0, 0\) must have no value twice"),
        ({"batch_sizes": (16,)}, "one for each of samples"),
        ({"samples": (128_000, 128_100)}, "samples are too close"),
        (
            {"batch_sizes": (16, 64), "branches": BranchesConfig()},
            r"batch_sizes=\(16, 64\) must be equal",
        ),
        (
            {"samples": (16, 512), "branches": BranchesConfig()},
            "1 steps: .* none is left for the parent run",
        ),
        ({"sweep": SweepConfig(), "branches": BranchesConfig()}, "branches and sweep"),
        (
            {"base": replace(tiny_ladder().base, stages=(StageConfig(begin=0.5),))},
            "stages: all batches of a point are of one kind",
        ),
        ({"rules": RulesConfig(cool_down_share=0.2)}, "cool_down_share=0.2 needs .* not Cosine"),
    ],
)
def test_ladders_that_make_no_sense_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        grid(tiny_ladder(**({"samples": (128, 512)} | changes)), Path("root"))


def test_points_branch_from_one_parent_a_model_and_seed(tmp_path):
    branches = BranchesConfig(share=0.2, shape="sqrt")
    cooled = tiny_ladder(samples=(160, 640), seeds=(0, 7), branches=branches)
    points = grid(cooled, tmp_path)
    names = itertools.product((0, 7), ("-parent", "@160", "@640"))
    assert [point.name for point in points][:6] == [f"w16{x}-seed{seed}" for seed, x in names]
    parent, short, long = points[:3]
    assert (parent.config.steps, parent.config.optim.schedule) == (32, Constant())
    assert (parent.config.checkpoint.also, parent.config.evals) == ((8, 32), ())
    cool_down = CoolDown(steps=2, shape="sqrt")
    assert (short.config.steps, short.config.optim.schedule) == (10, cool_down)
    assert (short.parent, short.first_step, long.first_step) == ("w16-parent-seed0", 8, 32)
    assert long.config.branch_from == f"{tmp_path / 'w16-parent-seed0'}@32"
    # The branches' warm-up is the parent's: that of the shortest point.
    assert {point.config.optim.warmup_steps for point in points} == {1}
    step = flops.of_step(parent.config).total
    assert [point.training_flops / step for point in points[:3]] == [32, 2, 8]
    # 42 steps instead of 50.
    text = climb.describe(points, set(), cooled)
    assert "16% saved" in text
    assert (parent.is_ready(), short.is_ready()) == (True, False)


def test_a_teacher_is_a_column_whose_flops_count_or_not(tmp_path):
    wide = tiny_ladder().models["w32"]
    teachers = (LiveTeacher(weights="runs/wide", model=wide), StoredTeacher(embed_dim=8))
    taught = DistillationConfig(teachers=teachers)
    ladder = tiny_ladder(samples=(160, 320), teachers={"": (SoftmaxConfig(),), "wide": (taught,)})
    points = grid(ladder, tmp_path)
    names = itertools.product(("w16", "w16+wide", "w32", "w32+wide"), ("160", "320"))
    assert [point.name for point in points] == ["{}@{}-seed0".format(*x) for x in names]
    assert [point.config.objective == (taught,) for point in points[:4]] == [False] * 2 + [True] * 2
    alone, distilled = points[0], points[2]
    rows = [collect.of_run(to_dict(x.config), 10) for x in (alone, distilled)]
    assert [row["teacher"] for row in rows] == ["none", "runs/wide+stored"]
    assert rows[0]["student_flops"] == rows[0]["training_flops"] == alone.training_flops
    assert rows[1]["training_flops"] == distilled.training_flops
    extra = rows[1]["training_flops"] - rows[1]["student_flops"]
    assert extra == 160 * flops.forward(wide).total

    # A teacher that joins in the second of two stages.
    late = replace(
        distilled.config,
        objective=(SoftmaxConfig(), replace(taught, weight=0.0)),
        stages=(StageConfig(begin=0.5, weights=(1.0, 1.0)),),
    )
    row = collect.of_run(to_dict(late), 10)
    assert row["training_flops"] - row["student_flops"] == 80 * flops.forward(wide).total
    branches = grid(replace(ladder, branches=BranchesConfig(share=0.4)), tmp_path)
    parents = [point.name for point in branches if not point.parent]
    assert parents == [f"{x}-parent-seed0" for x in ("w16", "w16+wide", "w32", "w32+wide")]


def test_the_published_grid_costs_what_the_published_table_says():
    """Forward GMACs to 0.2%, total compute too; training FLOPs are six times that, and the loss."""
    points = grid(load_ladder(ROOT / "configs/ladder_datacomp.py"), Path("root"))
    assert len(points) == 6 * 7
    rows = run_table.read(POINTS).rows
    published = {(row["arch"], row["samples_seen_scale"]): row for row in rows}
    compared = 0
    for point in points:
        config, gmacs = point.config, run_table.gmacs(point.config.model)
        assert config.optim.warmup_steps < config.steps / 5
        assert point.samples_seen == pytest.approx(point.samples, rel=2e-3)
        loss = flops.training(config.model, config.batch_size).loss * config.steps
        towers = 6e9 * gmacs * point.samples_seen
        assert point.training_flops - loss == pytest.approx(towers, rel=3e-3)
        assert loss < 0.02 * towers
        if row := published.get((point.model, f"{point.samples / 1e9:.0f}B")):
            total = gmacs * float(row["samples_seen"])  # of 34B, 32 to 34.7 in the table
            assert total == pytest.approx(float(row["gmacs_total"]), rel=2e-3)
            compared += 1
    assert compared == 10


def swept_ladder(sweep, **changes):
    both = tiny_ladder(samples=(1_024,), sweep=sweep, **changes)
    return replace(both, models={"w": both.base.model})


def test_a_point_has_a_trial_for_every_combination():
    swept = {"learning_rates": (0.5, 2), "batch_sizes": (16, 64), "warmups": (1, 2)}
    sweep, rules = SweepConfig(weight_decays=(0.1, 0.2), **swept), RulesConfig(reference_width=16)
    points = grid(swept_ladder(sweep, rules=rules), Path("root"))
    assert len(points) == len({point.name for point in points}) == 2**4
    by_name = {point.name: point.config for point in points}
    trial = by_name["w@1K-rate0.5-batch64-warmup2-decay0.2-seed0"]
    # The base: 2e-3 and 2 steps of warm-up at batch 16; four times the batch, twice the rate.
    assert (trial.batch_size, trial.steps, trial.optim.weight_decay) == (64, 16, 0.2)
    assert trial.optim.learning_rate == pytest.approx(0.5 * 2 * 2e-3)
    assert trial.optim.warmup_steps == 2 * 1  # a tenth of 16 steps at most, by the rules
    single = grid(swept_ladder(SweepConfig(learning_rates=(0.5,)), seeds=(0, 3)), Path("root"))
    assert [point.name for point in single] == ["w@1K-seed0", "w@1K-seed3"]


def test_sweeps_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match=r"sweep\.learning_rates=\(1, 1\) must have no"):
        SweepConfig(learning_rates=(1, 1))
    with pytest.raises(InputError, match=r"sweep\.warmups=\(\)"):
        SweepConfig(warmups=())
    with pytest.raises(InputError, match=r"sweep\.warmups=50 gives 100 steps .* run of 64"):
        grid(swept_ladder(SweepConfig(warmups=(1, 50))), Path("root"))
