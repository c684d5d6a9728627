"""The scaling commands' functions: one table from every format, a fit, its answers in words."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.scaling import plots, table
from clip_jax.scaling.answers import CollectConfig, FitConfig, collect, fit
from clip_jax.scaling.words import describe
from clip_jax.serialize import to_dict
from tests.scaling.conftest import POINTS
from tests.scaling.known import KNOWN, measured

LAION = FitConfig(table=POINTS, where=("upstream_dataset=LAION*",), draws=100)


def test_fit_answers_with_what_scripts_rely_on(tmp_path: Path):
    config = replace(
        LAION,
        predict=(
            "ViT-H-14@68B",
            "ViT-g-14@34B",
            "ViT-bigG-14@68B",
            "ViT-B-32@100K",
            "ViT-H-14@1000B",
        ),
        hold_out=1e12,
        plot=tmp_path / "plots" / "imagenet",
    )
    result = json.loads(json.dumps(fit(config)))  # JSON values throughout
    assert (round(result["alpha"], 4), round(result["beta"], 3)) == (-0.1114, 5.858)
    assert (len(result["points"]), result["irreducible_error"]) == (5, None)
    scores = [round(100 * p["score"], 1) for p in result["predictions"].values()][:3]
    assert scores == [79.7, 79.1, 81.9]  # bigG's size is the zoo's: no such run is in the table
    for prediction in result["predictions"].values():
        low, high = prediction["score_interval"]
        assert 0 <= low <= prediction["score"] <= high <= 1
    assert result["hold_out"]["mean_relative_error"] < 0.03
    assert result["hold_out"]["inside_interval"] == len(result["hold_out"]["runs"]) == 4
    assert [Path(p).name for p in result["plots"]] == ["imagenet.svg", "imagenet.png"]
    assert all(Path(p).stat().st_size > 10_000 for p in result["plots"])
    (far,) = result["warnings"]
    assert far.startswith("ViT-H-14@1000B is ")
    assert "times the largest run's compute" in far
    text = describe(result)
    assert "ViT-H-14@68B: 79.7%" in text
    assert "4 of them inside the 95% interval" in text


def test_families_are_compared_from_one_table(tmp_path: Path):
    config = replace(LAION, compare="upstream_dataset", through="all", plot=tmp_path / "families")
    with mock.patch.object(plots, "save", autospec=True, return_value=[]) as save:
        result = json.loads(json.dumps(fit(config)))
    save.assert_called_once_with(mock.ANY, tmp_path / "families")
    assert set(result["families"]) == {"LAION-2B", "LAION-400M", "LAION-80M"}
    for family in result["families"].values():
        assert len(family["residuals"]) == family["runs"]
        for at in family["curve"]:
            assert at["interval"][0] < at["error"] < at["interval"][1]
    assert len(result["pairs"]) == 3
    small = next(x for x in result["pairs"] if x["families"] == ["LAION-2B", "LAION-80M"])
    # Of more data the law is steeper: with the largest compute it is better, surely.
    assert small["ratios"][1]["low"] > 1
    assert small["crossing"]["better"] == 0
    assert small["paired"]["pairs"] == 9  # B/32, B/16 and L/14 at 3B, 13B and 34B
    text = describe(result)
    assert "LAION-80M beside LAION-2B:" in text
    assert "in 9 pairs of runs alike in all else" in text
    few = fit(replace(config, where=(), plot=None, form="saturating"))
    assert few["warnings"][0].startswith("CLIP-WIT is left out: 3 points (all) cannot determine")
    assert "irreducible   not determined by these runs" in describe(few)
    parameters = [family["parameters"]["irreducible"] for family in few["families"].values()]
    assert min(x["interval"][0] for x in parameters) == 0  # and no error is negative


def test_what_a_law_takes_besides_is_a_column(tmp_path: Path):
    law = KNOWN["repeated"]
    columns: Any = measured(law, noise=0)
    names = ("gmacs_per_sample", "samples_seen", "error", "unique_samples")
    rows = [dict(zip(names, x, strict=True)) for x in zip(*columns, strict=True)]
    table.write([row | {"arch": f"m{row[names[0]]:g}"} for row in rows], tmp_path / "t.csv")
    config = FitConfig(
        table=tmp_path / "t.csv", metric="error", metric_is="error", form="repeated", draws=100,
        predict=("m300@100M", "m300@100M/1M"),
    )  # fmt: skip
    result = fit(config)
    assert result["parameters"]["fade"]["value"] == pytest.approx(15, rel=0.05)
    new, again = (x["error"] for x in result["predictions"].values())
    assert new == pytest.approx(law(300.0, 1e8), rel=0.01)
    assert again == pytest.approx(law(300.0, 1e8, 1e6), rel=0.01)
    optimal = result["optimal"]
    assert optimal["size_exponent"]["value"] == pytest.approx(0.3 / 0.8, rel=0.03)
    for at in optimal["divisions"]:
        assert at["size"]["value"] * at["samples"]["value"] == pytest.approx(at["compute"])
    assert "best division of compute: N grows as C^0.3" in describe(result)
    with pytest.raises(InputError, match="no column 'global_batch'"):
        fit(replace(config, form="batched"))


def test_a_budget_names_a_model_and_its_samples():
    config = replace(LAION, where=("upstream_dataset=LAION-2B",), form="additive")
    small, large = (fit(replace(config, budget=budget))["budget"] for budget in (1e20, 1e23))
    for budget in (small, large):
        assert len(budget["options"]) == 5  # the models in the table
        spent = budget["samples"] * table.gmacs(zoo.get(budget["model"])) * 6e9
        assert spent == pytest.approx(budget["training_flops"], rel=2e-3)
    chosen = fit(replace(config, budget=1e23, candidates=("ViT-bigG-14", "ViT-B-32")))
    assert "1e+23 training FLOPs: ViT-bigG-14 on" in describe(chosen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": Path("nowhere.csv")}, "scale collect"),
        ({"metric": "imagenet"}, "no column 'imagenet'; it has arch, "),
        ({"where": ("dataset=LAION",)}, "must be COLUMN=PATTERN"),
        ({"where": ("arch=RN50",)}, "no row"),
        ({"predict": ("ViT-L-14",)}, "MODEL@SAMPLES"),
        ({"predict": ("ViT-L-14@many",)}, "not a number of samples"),
        ({"predict": ("ViT-X-14@1B",)}, "no architecture 'ViT-X-14'; did you mean"),
        ({"hold_out": 1e30}, "nothing to predict"),
        ({"compare": "arch", "where": ("arch=ViT-H-14",)}, "takes two families of runs or more"),
        ({"compare": "family"}, "compare='family' is no column; there are arch, "),
        ({"compare": "arch", "predict": ("ViT-H-14@34B",)}, "predict and budget ask one"),
    ],
)
def test_wrong_use_is_told(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        fit(replace(LAION, **changes))


HEADER = b"arch,samples_seen,gmacs_per_sample,imagenet1k_acc1\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xf4\x00", "cannot be read as CSV"),
        (b"", "has no column 'arch'"),
        (HEADER + b"a,b,1,0.5,and more\n", "samples_seen of a is 'b', not a number"),
        (HEADER + b"a,1,,0.5\n", "gmacs_per_sample of a is '', not a number"),
    ],
)
def test_a_file_that_is_no_table_is_refused(content, says, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=says):
        fit(FitConfig(table=tmp_path / "t.csv"))


def write(folder: Path, contents: dict[str, str | dict]) -> None:
    """Write files by their paths in a folder."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


PARAMS = "epochs: 2\nlr: 0.001\nmodel: ViT-B-32\nname: mine\nseed: 0\ntrain_num_samples: 1000\n"
RESULTS = """\
{"imagenet-zeroshot-val-top1": 0.1, "epoch": 1}
{"imagenet-zeroshot-val-top1": 0.2, "clip_val_loss": 3.0, "epoch": 2}
"""
BENCHMARK = """\
dataset,model,pretrained,task,language,acc1,image_retrieval_recall@5
wds/imagenet1k,ViT-B-32,laion2b_s34b_b79k,zeroshot,en,0.66,
wds/flickr30k,ViT-B-32,laion2b_s34b_b79k,retrieval,en,,0.88
imagenet1k,ViT-B-16,openai,zeroshot,en,0.68,
imagenet1k,ViT-B-16,/x/Model-B-16_Data-80M_Samples-3B_lr-1e-3_bs-88k.pt,z,en,0.57,
imagenet1k,ViT-B-16,datacomp_l,zeroshot,en,0.5,
imagenet1k,ViT-B-16,other,zeroshot,en,0.5,
imagenet1k,convnext_base,laion2b_s13b_b82k,zeroshot,en,0.7,
"""


def test_runs_of_every_kind_become_one_table(tmp_path: Path):
    logs, output = tmp_path / "logs", tmp_path / "table.csv"
    config = {
        "steps": 100, "seed": 3, "batch_size": 64,
        "model": to_dict(replace(zoo.get("ViT-S-32"), dtype="float32")),
        "optim": {"learning_rate": 1e-3, "warmup_steps": 10, "weight_decay": 0.2},
    }  # fmt: skip
    result = {"step": 100, "samples_seen": 6_400, "zero_shot/seen/top1": 0.5}
    write(logs, {
        "ours/done/config.json": config, "ours/done/result.json": result,
        "ours/stopped/config.json": config | {"stop_after": 40},
        "ours/stopped/result.json": result | {"step": 40},
        "open_clip/params.txt": PARAMS, "open_clip/checkpoints/results.jsonl": RESULTS,
        "benchmark.csv": BENCHMARK,
    })  # fmt: skip
    summary = collect(CollectConfig(paths=(logs,), output=output, samples=("datacomp_l=1.28B",)))
    assert summary["rows"] == 6
    assert len(summary["skipped"]) == 3
    for reason in ("step 40 of 100", "'other' does not say", "no architecture 'convnext_base'"):
        assert any(reason in line for line in summary["skipped"])
    lines = csv.DictReader(output.read_text().splitlines())
    rows = {(row["arch"], row["name"]): row for row in lines}
    ours, openai = rows["ViT-S-32", ""], rows["ViT-B-16", "openai"]
    mine, laion = rows["ViT-B-32", "mine"], rows["ViT-B-32", "laion2b_s34b_b79k"]
    assert float(ours["mparams"]) == pytest.approx(63.09, abs=0.01)
    assert float(ours["gmacs_per_sample"]) == pytest.approx(2.84, rel=2e-3)
    for row, wanted in (
        (ours, {"samples_seen": 6400, "seed": 3, "lr": 0.001, "zero_shot/seen/top1": 0.5}),
        (mine, {"samples_seen": 2000, "imagenet1k_acc1": 0.2}),
        (laion, {"samples_seen": 34e9, "imagenet1k_acc1": 0.66, "flickr30k_img_r5": 0.88}),
        (openai, {"samples_seen": 12.8e9}),
        (rows["ViT-B-16", "datacomp_l"], {"samples_seen": 1.28e9}),
    ):
        assert {name: float(row[name]) for name in wanted} == wanted
    # The table is itself something to collect.
    again = collect(CollectConfig(paths=(output, POINTS), output=tmp_path / "all.csv"))
    assert again["rows"] == 6 + 32
    assert fit(replace(LAION, table=tmp_path / "all.csv"))["runs"] == 29


def test_nothing_is_collected_of_nothing_or_of_damaged_runs(tmp_path: Path):
    write(tmp_path, {
        "a/result.json": "{", "a/config.json": "{}", "b/result.json": "[]", "b/config.json": "{}",
        "c/results.jsonl": "no", "d/results.jsonl": "{}", "d/params.txt": "model: RN50",
    })  # fmt: skip
    with pytest.raises(InputError, match="no finished run") as raised:
        collect(CollectConfig(paths=(tmp_path,), output=tmp_path / "t.csv"))
    assert str(raised.value).count(": not ") == 4  # each with its reason
    with pytest.raises(InputError, match="does not exist"):
        collect(CollectConfig(paths=(tmp_path / "none",)))
    with pytest.raises(InputError, match="CHECKPOINT=NUMBER"):
        collect(CollectConfig(paths=(tmp_path,), samples=("12.8B",)))


def test_counts_are_read_and_written_as_people_do():
    counts = {"12.8B": 12.8e9, "400m": 4e8, "64000": 64e3, "1e6": 1e6}
    assert {text: table.parse_count(text) for text in counts} == counts
    shorts = {12.8e9: "13B", 2.56e9: "2.6B", 1e9: "1B", 4e8: "400M", 900.0: "900"}
    assert {number: table.short(number) for number in shorts} == shorts


def test_an_architecture_is_named_by_the_zoo_or_by_its_measures():
    config = zoo.get("ViT-L-14")
    assert table.arch_of(replace(config, dtype="float32", remat="full")) == "ViT-L-14"
    odd = replace(config, vision=replace(config.vision, depth=3))
    assert table.arch_of(odd) == "ViT-w1024d3p14-text-w768d12"
