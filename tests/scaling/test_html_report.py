"""The page of a ladder: what is in it. How it looks is tested in tests/programs/browser."""

import fcntl
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clip_jax.errors import InputError
from clip_jax.scaling.html_report import ReportConfig, page, report
from clip_jax.serialize import to_json
from tests.scaling.conftest import POINTS, write_ladder


def read(path: Path) -> dict:
    """The data of a page."""
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    assert text is not None
    return json.loads(text[1], parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ladder")
    write_ladder(root / "runs")
    return root


def test_every_run_is_on_the_page_with_its_state(ladder: Path):
    paths = (ladder / "runs", ladder / "runs" / "w16@1.6K-seed0")  # one of them twice
    summary = report(ReportConfig(paths=paths, output=ladder / "page.html"))
    assert summary["runs"] == {"done": 13, "not begun": 1, "stopped": 1, "failed": 1}
    data = read(ladder / "page.html")
    runs = {run["name"]: run for run in data["runs"]}
    failed = runs["w32@6.4K-seed1"]
    assert (failed["status"], failed["step"], failed["steps"]) == ("failed", 390, 400)
    assert failed["words"] == "clip-jax: step 391: loss nan"
    assert runs["w32@6.4K-seed0"]["status"] == "stopped"
    branch = runs["w16@1.6K-seed0"]
    assert (branch["parent"], branch["first"]) == ("w16-parent-seed0", 80)
    assert branch["flops_spent"] == branch["training_flops"] / 5
    assert branch["curves"]["loss"][0][0] == 81 * 16
    assert len(runs["w16-parent-seed0"]["curves"]["loss"]) == 240  # of 320 steps
    assert (branch["seconds/total"], branch["goodput"]) == (36, 0.5)
    assert abs(branch["off"]) < 0.2
    assert failed["seconds/total"] == 36
    assert "off" not in runs["w16-parent-seed0"]  # it evaluates nothing
    (law,) = data["laws"]
    assert law["name"] == summary["metric"] == "info_nce"
    (model,) = law["models"]  # the other has runs of two lengths
    assert model == branch["row"]["arch"]
    samples, error, low, high = np.transpose(law["models"][model])
    assert (samples[0], samples[-1]) == (1_600, 6_400)
    slope = np.log(error[-1] / error[0]) / np.log(4)
    assert slope == pytest.approx(-0.3, abs=0.02)  # as `write_ladder` makes them
    assert (low < error).all()
    assert (error < high).all()
    assert data["left_out"] == []
    for run in data["validation"]:
        assert run["factor"] > 1
        assert run["predicted"] == pytest.approx(run["measured"], rel=0.5)


def test_families_have_laws_of_their_own_or_the_page_says_why_not(ladder: Path):
    config = ReportConfig(
        paths=(POINTS,),
        output=ladder / "points.html",
        metric="imagenet1k_acc1",
        compare="upstream_dataset",
        where=("upstream_dataset=LAION*",),
        form="power",
    )
    report(config)
    data = read(config.output)
    assert len(data["runs"]) == 32
    assert data["metric"] == "1 − imagenet1k_acc1"
    models = {law["name"]: {*law["models"]} for law in data["laws"]}
    three = {"ViT-B-32", "ViT-B-16", "ViT-L-14"}  # of the others there is one run
    assert models == dict.fromkeys(("LAION-2B", "LAION-400M", "LAION-80M"), three)
    assert len({str(law["models"]["ViT-B-32"]) for law in data["laws"]}) == 3
    assert not {"training_flops", "seconds/total"} & data["runs"][0].keys()
    assert sum("off" in run for run in data["runs"]) == 29
    ours = ReportConfig(paths=(ladder / "runs",), output=ladder / "ours.html")
    for changes, why in (
        ({"compare": "schedule"}, "needs two or more families"),
        ({"where": ("arch=no*",)}, "no row of the table"),
    ):
        assert why in report(replace(ours, **changes))["summary"][0]
        assert not read(ours.output)["laws"]


def test_nothing_to_show_is_refused_and_bad_files_are_not_in_the_way(tmp_path: Path):
    assert "</script><b>" not in page({"title": "</script><b>"})  # which would end its script
    assert '{"loss": null}' in page({"loss": float("nan")})
    with pytest.raises(InputError, match="no run under"):
        report(ReportConfig(paths=(tmp_path,), output=tmp_path / "page.html"))
    (tmp_path / "config.json").write_text("[")
    (tmp_path / "result.json").write_text("{")
    report(ReportConfig(paths=(tmp_path,), output=tmp_path / "page.html"))
    (run,) = read(tmp_path / "page.html")["runs"]
    assert (run["status"], run["row"]["arch"]) == ("not begun", "unknown")


SIZES, SEEN = (1, 10, 100), (1e6, 1e7, 1e8)
TABLES = {  # results by size and pairs seen
    "flat": lambda size, seen: 0.5,
    "no score": lambda size, seen: 0,
    "perfect": lambda size, seen: 1,
    "partly perfect": lambda size, seen: float(size == 100),
    "falling": lambda size, seen: 0.9 - 0.1 * math.log10(size * seen / 1e6),
    "empty": lambda size, seen: "" if size > 1 else 0.5,
    "too high": lambda size, seen: size,
    "infinite": lambda size, seen: math.inf,
    "not a number": lambda size, seen: math.nan,
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of laws at the bounds of their parameters
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *itertools.product(TABLES, ({}, {"compare": "family"})),
        *itertools.product(("flat", "partly perfect"), ({"form": "additive"},)),  # slower
    ],
)
def test_every_table_has_a_page_that_is_json(name, options, tmp_path: Path):
    lines = ["arch,gmacs_per_sample,samples_seen,family,top1"]
    for size, seen in itertools.product(SIZES, SEEN):
        lines.append(f"m{size},{size},{seen},{size > 1},{TABLES[name](size, seen)}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    output = tmp_path / "page.html"
    result = report(ReportConfig(paths=(tmp_path / "t.csv",), output=output, **options))
    assert result["runs"] == {"done": 9}
    data = read(output)
    assert len(data["runs"]) == 9
    assert data["summary"]
    json.loads(to_json(result), parse_constant=pytest.fail)  # NaN is not JSON


def test_runs_of_unknown_length_are_on_the_page_without_a_point(tmp_path: Path):
    lines = ["name,pretrained,FLOPs (B),ImageNet 1k", "ViT-L-16-SigLIP-256,webli,201.62,0.8045"]
    lines += [f"ViT-B-32,laion2b_s{3**i}b_b79k,14.78,{0.5 + 0.05 * i}" for i in range(1, 5)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    config = ReportConfig(
        paths=(tmp_path / "t.csv",),
        output=tmp_path / "page.html",
        columns=("open_clip",),
        metric="imagenet1k_acc1",
        where=("samples_seen>0",),
    )
    assert report(config)["runs"] == {"done": 5}
    data = read(config.output)
    assert len(data["laws"]) == 1
    first, second, *_ = data["runs"]
    assert first["name"] == "ViT-L-16-SigLIP-256"
    assert "samples_seen" not in first
    assert second["name"] == "ViT-B-32@3B"


def test_the_page_says_what_its_law_describes(tmp_path: Path):
    for changes, words in (
        ({"procedure": "frontier"}, "describes the best runs"),
        ({"procedure": "cherti"}, "describes the best runs"),
        ({"form": "power"}, "describes all runs"),
        ({"form": "additive"}, "best division of compute"),
    ):
        config = ReportConfig(
            paths=(POINTS,), output=tmp_path / "page.html", metric="imagenet1k_acc1"
        )
        report(replace(config, **changes))
        (law,) = read(config.output)["laws"]
        assert words in law["meaning"]
    report(replace(config, form="additive", where=("arch=ViT-B-32",)))
    (law,) = read(config.output)["laws"]
    assert words in law["meaning"]
    assert "sizes" in law["lacking"]["irreducible"]  # the runs have one size


@pytest.mark.parametrize("column", ["samples_seen", "gmacs_per_sample", "acc"])
def test_a_cell_without_a_number_is_named(column, tmp_path: Path):
    row = {"arch": "a", "samples_seen": "1", "gmacs_per_sample": "1", "acc": "1", column: "-"}
    (tmp_path / "t.csv").write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    with pytest.raises(InputError, match=f"{column} of a is '-', not a number"):
        report(ReportConfig(paths=(tmp_path / "t.csv",), output=tmp_path / "page.html"))


def test_a_run_that_goes_on_is_running(ladder: Path):
    workdir = ladder / "runs" / "w32@6.4K-seed0"
    with (workdir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        report(ReportConfig(paths=(workdir,), output=ladder / "one.html"))
    assert [run["status"] for run in read(ladder / "one.html")["runs"]] == ["running"]
