"""One table from every format of results, and what is no table."""

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clip_jax.config import Config
from clip_jax.errors import InputError
from clip_jax.losses import CaptionConfig
from clip_jax.models import zoo
from clip_jax.scaling import run_table
from clip_jax.scaling.collect import CollectConfig, collect, of_run
from clip_jax.scaling.fit import FitConfig, fit
from clip_jax.scaling.grid import Point
from clip_jax.serialize import to_dict
from tests.conftest import COCA
from tests.scaling.conftest import POINTS

HEADER = b"arch,samples_seen,gmacs_per_sample,imagenet1k_acc1\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xf4\x00", "cannot be read as a table"),
        (b"", "has no column 'arch'"),
        (HEADER + b"a,b,1,0.5,and more\n", "samples_seen of a is 'b', not a number"),
        (HEADER + b"a,0,1,0.5\n", "samples_seen of a is 0, but must be from 1e-12 to 1e.18; .*>0'"),
        (
            HEADER + b"a,1e200,1,0.5\n",
            "samples_seen of a is 1e.200, but must .* 'samples_seen<=1e.1",
        ),
        (HEADER + b"a,1,-1,0.5\n", "gmacs_per_sample of a is -1, but must be from 1e-12 to 1e.18"),
        (HEADER + b"a,1,1e-200,0.5\n", "gmacs_per_sample of a is 1e-200, but must be from 1e-12"),
        (HEADER + b"a,1,nan,0.5\n", "gmacs_per_sample of a is nan, but must be from 1e-12"),
        (HEADER[:-1] + b",arch\n", "t.csv has two columns 'arch'; rename or delete one"),
        (HEADER + b"a,1,1,nan\n", "imagenet1k_acc1 must be finite in every row; .*_acc1<1e9'"),
        (HEADER + b"a,1,,0.5\n", "gmacs_per_sample of a is '', not a number"),
    ],
)
def test_a_file_that_is_no_table_is_refused(content, says, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=says):
        fit(run_table.read(tmp_path / "t.csv"), FitConfig())


def test_json_lines_are_a_table(tmp_path: Path):
    """With a byte-order mark, an empty line, and cells that are missing, null or texts."""
    rows = [
        {"arch": "a", "samples_seen": 1e6, "gmacs_per_sample": 2, "top1": 0.5, "data": "x"},
        {"arch": "b", "samples_seen": "12.8M", "gmacs_per_sample": 4.5, "top1": None},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(row) for row in rows) + "\n"
    (tmp_path / "t.jsonl").write_text(text, encoding="utf-8")
    with gzip.open(tmp_path / "t.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    for name in ("t.jsonl", "t.jsonl.gz"):
        table = run_table.read(tmp_path / name)
        np.testing.assert_array_equal(table.numbers("samples_seen"), [1e6, 12.8e6])
        assert [row["top1"] for row in table.rows] == [0.5, ""]
        assert len(table.select("top1").rows) == 1
        assert table.meets(["data=x"]) == [True, False]
    for line in ("[1, 2]", '{"arch": ["a"]}', "{"):
        (tmp_path / "t.jsonl").write_text(f'{{"arch": "a"}}\n{line}\n')
        with pytest.raises(InputError, match=r"t\.jsonl cannot be read as a table: line 2 must be"):
            run_table.read(tmp_path / "t.jsonl")


def test_a_table_that_excel_saved_is_read(tmp_path: Path):
    """It begins with a byte order mark, which would be part of the first column's name."""
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + HEADER + b"a,1,1,0.5\n")
    assert run_table.read(tmp_path / "t.csv").columns[0] == "arch"


def rows_of(column: str, *values: str) -> run_table.RunTable:
    plain = {"arch": "a", "samples_seen": "1e6", "gmacs_per_sample": "3", "loss": "1"}
    return run_table.RunTable([plain | {column: value} for value in values])


@pytest.mark.parametrize(
    ("column", "value", "options"),
    [
        ("global_batch", "inf", {}),
        ("unique_samples", "nan", {}),
        ("global_batch", "0", {"form": "batched"}),
        ("unique_samples", "1e200", {"form": "repeated"}),
        ("seconds/total", "0", {"against": "hours"}),
        ("loss", "1e200", {}),
        ("loss", "0", {}),
        ("training_flops", "1e300", {"against": "training_flops"}),
    ],
)
def test_no_run_has_such_a_quantity(column: str, value: str, options: dict[str, str]):
    """Such a value ends a fit with a traceback of NumPy, or gives a law without a warning."""
    config = FitConfig(metric="loss", **options)
    assert len(config.runs(rows_of(column, "100", "200")).error) == 2
    with pytest.raises(InputError, match=f"{column} of a is .*, but must be from 1e-12 to 1e"):
        config.runs(rows_of(column, "100", value))


def test_the_known_noise_of_a_score_is_binomial():
    """Its variance is E (1 − E) / n."""
    config = FitConfig(metric="top1", evaluated=50)
    binomial = config.runs(rows_of("top1", "0.9", "0.5")).binomial
    assert binomial == pytest.approx([0.1 * 0.9 / 50, 0.5 * 0.5 / 50])
    # None of 50 images does not mean that none ever is: half of one counts.
    none = config.runs(rows_of("top1", "0", "1e-200")).binomial
    assert none == pytest.approx([0.01 * 0.99 / 50] * 2)


def test_a_model_of_several_sizes_has_no_size():
    """Else the last row's size is planned and predicted with."""
    near = rows_of("gmacs_per_sample", "3", "3.01")
    assert near.size_of("a") == 3.01
    assert near.size_of("ViT-B-32") == pytest.approx(7.4, rel=0.01)
    with pytest.raises(InputError, match=r"the table has a, and no architecture 'w64'"):
        near.size_of("w64")
    with pytest.raises(InputError, match=r"models of 3 to 30 GMACs are all named a; correct"):
        rows_of("gmacs_per_sample", "3", "30").size_of("a")


def write(folder: Path, contents: dict[str, str | dict]) -> None:
    """Write files by their paths in a folder."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_runs_of_every_kind_become_one_table(tmp_path: Path):
    logs, output = tmp_path / "logs", tmp_path / "table.csv"
    config = {
        "steps": 100,
        "seed": 3,
        "batch_size": 64,
        "model": to_dict(replace(zoo.get("ViT-S-32"), dtype="float32")),
        "optim": {"learning_rate": 1e-3, "warmup_steps": 10, "weight_decay": 0.2},
    }
    result = {"step": 100, "samples_seen": 6_400, "zero_shot/seen/top1": 0.5}
    write(
        logs,
        {
            "ours/done/config.json": config,
            "ours/done/result.json": result,
            "ours/done/evals/classes/images.csv": "image,class\nant.png,ant\n",
            "ours/stopped/config.json": config | {"stop_after": 40},
            "ours/stopped/result.json": result | {"step": 40},
            "ours/early/config.json": config,
            "ours/early/result.json": {"goodput": 0.1, "seconds/total": 60.0},
            "others.csv": (HEADER + b"RN50,12.8e9,9,0.6").decode(),
            "no table.csv": "arch,acc\na,1\n",
        },
    )
    summary = collect(CollectConfig(paths=(logs,), output=output))
    assert (summary["table"], summary["rows"]) == (str(output), 2)
    assert len(summary["skipped"]) == 3
    reasons = ("step 40 of 100", "no result yet", "the table has no column 'samples_seen'")
    for reason in reasons:
        assert any(reason in line for line in summary["skipped"])
    rows = {row["arch"]: row for row in csv.DictReader(output.read_text().splitlines())}
    ours, others = rows["ViT-S-32"], rows["RN50"]
    assert float(ours["mparams"]) == pytest.approx(63.09, abs=0.01)
    assert float(ours["gmacs_per_sample"]) == pytest.approx(2.84, rel=2e-3)
    for row, wanted in (
        (ours, {"samples_seen": 6400, "seed": 3, "lr": 0.001, "zero_shot/seen/top1": 0.5}),
        (others, {"samples_seen": 12.8e9, "imagenet1k_acc1": 0.6}),
    ):
        assert {name: float(row[name]) for name in wanted} == wanted
    # The table is itself something to collect.
    again = collect(CollectConfig(paths=(output, POINTS), output=tmp_path / "all.csv"))
    assert again["rows"] == 2 + 32
    rows = run_table.read(tmp_path / "all.csv").select(
        "imagenet1k_acc1", ("upstream_dataset=LAION*",)
    )
    assert len(rows.rows) == 29


def test_the_flops_of_a_run_are_those_of_its_ladder():
    """A captioner that learns from captions alone has no similarity matrix."""
    base = Config(model=COCA, objective=(CaptionConfig(),), steps=30, batch_size=8)
    doubled = replace(base, double_batch_at=(10,))
    point = Point("", "", 0, base, Path())
    assert of_run(to_dict(base), 30)["training_flops"] == point.training_flops
    assert of_run(to_dict(doubled), 30)["training_flops"] == doubled.flops_after(30)


def test_nothing_is_collected_of_nothing_or_of_damaged_runs(tmp_path: Path):
    write(
        tmp_path,
        {"a/result.json": "{", "a/config.json": "{}", "b/result.json": "[]", "b/config.json": "{}"},
    )
    with pytest.raises(InputError, match="no finished run") as raised:
        collect(CollectConfig(paths=(tmp_path,), output=tmp_path / "t.csv"))
    assert str(raised.value).count("it is not a JSON object.") == 2  # each with its reason
    with pytest.raises(InputError, match="does not exist"):
        collect(CollectConfig(paths=(tmp_path / "none",)))


def test_counts_are_read_and_written_as_people_do():
    counts = {"12.8B": 12.8e9, "400m": 4e8, "64000": 64e3, "1e6": 1e6}
    assert {text: run_table.parse_count(text) for text in counts} == counts
    shorts = {12.8e9: "13B", 2.56e9: "2.6B", 1e9: "1B", 4e8: "400M", 900.0: "900"}
    assert {number: run_table.short(number) for number in shorts} == shorts
    for wrong in ("0", "0.5", "1e400", "nan", "-1", ""):
        with pytest.raises(InputError, match=r"is not a number of samples from 1 to 1e\+18; write"):
            run_table.parse_count(wrong)


def test_a_loss_is_known_by_its_name_and_a_score_is_between_0_and_1():
    names = ("imagenet1k_acc1", "val/info_nce", "loss", "perplexity")
    assert [run_table.is_score(name) for name in names] == [True, False, False, False]
    assert run_table.is_score("loss", "score")
    assert not run_table.is_score("imagenet1k_acc1", "error")
    row = {"arch": "a", "samples_seen": 1e6, "gmacs_per_sample": 1.0, "top1": "52.5"}
    assert run_table.RunTable([row]).runs("top1", is_score=False).error.tolist() == [52.5]
    with pytest.raises(InputError, match=r"from 52\.5 to 52\.5; a score must be between"):
        run_table.RunTable([row]).runs("top1", is_score=True)
