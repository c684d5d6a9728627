"""The ladder: its grid and rules, its price, and that stopping it loses nothing."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from jax._src import xla_bridge

from clip_jax import flops
from clip_jax.cli import main
from clip_jax.config import load_config
from clip_jax.models import zoo
from clip_jax.optim import Constant, CoolDown
from clip_jax.refused import Refused
from clip_jax.scaling import jobs
from clip_jax.scaling.ladder import (
    LadderCommand,
    LadderConfig,
    climb,
    compute_saved,
    describe,
    grid,
    load_ladder,
)
from clip_jax.scaling.price import HardwareConfig
from clip_jax.scaling.rules import BranchesConfig, RulesConfig
from clip_jax.scaling.sweep import SweepConfig
from tests.conftest import ROOT, tiny_digits
from tests.scaling.conftest import train_all

POINTS = ROOT / "tests/golden/scaling_points.csv"


def ladder(**changes) -> LadderConfig:
    base = tiny_digits(steps=1)
    wide = replace(base.model, vision=replace(base.model.vision, width=32))
    given = {"base": base, "models": {"w16": base.model, "w32": wide}, "samples": (128, 512)}
    return LadderConfig(**(given | changes))


def test_every_point_follows_the_rules():
    rules = RulesConfig(
        batch_exponent=0.5, reference_width=16, width_exponent=-1, max_warmup_share=0.2
    )
    points = grid(ladder(batch_sizes=(16, 64), seeds=(0, 7), rules=rules), Path("root"))
    assert [point.name for point in points] == [
        "w16@128-seed0", "w16@128-seed7", "w16@512-seed0", "w16@512-seed7",
        "w32@128-seed0", "w32@128-seed7", "w32@512-seed0", "w32@512-seed7",
    ]  # fmt: skip
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
        ({"models": {}}, "models is empty"),
        ({"seeds": (0, 0)}, "names one twice"),
        ({"batch_sizes": (16,)}, "one for each of samples"),
        ({"samples": (128_000, 128_100)}, "samples lie too close"),
        ({"batch_sizes": (16, 64), "branches": BranchesConfig()}, "trunk all have its batch size"),
        ({"samples": (16, 512), "branches": BranchesConfig()}, "has 1 steps: .* no trunk is left"),
        ({"sweep": SweepConfig(), "branches": BranchesConfig()}, "branches and sweep"),
    ],
)
def test_ladders_that_make_no_sense_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(Refused, match=message):
        grid(ladder(**changes), Path("root"))


def test_points_branch_from_one_trunk_a_model_and_seed(tmp_path):
    cooled = ladder(
        samples=(160, 640), seeds=(0, 7), branches=BranchesConfig(share=0.2, shape="sqrt")
    )
    points = grid(cooled, tmp_path)
    assert [point.name for point in points][:6] == [
        "w16-trunk-seed0", "w16@160-seed0", "w16@640-seed0",
        "w16-trunk-seed7", "w16@160-seed7", "w16@640-seed7",
    ]  # fmt: skip
    trunk, short, long = points[:3]
    assert trunk.config.steps == 32
    assert trunk.config.optim.schedule == Constant()
    assert trunk.config.checkpoint.also == (8, 32)
    assert trunk.config.evals == ()
    assert short.config.steps == 10
    assert short.config.optim.schedule == CoolDown(steps=2, shape="sqrt")
    assert (short.trunk, short.first_step, long.first_step) == ("w16-trunk-seed0", 8, 32)
    assert long.config.branch_from == f"{tmp_path / 'w16-trunk-seed0'}@32"
    # The branches' warm-up is the trunk's: that of the shortest point.
    assert {point.config.optim.warmup_steps for point in points} == {1}
    step = flops.of_step(trunk.config).total
    assert [point.training_flops / step for point in points[:3]] == [32, 2, 8]
    alone, together = compute_saved(points)
    assert together / alone == pytest.approx(42 / 50)
    assert "16% saved. The trunks keep the checkpoints of 8 steps" in describe(
        points, set(), cooled
    )
    assert trunk.is_ready()
    assert not short.is_ready()


def test_a_trunk_goes_with_its_branches(tmp_path):
    spec = write(tmp_path, ("(160,)", "(160, 640), branches=BranchesConfig(), seeds=(0, 1)"))

    def names(**flags):
        command = LadderCommand(spec=spec, root=tmp_path / "root", dry_run=True, **flags)
        return {point["name"] for point in climb(command, print)["points"]}

    assert names(only="a@160-*") == {
        "a-trunk-seed0", "a-trunk-seed1", "a@160-seed0", "a@160-seed1"
    }  # fmt: skip
    parts = [names(part=f"{part}/4") for part in (1, 2, 3, 4)]
    assert [len(part) for part in parts] == [3] * 4
    assert all(len({name.replace("-trunk", "@")[0] for name in part}) == 1 for part in parts)
    assert len(set.union(*parts)) == 12


def test_hours_and_dollars_follow_from_the_peak():
    v5e = HardwareConfig(chip="TPU v5e", chips=256, mfu=0.5, price=1.2, start_seconds=360)
    hours = v5e.hours(256 * 197e12 * 0.5 * 3600)  # one hour of work
    assert hours == pytest.approx(1.1)
    assert v5e.dollars(hours) == pytest.approx(1.1 * 256 * 1.2)
    core = HardwareConfig(chip="CPU core", peak_flops=1e10, mfu=0.5)
    assert core.hours(3.6e13) == pytest.approx(2)
    assert core.dollars(2) is None
    with pytest.raises(ValueError, match="'TPU v9' is none of TPU v3, TPU v4, TPU v5e"):
        HardwareConfig(chip="TPU v9")
    with pytest.raises(ValueError, match=r"mfu=40.*at most 1"):
        HardwareConfig(mfu=40)


def test_the_published_grid_costs_what_the_published_table_says():
    """Forward GMACs to 0.2%, total compute too; training FLOPs are six times that, and the loss."""
    points = grid(load_ladder(ROOT / "configs/ladder_datacomp.py"), Path("root"))
    assert len(points) == 6 * 7
    with POINTS.open() as file:
        published = {(row["arch"], row["samples_seen_scale"]): row for row in csv.DictReader(file)}
    compared = 0
    for point in points:
        config = point.config
        gmacs = flops.forward(config.model, "fvcore").total / 1e9
        assert config.optim.warmup_steps < config.steps / 5
        assert point.samples_seen == pytest.approx(point.samples, rel=2e-3)
        loss = flops.training(config.model, config.batch_size).loss * config.steps
        towers = point.training_flops - loss
        assert towers == pytest.approx(6e9 * gmacs * point.samples_seen, rel=3e-3)
        assert loss < 0.02 * towers
        scale = {2_560_000_000: "3B", 12_800_000_000: "13B", 34_000_000_000: "34B"}
        if row := published.get((point.model, scale.get(point.samples, ""))):
            assert gmacs == pytest.approx(float(row["gmacs_per_sample"]), rel=2e-3)
            ratio = float(row["samples_seen"]) / point.samples  # 34B is 32 to 34.7 in the table
            total = float(row["gmacs_total"])
            assert gmacs * point.samples * ratio == pytest.approx(total, rel=2e-3)
            compared += 1
    assert compared == 10


def test_a_ladder_of_locked_towers_pays_for_what_it_trains():
    ladder = load_ladder(ROOT / "configs/ladder_datacomp.py")
    locked = replace(ladder.base, optim=replace(ladder.base.optim, locked=("image",)))
    plain, lit = (
        grid(replace(ladder, base=base), Path("root"))[0] for base in (ladder.base, locked)
    )
    step = flops.training(plain.config.model, plain.config.batch_size, locked=("image",))
    assert lit.training_flops == step.total * plain.config.steps < plain.training_flops


def test_planning_touches_no_device_and_prints_a_price(tmp_path, capsys, monkeypatch):
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
    v5e, h100 = totals["estimates"]
    assert v5e["dollars"] == pytest.approx(v5e["hours"] * 256 * 1.2)
    model = zoo.get("ViT-B-32")
    seconds = flops.training(model, 8192).total * 156_250 / (64 * 989e12 * 0.4)
    assert h100["hours"] == pytest.approx((seconds + 300) / 3600)


# ------------------------------------------------------------------ running


SPEC = """\
from dataclasses import replace
from clip_jax.scaling.ladder import BranchesConfig, LadderConfig
from clip_jax.evals.pairs import PairsEvalConfig
from tests.conftest import tiny_digits

def get_ladder():
    base = tiny_digits(evals=(PairsEvalConfig(pairs=32, pool=16, every_steps=100),))
    wide = replace(base.model, embed_dim=8)
    return LadderConfig(base=base, models={"a": base.model, "b": wide}, samples=(160,))
"""


def write(folder: Path, change: tuple[str, str] = ("", "")) -> Path:
    """A spec of two points of ten steps, changed in one place."""
    (folder / "tiny.py").write_text(SPEC.replace(*change))
    return folder / "tiny.py"


def test_what_is_missing_is_trained_and_a_failure_exits_with_1(tmp_path, capsys):
    spec, root = write(tmp_path), tmp_path / "root"
    command = ["scale", "ladder", str(spec), "--root", str(root), "--json"]

    def train_one(some, *how):
        train_all(some[:1], *how)
        return {some[1].name: "exit code 2; log.txt ends: no gone.csv"}

    with mock.patch.object(jobs, "run", autospec=True, side_effect=train_one):
        assert main(command) == 1
    printed = capsys.readouterr()
    first, second = json.loads(printed.out)["points"]
    assert (first["done"], second["done"]) == (True, False)
    assert second["failure"] == "exit code 2; log.txt ends: no gone.csv"
    assert printed.err.splitlines()[-1] == f"failed: {second['name']}: {second['failure']}"
    trained = [path for path in (root / first["name"]).rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in trained}

    # The same command again: the other one alone, with the environment that the children share.
    with mock.patch.object(jobs, "run", autospec=True, side_effect=train_all) as ran:
        result = climb(LadderCommand(spec=spec, root=root, jobs=2), print)
    (again,), at_a_time, environment, _ = ran.call_args.args
    assert (again.name, at_a_time) == (second["name"], 2)
    assert environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]
    assert result["totals"]["points"] == 1  # was missing
    assert all(point["done"] and not point["failure"] for point in result["points"])
    assert before == {path: path.stat().st_mtime_ns for path in trained}
    assert main(["scale", "collect", str(root), "--output", str(tmp_path / "all.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    assert [row["samples_seen"] for row in rows] == ["160", "160"]
    for name in ("info_nce", "training_flops", "mparams", "loss", "seed"):
        assert all(float(row[name]) >= 0 for row in rows)

    # A spec that has changed since is refused before anything runs.
    capsys.readouterr()
    write(tmp_path, ("embed_dim=8", "embed_dim=8, init_logit_scale=5.0"))
    assert main(command) == 2
    assert "model.init_logit_scale" in capsys.readouterr().err


def test_branches_follow_their_trunk(tmp_path):
    spec = write(tmp_path, ("(160,)", "(96, 160), branches=BranchesConfig(share=0.4)"))
    with mock.patch.object(jobs, "run", autospec=True, side_effect=train_all) as ran:
        climb(LadderCommand(spec=spec, root=tmp_path / "root", only="a*"), print)
    some = {job.name: job.after for job in ran.call_args.args[0]}
    assert some.pop("a-trunk-seed0") == ""
    assert some == dict.fromkeys(("a@96-seed0", "a@160-seed0"), "a-trunk-seed0")
    assert all(job.is_ready() for job in ran.call_args.args[0])
    assert main(["scale", "collect", str(tmp_path), "--output", str(tmp_path / "all.csv")]) == 0
    for row in csv.DictReader((tmp_path / "all.csv").read_text().splitlines()):
        own = {"96": 2 / 6, "160": 4 / 10}.get(row["samples_seen"], 1)
        own = own if row["schedule"] == "cool_down" else 1
        assert float(row["flops_spent"]) == pytest.approx(own * float(row["training_flops"]))


def test_configs_alone_are_written_and_are_ordinary_runs(tmp_path):
    spec, root = write(tmp_path), tmp_path / "root"
    command = LadderCommand(spec=spec, root=root, jobs=0, part="2/2")
    (point,) = climb(command, print)["points"]
    assert not point["done"]
    assert [path.name for path in root.iterdir()] == [point["name"]]
    expected = {point.name: point.config for point in grid(load_ladder(spec), root)}
    assert load_config(Path(point["workdir"]) / "config.json") == expected[point["name"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--part", "3/2"], "part='3/2' must be i/n"),
        (["--jobs", "-1"], "jobs=-1 must be at least 0"),
        (["--only", "x*"], "only='x*' matches no point"),
    ],
)
def test_wrong_use_of_the_command(flags, message, tmp_path, capsys):
    try:
        code = main(["scale", "ladder", str(write(tmp_path)), *flags])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert main(["scale", "ladder", str(ROOT / "configs/digits.py")]) == 2
    assert "has no get_ladder()" in capsys.readouterr().err
