"""The ladder: its grid and rules, its price, and that stopping it loses nothing."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from clip_jax.cli import main
from clip_jax.config import load_config
from clip_jax.ladder import (
    HardwareConfig,
    LadderCommand,
    LadderConfig,
    RulesConfig,
    climb,
    grid,
    load_ladder,
)
from clip_jax.models import zoo
from clip_jax.scaling import flops
from tests.runs import ROOT, tiny_digits

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
    ("changes", "says"),
    [
        ({"models": {}}, "models is empty"),
        ({"seeds": (0, 0)}, "names one twice"),
        ({"batch_sizes": (16,)}, "one for each of samples"),
    ],
)
def test_a_ladder_that_makes_no_sense_is_told(changes, says):
    with pytest.raises(ValueError, match=says):
        ladder(**changes)
    with pytest.raises(ValueError, match="samples lie too close"):
        grid(ladder(samples=(128_000, 128_100)), Path("root"))


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


def test_planning_touches_no_device_and_prints_a_price(tmp_path):
    """The children need the chips: a parent that opened them would keep them."""
    command = [
        sys.executable, "-m", "clip_jax", "scale", "ladder",
        str(ROOT / "configs/ladder_datacomp.py"), "--dry-run", "--only", "ViT-B-32@1.3B*", "--json",
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "none", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert not list(tmp_path.iterdir())
    assert "ViT-B-32   1.3B  8,192  156,250" in done.stderr
    totals = json.loads(done.stdout)["totals"]
    assert totals["points"] == 1
    v5e, h100 = totals["estimates"]
    assert v5e["dollars"] == pytest.approx(v5e["hours"] * 256 * 1.2)
    model = zoo.get("ViT-B-32")
    seconds = flops.training(model, 8192).total * 156_250 / (64 * 989e12 * 0.4)
    assert h100["hours"] == pytest.approx((seconds + 300) / 3600)


# ------------------------------------------------------------------ running


SPEC = """\
from dataclasses import replace
from clip_jax.ladder import LadderConfig
from clip_jax.evals.pairs import PairsEvalConfig
from tests.runs import tiny_digits

def get_ladder():
    base = tiny_digits(evals=(PairsEvalConfig(pairs=32, pool=16, every_steps=100),))
    wide = replace(base.model, embed_dim=8)
    return LadderConfig(base=base, models={"a": base.model, "b": wide}, samples=(160,))
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A ladder of two points of ten steps, and one compilation for all of their processes."""
    folder = tmp_path_factory.mktemp("ladder")
    (folder / "tiny.py").write_text(SPEC)
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setenv("JAX_PLATFORMS", "cpu")
    patch.setenv("JAX_DEFAULT_PRNG_IMPL", "rbg")
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    yield folder / "tiny.py"
    patch.undo()


def table(root: Path, output: Path) -> list[dict[str, str]]:
    """What `scale collect` makes of a ladder, but for seconds and places."""
    assert main(["scale", "collect", str(root), "--output", str(output)]) == 0
    rows = csv.DictReader(output.read_text().replace(str(root), "root").splitlines())
    return [
        {name: x for name, x in row.items() if not name.startswith(("seconds/", "goodput"))}
        for row in rows
    ]


def test_killed_in_the_middle_it_ends_in_the_same_table(spec, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["scale", "ladder", str(spec), "--root", str(whole)]) == 0
    assert "0 of 2" not in capsys.readouterr().out
    rows = expected = table(whole, tmp_path / "whole.csv")
    assert [row["samples_seen"] for row in rows] == ["160", "160"]
    for name in ("info_nce", "training_flops", "mparams", "loss", "seed"):
        assert all(float(row[name]) >= 0 for row in rows)

    # Kill all of it: the first point done, the second past its first checkpoint.
    command = [
        sys.executable, "-m", "clip_jax", "scale", "ladder", str(spec), "--root", str(killed)
    ]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    names = [row["source"].rpartition("/")[2] for row in rows]
    traces = ("result.json", "checkpoints/[0-9]")
    while not all(any((killed / name).glob(trace)) for name in names for trace in traces):
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    steps = [json.loads((killed / name / "result.json").read_text())["step"] for name in names]
    assert sorted(steps)[0] < 10 <= sorted(steps)[1]
    finished = killed / names[steps.index(10)]
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}

    result = climb(LadderCommand(spec=spec, root=killed, jobs=2), print)
    assert result["totals"]["points"] == 1  # was missing
    assert all(point["done"] and not point["failure"] for point in result["points"])
    assert "going on from step" in (killed / names[1 - steps.index(10)] / "log.txt").read_text()
    assert table(killed, tmp_path / "killed.csv") == expected
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert after == before  # a finished point is never trained twice

    # A spec that has changed since is refused before anything runs.
    changed = tmp_path / "changed.py"
    changed.write_text(SPEC.replace("samples=(160,)", "samples=(160,), seeds=(0,), rules=None"))
    changed.write_text(SPEC.replace("embed_dim=8", "embed_dim=8, init_logit_scale=5.0"))
    assert main(["scale", "ladder", str(changed), "--root", str(killed)]) == 2
    assert "model.init_logit_scale" in capsys.readouterr().err


def test_a_failed_point_is_told_at_the_end_and_exits_with_1(spec, tmp_path, capsys):
    broken = tmp_path / "broken.py"
    text = SPEC.replace("evals=(", "data=replace(tiny_digits().data, source=gone), evals=(")
    gone = (
        "from clip_jax.data.sources.table import TableConfig\ngone = TableConfig(path='gone.csv')\n"
    )
    broken.write_text(gone + text.replace('"b": wide', ""))
    root = tmp_path / "root"
    assert main(["scale", "ladder", str(broken), "--root", str(root), "--json"]) == 1
    printed = capsys.readouterr()
    (point,) = json.loads(printed.out)["points"]
    assert not point["done"]
    assert "gone.csv" in point["failure"]
    last = printed.err.splitlines()[-1]
    assert last.startswith("failed: a@160-seed0: exit code 2; ")
    assert "gone.csv" in last


def test_configs_alone_are_written_and_are_ordinary_runs(spec, tmp_path):
    root = tmp_path / "root"
    command = LadderCommand(spec=spec, root=root, jobs=0, part="2/2")
    (point,) = climb(command, print)["points"]
    assert not point["done"]
    assert [path.name for path in root.iterdir()] == [point["name"]]
    expected = {point.name: point.config for point in grid(load_ladder(spec), root)}
    assert load_config(Path(point["workdir"]) / "config.json") == expected[point["name"]]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--part", "3/2"], "part='3/2' must be i/n"),
        (["--jobs", "-1"], "jobs=-1 must be at least 0"),
        (["--only", "x*"], "only='x*' matches no point"),
    ],
)
def test_wrong_use_of_the_command(spec, flags, says, capsys):
    try:
        code = main(["scale", "ladder", str(spec), *flags])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert says in capsys.readouterr().err
    assert main(["scale", "ladder", str(ROOT / "configs/digits.py")]) == 2
    assert "has no get_ladder()" in capsys.readouterr().err
