"""Climbing a ladder: its order, its limit, and that stopping it loses nothing."""

import json
from pathlib import Path
from unittest import mock

import pytest
from jax._src import xla_bridge

from clip_jax.cli.commands import main
from clip_jax.config_files import load_config
from clip_jax.errors import InputError
from clip_jax.scaling import jobs
from clip_jax.scaling.climb import LadderCommand, climb
from clip_jax.scaling.grid import grid
from clip_jax.scaling.ladder import load_ladder
from tests.conftest import DIGITS, ROOT
from tests.scaling.conftest import collected, stamps, train_all, write_spec

RUNS = """\
from dataclasses import replace
from tests.scaling.conftest import tiny_ladder

def get_ladder():
    ladder = tiny_ladder(seeds=(0,))
    first = replace(ladder.base, steps=20, seed=3)
    runs = {"second-seed3": replace(first, init_from="first-seed3"), "first-seed3": first}
    return replace(ladder, models={"w16": first.model}, runs=runs)
"""


def test_a_parent_goes_with_its_branches(tmp_path):
    spec = write_spec(tmp_path, "samples=(160, 640), branches=BranchesConfig(), seeds=(0, 1)")

    def names(**flags):
        command = LadderCommand(spec=spec, root=tmp_path / "root", dry_run=True, **flags)
        return {point["name"] for point in climb(command, print)["points"]}

    runs = {f"w16{kind}-seed{seed}" for kind in ("-parent", "@160") for seed in (0, 1)}
    assert names(only="w16@160-*") == runs
    assert names(only="w16*", leave_out=("w16@640-*", "*@640-seed1")) == runs


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
        share = {"96": 2 / 6, "160": 4 / 10}.get(row["samples_seen"], 1)
        share = share if row["schedule"] == "cool_down" else 1
        assert float(row["flops_spent"]) == pytest.approx(share * float(row["training_flops"]))


def test_runs_of_their_own_begin_from_another_once_it_is_done(tmp_path):
    (tmp_path / "tiny.py").write_text(RUNS)
    order = []
    with mock.patch.object(jobs, "run", autospec=True) as ran:
        ran.side_effect = lambda *how: order.extend(train_all(*how))
        climb(LadderCommand(spec=tmp_path / "tiny.py", root=tmp_path / "root"), print)
    assert order == ["first-seed3", "second-seed3", "w16@160-seed0"]
    rows = {Path(row["source"]).name: row for row in collected(tmp_path)}
    assert rows["first-seed3"]["samples_seen"] == rows["second-seed3"]["samples_seen"] == "320"
    second = load_config(tmp_path / "root/second-seed3/config.json")
    assert second.init_from == str(tmp_path / "root/first-seed3")


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
