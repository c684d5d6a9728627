"""Tables of other programs: names, units, long tables, and the presets on their headers."""

import csv
import gzip
from pathlib import Path

import pytest

from clip_jax.errors import InputError
from clip_jax.scaling import run_table
from clip_jax.scaling.collect import CollectConfig, collect
from clip_jax.scaling.columns import mapped, samples_of_tag
from clip_jax.scaling.fit import FitConfig, fit
from clip_jax.scaling.run_table import RunTable
from tests.scaling.conftest import POINTS

# Lines of each table, without the columns that nothing reads.
TABLES = {
    "open_clip": """\
name,pretrained,params (M),FLOPs (B),Average perf. on 38 datasets,ImageNet 1k,ImageNet v2
ViT-L-14,datacomp_xl_s13b_b90k,427.62,175.33,0.6627,0.7921,0.7205
ViT-L-14,openai,427.62,175.33,0.6173,0.7554,0.6983
ViT-L-16-SigLIP-256,webli,652.15,201.62,0.6557,0.8045,0.7376
""",
    "clip_benchmark": """\
acc1,acc5,mean_per_class_recall,dataset,model,pretrained,task,image_retrieval_recall@5
0.63322,0.88808,0.6333799999999999,imagenet1k,ViT-B-32,openai,zeroshot_classification,
0.5595,0.834,0.5596,imagenetv2,ViT-B-32,openai,zeroshot_classification,
0.67044,0.9043,0.6705,imagenet1k,ViT-B-16,laion400m_e32,zeroshot_classification,
,,,mscoco_captions,ViT-B-16,laion400m_e32,zeroshot_retrieval,0.6364
""",
    "cherti": """\
arch,samples_seen,gmacs_total,gmacs,upstream_dataset,downstream_dataset,acc1,\
image_retrieval_recall@5,text_retrieval_recall@5,task,samples_seen_pretty,name
ViT-B-32,12800000000.0,94720000000.0,7.4,CLIP-WIT,imagenet_robustness,0.4863,,,\
zeroshot_classification,13B,openai
ViT-B-32,12800000000.0,94720000000.0,7.399999999999999,CLIP-WIT,vtab,0.3807,,,\
zeroshot_classification,13B,openai
ViT-L-14,12800000000.0,1122944000000.0,87.73,CLIP-WIT,vtab,0.4519,,,\
zeroshot_classification,13B,openai
""",
    "laion": """\
model,namespace,pretrain_dataset,downstream_dataset,samples_seen,model_gflops,gflops,\
global_batch_size,lr,warmup,lr_scheduler,model_mparams,acc1,miou
mammut_ViT-L-32,mammut,datacomp_1b,ade20k,3072000,74.28,228188160.0,1024,0.0005,2000,cosine,\
510.63,0.03122,0.1109
""",
}


def table(preset: str, folder: Path) -> RunTable:
    (folder / "t.csv").write_text(TABLES[preset])
    return run_table.read(folder / "t.csv", (preset,))


def test_the_tables_of_open_clip_and_of_its_benchmark_are_read(tmp_path: Path):
    first, second, third = table("open_clip", tmp_path).rows
    wanted = {"arch": "ViT-L-14", "samples_seen": 13e9, "gmacs_per_sample": 87.665}
    wanted |= {"mparams": "427.62", "imagenet1k_acc1": "0.7921", "ImageNet v2": "0.7205"}
    assert {name: first[name] for name in wanted} == wanted
    assert (second["samples_seen"], third["samples_seen"]) == (12.8e9, None)
    selected = table("open_clip", tmp_path).select("imagenet1k_acc1", ("samples_seen>0",))
    assert [row["pretrained"] for row in selected.rows] == ["datacomp_xl_s13b_b90k", "openai"]
    small, large = table("clip_benchmark", tmp_path).rows
    assert (small["imagenet1k_acc1"], small["imagenetv2_acc1"]) == ("0.63322", "0.5595")
    assert large["mscoco_captions_img_r5"] == "0.6364"
    assert not {"imagenetv2_acc1", "mscoco_captions_acc1", "task", "dataset", "acc5"} & {*large}
    assert large["gmacs_per_sample"] == pytest.approx(20.57, rel=1e-3)  # from the zoo


def test_the_tables_of_both_scaling_studies_are_read(tmp_path: Path):
    small, large = table("cherti", tmp_path).rows
    assert (small["imagenet_robustness_acc1"], small["vtab_acc1"]) == ("0.4863", "0.3807")
    assert (small["name"], small["gmacs_per_sample"]) == ("openai", "7.4")
    assert (large["arch"], large["vtab_acc1"]) == ("ViT-L-14", "0.4519")
    (run,) = table("laion", tmp_path).rows
    wanted = {"arch": "mammut_ViT-L-32", "family": "mammut", "gmacs_per_sample": 37.14}
    wanted |= {"samples_seen": "3072000", "ade20k_miou": "0.1109", "schedule": "cosine"}
    assert {name: run[name] for name in wanted} == wanted


def test_tags_of_weights_name_pairs_seen():
    tags = {"laion2b_s34b_b79k": 34e9, "laion400m_e32": 12.8e9, "openai": 12.8e9, "webli": None}
    tags |= {"datacomp_s_s13m_b4k": 13e6, "mscoco_finetuned_laion2b_s13b_b90k": 13e9}
    assert {tag: samples_of_tag(tag) for tag in tags} == tags


def test_other_names_and_units_give_the_published_law(tmp_path: Path):
    with POINTS.open() as file:
        rows = list(csv.DictReader(file))
    lines = [("model", "data", "seen", "Flops", "weights", "top1")]
    for row in rows:
        seen, size = float(row["samples_seen"]) / 1e9, float(row["gmacs_per_sample"])
        weights, top1 = float(row["mparams"]) * 1e6, 100 * float(row["imagenet1k_acc1"])
        lines.append(
            (
                row["arch"],
                row["upstream_dataset"],
                f"{seen:.5f}B",
                2e9 * size,
                weights,
                f"{top1:.3f}",
            )
        )
    text = "\n".join(",".join(map(str, line)) for line in lines)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    columns = (
        "arch=model",
        "family=data",
        "samples_seen=seen",
        "gmacs_per_sample=Flops:FLOPs",
        "mparams=weights:parameters",
        "imagenet1k_acc1=top1:percent",
    )
    other = run_table.read(tmp_path / "t.csv.gz", columns)
    assert float(other.rows[0]["mparams"]) == pytest.approx(151.28)
    law = fit(other, FitConfig(where=("family=LAION*",), procedure="cherti"))
    assert law.law.alpha == pytest.approx(-0.1114, abs=5e-5)
    assert law.law.beta == pytest.approx(5.858, abs=5e-3)
    result = collect(
        CollectConfig(paths=(tmp_path / "t.csv.gz",), output=tmp_path / "all.csv", columns=columns)
    )
    assert result["rows"] == 32
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")  # in the folder, not of this kind
    folder = CollectConfig(paths=(tmp_path,), output=tmp_path / "out" / "all.csv", columns=columns)
    with pytest.raises(InputError, match="no model"):
        collect(CollectConfig(**vars(folder) | {"paths": (tmp_path / "other.csv",)}))
    (tmp_path / "all.csv").unlink()
    (tmp_path / "t.csv").write_text(text)
    result = collect(folder)
    assert (result["rows"], len(result["skipped"])) == (32, 1)


def test_a_result_is_named_by_several_columns():
    rows = [
        {"arch": "a", "set": name, "metric": metric, "value": value, "seed": seed, "note": name}
        for seed in ("0", "1")
        for name, metric, value in (("x", "acc1", "0.1"), ("x", "acc5", "0.2"), ("y", "acc1", ""))
    ]
    wide = mapped(rows, ["{set}_{metric}=value", "=not*"])
    assert wide == [{"arch": "a", "x_acc1": "0.1", "x_acc5": "0.2", "seed": x} for x in "01"]
    twice = [*rows, {**rows[0], "value": "0.3"}]
    with pytest.raises(InputError, match=r"a has two values of x_acc1, 0\.1 and 0\.3"):
        mapped(twice, ["{set}_{metric}=value", "=note"])


def test_rows_of_runs_that_differ_in_any_other_column_are_not_joined(
    capsys: pytest.CaptureFixture[str],
):
    """Else a run that was measured on x and one that was measured on y become one run."""
    rows = [
        {"model": "a", "lr": lr, "set": name, "top1": top1}
        for lr, name, top1 in (("1e-3", "x", "0.1"), ("5e-4", "y", "0.9"))
    ]
    wide = mapped(rows, ["arch=model", "{set}_top1=top1"])
    run = {"arch": "a"}
    assert wide == [run | {"lr": "1e-3", "x_top1": "0.1"}, run | {"lr": "5e-4", "y_top1": "0.9"}]
    assert "no two rows are equal in arch, lr, so each is a run" in capsys.readouterr().err
    same = [row | {"lr": lr} for row, lr in zip(rows, ("1e-3", "0.001"), strict=True)]
    joined = run | {"lr": "1e-3", "x_top1": "0.1", "y_top1": "0.9"}
    assert mapped(same, ["arch=model", "{set}_top1=top1"]) == [joined]
    assert mapped(rows, ["arch=model", "{set}_top1=top1", "=lr"]) == [
        {"arch": "a", "x_top1": "0.1", "y_top1": "0.9"}
    ]
    assert capsys.readouterr().err == ""


RESULTS = {  # published columns that differ between the results of a run
    "clip_benchmark": (
        "acc1 acc5 mean_per_class_recall dataset task mean_average_precision "
        "image_retrieval_recall@5 text_retrieval_recall@5 image_retrieval_recall@1 image_acc "
        "lp_acc1"
    ),
    "cherti": (
        "downstream_dataset acc1 acc5 mean_per_class_recall image_retrieval_recall@5 "
        "text_retrieval_recall@5 mean_average_precision task"
    ),
    "laion": (
        "path downstream_dataset task image_acc text_acc acc main_metric main_metric_value acc1 "
        "acc5 mean_per_class_recall image_retrieval_recall@5 text_retrieval_recall@5 "
        "cosine_distance contrastive_loss caption_loss miou"
    ),
}


@pytest.mark.parametrize("preset", RESULTS)
def test_the_columns_of_a_published_result_do_not_divide_its_run(preset: str):
    run = {"model": "a", "arch": "a", "pretrained": "", "lr": "1e-3", "train_caption_loss": "2"}
    rows = [run | dict.fromkeys(RESULTS[preset].split(), value) for value in ("0.1", "0.2")]
    (row,) = mapped(rows, [preset])
    assert (row["lr"], row["0.1_acc1"], row["0.2_acc1"]) == ("1e-3", "0.1", "0.2")
    assert row["train_caption_loss"] == "2"


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("open-clip", "must be one of OURS=THEIRS, OURS=THEIRS:UNIT, open_clip, clip_benchmark"),
        ("arch=model", "the table has no model; it has a:b, flops"),
        ("=x*", r"columns='=x\*': the table has no x\*; it has a:b, flops"),
        ("gmacs_per_sample=flops:G", "unit of gmacs_per_sample must be one of MACs, GMACs"),
        ("{set}_{split}=flops", "the table has no set, split; it has a:b, flops"),
        ("top1=flops:tag", "unit of top1 must be one of percent, K, M, B"),
        ("mparams=flops:M", "flops is 'many' in a row, not a number of M"),
    ],
)
def test_a_mapping_that_does_not_fit_is_explained(column: str, message: str):
    with pytest.raises(InputError, match=message):
        mapped([{"flops": "many", "a:b": "1"}], [column])
    assert mapped([{"flops": "many", "a:b": "1"}], ["top1=a:b"]) == [{"flops": "many", "top1": "1"}]


CONDITIONS = {
    "samples_seen<=3e9": "ab", "samples_seen>=3B": "bc", "samples_seen<3B": "a",
    "samples_seen>400M": "bc", "samples_seen=12.8B": "c", "samples_seen!=12.8B": "abd",
    "arch!=a*": "bcd", "epoch={total}": "ac", "epoch!={total}": "bd", "samples_seen=": "d",
}  # fmt: skip


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions_compare_numbers_and_match_patterns(condition: str):
    rows = [
        {
            "arch": arch,
            "samples_seen": samples,
            "gmacs_per_sample": "1",
            "top1": "0.5",
            "epoch": epoch,
            "total": "3",
        }
        for arch, samples, epoch in zip("abcd", ("400M", "3e9", "12.8B", ""), "3231", strict=True)
    ]
    selected = RunTable(rows).select("top1", (condition,))
    assert "".join(row["arch"] for row in selected.rows) == CONDITIONS[condition]


def test_conditions_that_cannot_be_read_are_explained():
    rows = RunTable([{"arch": "a", "samples_seen": "1", "gmacs_per_sample": "1", "top1": "0.5"}])
    for condition, message in (
        ("arch", "must be COLUMN=PATTERN"),
        ("arch>3", "'a' and '3' must be numbers"),
        ("samples_seen<few", "'1' and 'few' must be numbers"),
        ("none<3", "no column 'none'"),
        ("arch={none}", "no column 'none'"),
    ):
        with pytest.raises(InputError, match=message):
            rows.select("top1", (condition,))
