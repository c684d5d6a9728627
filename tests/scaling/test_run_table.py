"""One table from every format of results, and what is no table."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.scaling import run_table
from clip_jax.scaling.fit import FitConfig, fit
from clip_jax.scaling.run_table import CollectConfig, collect
from clip_jax.serialize import to_dict
from tests.scaling.conftest import POINTS

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
        fit(run_table.read(tmp_path / "t.csv"), FitConfig())


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
    rows = run_table.read(tmp_path / "all.csv").select(
        "imagenet1k_acc1", ("upstream_dataset=LAION*",)
    )
    assert len(rows.rows) == 29


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
    assert {text: run_table.parse_count(text) for text in counts} == counts
    shorts = {12.8e9: "13B", 2.56e9: "2.6B", 1e9: "1B", 4e8: "400M", 900.0: "900"}
    assert {number: run_table.short(number) for number in shorts} == shorts


def test_an_architecture_is_named_by_the_zoo_or_by_its_measures():
    config = zoo.get("ViT-L-14")
    assert run_table.arch_of(replace(config, dtype="float32", remat="full")) == "ViT-L-14"
    odd = replace(config, vision=replace(config.vision, depth=3))
    assert run_table.arch_of(odd) == "ViT-w1024d3p14-text-w768d12"
