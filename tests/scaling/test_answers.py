"""The scaling commands' functions: one table from every format, a fit, its answers in words."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from clip_jax.models import zoo
from clip_jax.refused import Refused
from clip_jax.scaling import plots, table
from clip_jax.scaling.answers import CollectConfig, FitConfig, collect, fit
from clip_jax.scaling.words import describe
from clip_jax.serialize import to_dict
from tests.conftest import ROOT

POINTS = ROOT / "tests/golden/scaling_points.csv"
LAION = FitConfig(table=POINTS, where=("upstream_dataset=LAION*",), draws=100)


def test_fit_answers_with_what_scripts_rely_on(tmp_path: Path):
    config = replace(
        LAION,
        predict=("ViT-H-14@68B", "ViT-g-14@34B", "ViT-bigG-14@68B", "ViT-B-32@100K"),
        hold_out=1e12,
        plot=tmp_path / "plots" / "imagenet",
    )
    result = json.loads(json.dumps(fit(config)))  # JSON values throughout
    assert round(result["alpha"], 4) == -0.1114
    assert float(f"{result['beta']:.4g}") == 5.858
    assert len(result["points"]) == 5
    scores = [round(100 * p["score"], 1) for p in result["predictions"].values()][:3]
    assert scores == [79.7, 79.1, 81.9]  # bigG's size is the zoo's: no such run is in the table
    for prediction in result["predictions"].values():
        low, high = prediction["score_interval"]
        assert 0 <= low <= prediction["score"] <= high <= 1
    assert result["irreducible_error"] is None
    assert result["hold_out"]["mean_relative_error"] < 0.03
    assert result["hold_out"]["inside_interval"] == len(result["hold_out"]["runs"]) == 4
    assert [Path(p).name for p in result["plots"]] == ["imagenet.svg", "imagenet.png"]
    assert all(Path(p).stat().st_size > 10_000 for p in result["plots"])
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
    with pytest.raises(Refused, match="compare='arch' takes two families of runs or more"):
        fit(replace(LAION, compare="arch", where=("arch=ViT-H-14",)))
    with pytest.raises(Refused, match="compare='family' is no column; there are arch, "):
        fit(replace(LAION, compare="family"))
    with pytest.raises(Refused, match="predict and budget ask one"):
        replace(LAION, compare="arch", predict=("ViT-H-14@34B",))


def test_what_a_law_takes_besides_is_a_column(tmp_path: Path):
    lines = ["arch,samples_seen,gmacs_per_sample,unique_samples,error"]
    for size in (1.0, 4.0, 16.0):
        for samples in (1e6, 1e7, 1e8):
            for unique in (1e6, 1e8):
                epochs = max(samples / unique, 1)
                worth = samples / epochs * (1 + 5 * (1 - math.exp((1 - epochs) / 5)))
                error = 0.1 + size**-0.5 + 20 * worth**-0.3
                lines.append(f"m{size:g},{samples:g},{size},{unique:g},{error}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    config = FitConfig(
        table=tmp_path / "t.csv", metric="error", metric_is="error", form="repeated", draws=100,
        predict=("m16@100M", "m16@100M/1M"),
    )  # fmt: skip
    result = fit(config)
    assert result["parameters"]["fade"]["value"] == pytest.approx(5, rel=0.05)
    new, again = (x["error"] for x in result["predictions"].values())
    assert new == pytest.approx(0.1 + 0.25 + 20 * 1e8**-0.3, rel=0.01)
    assert again == pytest.approx(0.1 + 0.25 + 20 * 6e6**-0.3, rel=0.01)
    optimal = result["optimal"]
    assert optimal["size_exponent"]["value"] == pytest.approx(0.3 / 0.8, rel=0.03)
    for at in optimal["divisions"]:
        assert at["size"]["value"] * at["samples"]["value"] == pytest.approx(at["compute"])
    assert "best division of compute: N grows as C^0.3" in describe(result)
    with pytest.raises(Refused, match="no column 'global_batch'"):
        fit(replace(config, form="batched"))


def test_an_irreducible_error_that_is_not_known_is_not_stated():
    config = replace(LAION, form="saturating", predict=("ViT-H-14@1000B",))
    result = fit(config)
    assert result["through"] == "all"
    assert "irreducible   not determined" in describe(result)
    assert any("times the largest run" in line for line in result["warnings"])


def test_a_budget_names_a_model_and_its_samples():
    config = replace(LAION, where=("upstream_dataset=LAION-2B",), form="additive")
    small, large = (fit(replace(config, budget=budget))["budget"] for budget in (1e20, 1e23))
    sizes = {"ViT-B-32": 7.4, "ViT-B-16": 20.57, "ViT-L-14": 87.73, "ViT-H-14": 190.97}
    sizes["ViT-g-14"] = 290.74
    assert sizes[small["model"]] < sizes[large["model"]]
    for budget in (small, large):
        assert {option["model"] for option in budget["options"]} == set(sizes)
        spent = budget["samples"] * sizes[budget["model"]] * 6e9
        assert spent == pytest.approx(budget["training_flops"])
    chosen = fit(replace(config, budget=1e23, candidates=("ViT-bigG-14", "ViT-B-32")))
    assert chosen["budget"]["model"] == "ViT-bigG-14"
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
        ({"hold_out": 1e30}, "nothing to predict"),
    ],
)
def test_wrong_use_is_told(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        fit(replace(LAION, **changes))
    with pytest.raises(Refused, match="no architecture 'ViT-X-14'; did you mean"):
        fit(replace(LAION, predict=("ViT-X-14@1B",)))


def run(folder: Path, steps: int, **result: float) -> None:
    """What a finished (or stopped) `clip-jax train` leaves behind."""
    folder.mkdir(parents=True)
    config = {
        "steps": 100,
        "seed": 3,
        "batch_size": 64,
        "model": to_dict(replace(zoo.get("ViT-S-32"), dtype="float32")),
        "optim": {"learning_rate": 1e-3, "warmup_steps": 10, "weight_decay": 0.2},
    }
    (folder / "config.json").write_text(json.dumps(config))
    result = {"step": steps, "samples_seen": steps * 64, **result}
    (folder / "result.json").write_text(json.dumps(result))


def test_runs_of_every_kind_become_one_table(tmp_path: Path):
    logs = tmp_path / "logs"
    run(logs / "ours" / "done", 100, **{"zero_shot/seen/top1": 0.5})
    run(logs / "ours" / "stopped", 40)

    theirs = logs / "open_clip" / "checkpoints"
    theirs.mkdir(parents=True)
    (logs / "open_clip" / "params.txt").write_text(
        "epochs: 2\nlr: 0.001\nmodel: ViT-B-32\nname: mine\nseed: 0\ntrain_num_samples: 1000\n"
    )
    (theirs / "results.jsonl").write_text(
        '{"imagenet-zeroshot-val-top1": 0.1, "epoch": 1}\n'
        '{"imagenet-zeroshot-val-top1": 0.2, "clip_val_loss": 3.0, "epoch": 2}\n'
    )
    columns = ["dataset", "model", "pretrained", "task", "language", "acc1"]
    columns.append("image_retrieval_recall@5")
    lines = [
        ["wds/imagenet1k", "ViT-B-32", "laion2b_s34b_b79k", "zeroshot", "en", "0.66", ""],
        ["wds/flickr30k", "ViT-B-32", "laion2b_s34b_b79k", "retrieval", "en", "", "0.88"],
        ["imagenet1k", "ViT-B-16", "openai", "zeroshot", "en", "0.68", ""],
        ["imagenet1k", "ViT-B-16", "/x/Model-B-16_Data-80M_Samples-3B_lr-1e-3_bs-88k.pt", "z",
         "en", "0.57", ""],
        ["imagenet1k", "ViT-B-16", "datacomp_l", "zeroshot", "en", "0.5", ""],
        ["imagenet1k", "ViT-B-16", "other", "zeroshot", "en", "0.5", ""],
        ["imagenet1k", "convnext_base", "laion2b_s13b_b82k", "zeroshot", "en", "0.7", ""],
    ]  # fmt: skip
    with (logs / "benchmark.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *lines])

    output = tmp_path / "table.csv"
    config = CollectConfig(paths=(logs,), output=output, samples=("datacomp_l=1.28B",))
    summary = collect(config)
    assert summary["rows"] == 6
    assert len(summary["skipped"]) == 3
    for reason in ("step 40 of 100", "'other' does not say", "no architecture 'convnext_base'"):
        assert any(reason in line for line in summary["skipped"])
    with output.open() as file:
        rows = {(row["arch"], row["name"]): row for row in csv.DictReader(file)}

    ours = rows["ViT-S-32", ""]
    assert (ours["samples_seen"], ours["seed"], ours["lr"]) == ("6400", "3", "0.001")
    assert ours["zero_shot/seen/top1"] == "0.5"
    assert float(ours["mparams"]) == pytest.approx(63.09, abs=0.01)
    assert float(ours["gmacs_per_sample"]) == pytest.approx(2.84, rel=2e-3)
    mine = rows["ViT-B-32", "mine"]
    assert (mine["samples_seen"], mine["imagenet1k_acc1"]) == ("2000", "0.2")
    laion = rows["ViT-B-32", "laion2b_s34b_b79k"]
    assert float(laion["samples_seen"]) == 34e9
    assert (laion["imagenet1k_acc1"], laion["flickr30k_img_r5"]) == ("0.66", "0.88")
    assert float(rows["ViT-B-16", "openai"]["samples_seen"]) == 12.8e9
    assert float(rows["ViT-B-16", "datacomp_l"]["samples_seen"]) == 1.28e9
    # The table is itself something to collect.
    again = collect(CollectConfig(paths=(output, POINTS), output=tmp_path / "all.csv"))
    assert again["rows"] == 6 + 32
    assert fit(replace(LAION, table=tmp_path / "all.csv"))["runs"] == 29


def test_collecting_nothing_is_told(tmp_path: Path):
    with pytest.raises(ValueError, match="does not exist"):
        collect(CollectConfig(paths=(tmp_path / "none",)))
    with pytest.raises(ValueError, match="no finished run"):
        collect(CollectConfig(paths=(tmp_path,), output=tmp_path / "t.csv"))
    with pytest.raises(ValueError, match="CHECKPOINT=NUMBER"):
        collect(CollectConfig(paths=(tmp_path,), samples=("12.8B",)))


def test_counts_are_read_and_written_as_people_do():
    assert [table.parse_count(text) for text in ("12.8B", "400m", "64000", "1e6")] == [
        12.8e9, 4e8, 64e3, 1e6,
    ]  # fmt: skip
    assert [table.short(n) for n in (12.8e9, 2.56e9, 1e9, 4e8, 900.0)] == [
        "13B", "2.6B", "1B", "400M", "900",
    ]  # fmt: skip


def test_an_architecture_is_named_by_the_zoo_or_by_its_measures():
    config = zoo.get("ViT-L-14")
    assert table.arch_of(replace(config, dtype="float32", remat="full")) == "ViT-L-14"
    odd = replace(config, vision=replace(config.vision, depth=3))
    assert table.arch_of(odd) == "ViT-w1024d3p14-text-w768d12"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xf4\x00", "cannot be read as CSV"),
        (b"", "has no column 'arch'"),
        (b"arch,samples_seen,gmacs_per_sample,imagenet1k_acc1\na,b,1,0.5,and more\n",
         "samples_seen of a is 'b', not a number"),
        (b"arch,samples_seen,gmacs_per_sample,imagenet1k_acc1\na,1,,0.5\n",
         "gmacs_per_sample of a is '', not a number"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_is_refused(content, says, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(Refused, match=says):
        fit(FitConfig(table=tmp_path / "t.csv"))


def test_foreign_and_damaged_runs_are_left_out_with_a_reason(tmp_path):
    for name, content in {
        "a/result.json": "{", "a/config.json": "{}", "b/result.json": "[]", "b/config.json": "{}",
        "c/results.jsonl": "no", "d/results.jsonl": "{}", "d/params.txt": "model: RN50",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(Refused) as raised:
        collect(CollectConfig(paths=(tmp_path,), output=tmp_path / "t.csv"))
    assert str(raised.value).count(": not ") == 4
