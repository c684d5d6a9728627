"""The ladder: its grid and rules, its hours, and that stopping it loses nothing."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from jax._src import xla_bridge

from clip_jax import flops
from clip_jax.cli.commands import main
from clip_jax.config_files import load_config
from clip_jax.errors import InputError
from clip_jax.losses import DistillationConfig, LiveTeacher, SoftmaxConfig, StoredTeacher
from clip_jax.optim import Constant, CoolDown
from clip_jax.scaling import jobs, run_table
from clip_jax.scaling import ladder as ladders
from clip_jax.scaling.ladder import (
    BranchesConfig,
    HardwareConfig,
    LadderCommand,
    RulesConfig,
    SweepConfig,
    climb,
    grid,
    load_ladder,
)
from clip_jax.serialize import to_dict
from tests.conftest import DIGITS, ROOT
from tests.scaling.conftest import POINTS, collected, stamps, tiny_ladder, train_all, write_spec


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
    text = ladders.describe(points, set(), cooled)
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
    rows = [run_table.of_run(to_dict(x.config), 10) for x in (alone, distilled)]
    assert [row["teacher"] for row in rows] == ["none", "runs/wide+stored"]
    assert rows[0]["student_flops"] == rows[0]["training_flops"] == alone.training_flops
    assert rows[1]["training_flops"] == distilled.training_flops
    extra = rows[1]["training_flops"] - rows[1]["student_flops"]
    assert extra == 160 * flops.forward(wide).total
    branches = grid(replace(ladder, branches=BranchesConfig(share=0.4)), tmp_path)
    parents = [point.name for point in branches if not point.parent]
    assert parents == [f"{x}-parent-seed0" for x in ("w16", "w16+wide", "w32", "w32+wide")]


def test_a_parent_goes_with_its_branches(tmp_path):
    spec = write_spec(tmp_path, "samples=(160, 640), branches=BranchesConfig(), seeds=(0, 1)")

    def names(**flags):
        command = LadderCommand(spec=spec, root=tmp_path / "root", dry_run=True, **flags)
        return {point["name"] for point in climb(command, print)["points"]}

    runs = {f"w16{kind}-seed{seed}" for kind in ("-parent", "@160") for seed in (0, 1)}
    assert names(only="w16@160-*") == runs


def test_the_most_expensive_goes_first_and_a_parent_before_its_branches(tmp_path):
    hardware = "HardwareConfig(chip='CPU core', chips=2, peak_flops=1e6)"
    spec = write_spec(
        tmp_path,
        f"samples=(160, 320), branches=BranchesConfig(share=0.6), hardware=({hardware},)",
    )
    said = []

    def plan(**flags):
        command = LadderCommand(spec=spec, root=tmp_path / "root", dry_run=True, **flags)
        return climb(command, said.append)["points"]

    points = plan()
    names = [point["name"] for point in points]
    order = ("w32-parent", "w32@320", "w16-parent", "w32@160", "w16@320", "w16@160")
    assert names == [f"{name}-seed0" for name in order]
    hours = [point["estimates"][0]["hours"] for point in points]
    assert hours[0] < hours[1]
    assert not any(point["left_out"] for point in points)
    # A limit below the parent run's cost leaves out its branches, too, though one is cheaper.
    limit = f"{2 * hours[0] - 1e-3:.6f}chip-hours"
    points = plan(limit=limit, only="w32*")
    assert [point["left_out"] for point in points] == [True] * 3
    assert said[-1] == f"  the limit of {limit} leaves out {names[0]}, {names[1]}, {names[3]}"


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


def test_planning_touches_no_device_and_prints_hours(tmp_path, capsys, monkeypatch):
    """The children need the chips: a parent that opened them would keep them."""
    monkeypatch.chdir(tmp_path)
    spec = str(ROOT / "configs/ladder_datacomp.py")
    command = ["scale", "ladder", spec, "--dry-run", "--only", "ViT-B-32@1.3B*", "--json"]
    opened = AssertionError("a device is opened")
    with mock.patch.object(xla_bridge, "backends", autospec=True, side_effect=opened):
        assert main(command) == 0
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr()
    assert "ViT-B-32   1.3B  8,192  156,250" in printed.err
    totals = json.loads(printed.out)["totals"]
    assert totals["points"] == 1
    assert [x["chip"] for x in totals["estimates"]] == ["TPU v5e", "H100 SXM"]


def test_what_is_missing_is_trained_and_a_failure_exits_with_1(tmp_path, capsys):
    spec, root = write_spec(tmp_path), tmp_path / "root"
    command = ["scale", "ladder", str(spec), "--root", str(root), "--json"]

    def train_one(source, *how):
        train_all(source, *how, most=1)
        source.release(job := source.take(), "failed", "exit code 2; log.txt ends: no gone.csv")
        job.unlock()

    with mock.patch.object(jobs, "run", autospec=True, side_effect=train_one):
        assert main(command) == 1
    printed = capsys.readouterr()
    first, second = json.loads(printed.out)["points"]
    assert (first["done"], second["done"]) == (True, False)
    assert second["failure"] == "exit code 2; log.txt ends: no gone.csv"
    last = printed.err.splitlines()[-1]
    assert last == f"clip-jax: failed: {second['name']}: {second['failure']}"
    before = stamps(root / first["name"])

    # The same command again: the other one alone, with the environment that the children share.
    with mock.patch.object(jobs, "run", autospec=True, side_effect=train_all) as ran:
        result = climb(LadderCommand(spec=spec, root=root, jobs=2), print)
    _, at_a_time, environment, _ = ran.call_args.args
    assert at_a_time == 2
    assert environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]
    assert result["totals"]["points"] == 1  # was missing
    assert all(point["done"] and not point["failure"] for point in result["points"])
    assert before == stamps(root / first["name"])
    rows = collected(root)
    assert [row["samples_seen"] for row in rows] == ["160", "160"]
    for name in ("info_nce", "training_flops", "mparams", "loss", "seed"):
        assert all(float(row[name]) >= 0 for row in rows)

    result = root / first["name"] / "result.json"
    for damaged, says in (('{"step', "is damaged: .* or delete"), ('{"step": "x"}', "step in .*")):
        result.write_text(damaged)
        with pytest.raises(InputError, match=says):
            climb(LadderCommand(spec=spec, root=root, jobs=2), print)

    # A spec that has changed since is refused before anything runs.
    capsys.readouterr()
    write_spec(tmp_path, "rules=RulesConfig(max_warmup_share=0.2)")
    assert main(command) == 2
    assert "optim.warmup_steps: 1 in" in capsys.readouterr().err


def test_branches_follow_their_parent(tmp_path):
    spec = write_spec(tmp_path, "samples=(96, 160), branches=BranchesConfig(share=0.4)")
    order = []
    with mock.patch.object(jobs, "run", autospec=True) as ran:
        ran.side_effect = lambda *how: order.extend(train_all(*how))
        climb(LadderCommand(spec=spec, root=tmp_path / "root", only="w16*"), print)
    assert order == ["w16-parent-seed0", "w16@160-seed0", "w16@96-seed0"]
    for row in collected(tmp_path):
        own = {"96": 2 / 6, "160": 4 / 10}.get(row["samples_seen"], 1)
        own = own if row["schedule"] == "cool_down" else 1
        assert float(row["flops_spent"]) == pytest.approx(own * float(row["training_flops"]))


def test_configs_alone_are_written_and_are_ordinary_runs(tmp_path):
    spec, root = write_spec(tmp_path), tmp_path / "root"
    command = LadderCommand(spec=spec, root=root, jobs=0, only="w16*")
    (point,) = climb(command, print)["points"]
    assert not point["done"]
    assert [path.name for path in root.iterdir()] == [point["name"]]
    expected = {point.name: point.config for point in grid(load_ladder(spec), root)}
    path = Path(point["workdir"]) / "config.json"
    assert load_config(path) == expected[point["name"]]
    before = path.stat()
    climb(command, print)
    assert path.stat() == before  # another worker may be training it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": "3/2", "group": "a"}, "host='3/2' must be i/n"),
        ({"host": "1/2"}, "host='1/2' needs the name of its group"),
        ({"host": "1/2", "group": "a", "jobs": 2}, "jobs=2 must be 1 where 2 hosts train a point"),
        ({"limit": "12 euros"}, "limit='12 euros' must be training FLOPs such as 1e21, or 500chip"),
        ({"limit": "1e400"}, "limit='1e400' must be training FLOPs such as 1e21, or 500chip"),
        ({"limit": "5chip-hours"}, r"limit='5chip-hours' needs hardware="),
        ({"jobs": -1}, "jobs=-1 must be at least 0"),
        ({"only": "x*"}, r"only='x\*' matches no point"),
        ({"spec": DIGITS}, r"must define get_ladder\(\)"),
    ],
)
def test_wrong_use_of_the_command(changes, message, tmp_path):
    values = {"spec": write_spec(tmp_path), "root": tmp_path / "root"} | changes
    with pytest.raises(InputError, match=message):
        climb(LadderCommand(**values), print)


def swept_ladder(sweep, **changes):
    both = tiny_ladder(samples=(1_024,), sweep=sweep, **changes)
    return replace(both, models={"w": both.base.model})


def test_a_point_has_a_trial_for_every_combination():
    swept = {"learning_rates": (0.5, 2), "batch_sizes": (16, 64), "warmups": (1, 2)}
    sweep, rules = SweepConfig(weight_decays=(0.1, 0.2), **swept), RulesConfig(reference_width=16)
    points = grid(swept_ladder(sweep, rules=rules), Path("root"))
    assert len(points) == len({point.name for point in points}) == 2**4
    by_name = {point.name: point.config for point in points}
    one = by_name["w@1K-rate0.5-batch64-warmup2-decay0.2-seed0"]
    # The base: 2e-3 and 2 steps of warm-up at batch 16; four times the batch, twice the rate.
    assert (one.batch_size, one.steps, one.optim.weight_decay) == (64, 16, 0.2)
    assert one.optim.learning_rate == pytest.approx(0.5 * 2 * 2e-3)
    assert one.optim.warmup_steps == 2 * 1  # a tenth of 16 steps at most, by the rules
    single = grid(swept_ladder(SweepConfig(learning_rates=(0.5,)), seeds=(0, 3)), Path("root"))
    assert [point.name for point in single] == ["w@1K-seed0", "w@1K-seed3"]


def test_sweeps_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match=r"sweep\.learning_rates=\(1, 1\) must have no"):
        SweepConfig(learning_rates=(1, 1))
    with pytest.raises(InputError, match=r"sweep\.warmups=\(\)"):
        SweepConfig(warmups=())
    with pytest.raises(InputError, match=r"sweep\.warmups=50 gives 100 steps .* run of 64"):
        grid(swept_ladder(SweepConfig(warmups=(1, 50))), Path("root"))
