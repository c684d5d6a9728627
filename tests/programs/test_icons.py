"""The study on icons in miniature: its scripts on a few hundred icons, with two sizes of models."""

import csv
import importlib
import itertools
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer

from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer
from clip_jax.scaling.ladder import load_ladder
from tests.conftest import ROOT

STUDY = ROOT / "studies/icons"
GOLDEN = ROOT / "tests/golden"
SMALL = (
    *("--steps", "4", "--batch-size", "32", "--optim.warmup-steps", "2", "--report-every", "2"),
    *("--optim.schedule.steps", "1"),
    *("--evals.2.pairs", "64", "--evals.2.pool", "64"),
    *("--evals.3.pairs", "64", "--evals.3.pool", "64"),
)


def run(*command: object, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def prepare(folder: Path, output: str | Path = "icons") -> None:
    archive = ("--archive", GOLDEN / "icons.tgz", "--sets", GOLDEN / "icon_sets.csv")
    run(STUDY / "prepare.py", output, *archive, folder=folder)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    prepare(folder)
    return folder


def test_every_icon_is_kept_or_dropped_for_a_reason(prepared):
    counts = Counter[str]()
    for row in table(prepared / "icons/counts.csv"):
        counts[row["stage"]] += int(row["icons"])
    read = counts.pop("read")
    assert read == counts.total()
    assert counts["licence"] == 1
    assert counts["hidden"] == 10
    assert counts["brand"] == 2  # of a set of logos, and a name in another set
    assert counts["in test"] == 1
    assert min(counts["equal drawing"], counts["near duplicate"]) > 0
    assert counts["kept"] > 0.8 * read


def test_captions_have_the_names_and_aliases_without_words_of_style(prepared):
    captions = {}
    for path in (prepared / "icons/drawn").glob("*/*.tar"):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(".json"):
                    captions[name] = json.load(tar.extractfile(name))["caption"]
    of_bank = ["bank", "bank icon", "an icon of bank", "a pictogram of bank"]
    assert captions["osmic/bank-14.json"] == of_bank
    assert captions["pinhead/tall-gate.json"][::4] == ["tall gate", "gate tall"]


def test_the_same_archive_gives_the_same_bytes(prepared, tmp_path):
    prepare(ROOT, tmp_path / "again")
    assert table(tmp_path / "again/digests.csv") == table(prepared / "icons/digests.csv")


def test_open_clip_reads_the_same_pairs_as_the_same_token_ids(prepared, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(STUDY)
    script = importlib.import_module("beside_open_clip")
    count = script.write_tars(prepared / "icons", tmp_path / "tars", 50)
    with tarfile.open(tmp_path / "tars/00000.tar") as tar:
        texts = [tar.extractfile(name).read().decode() for name in tar.getnames() if "txt" in name]
    assert len(texts) == count == 50
    merges = script.write_merges(tmp_path / "merges.txt.gz", 8_192)
    theirs = SimpleTokenizer(str(merges), context_length=16)
    ours = ClipTokenizer(8_192)
    np.testing.assert_array_equal(theirs(texts).numpy(), ours(texts, 16, True))


def write_configs(folder: Path, spec: str, only: str) -> None:
    """Write the configs of the runs of a ladder to `configs`, without training them."""
    root = ("--root", f"configs/{Path(spec).stem}")
    ladder = ("scale", "ladder", STUDY / spec, "--jobs", "0", "--only", only, *root)
    run("-m", "clip_jax", *ladder, folder=folder)


def train(folder: Path, name: str, *flags: object) -> dict[str, float]:
    """Train a run of a ladder for a few steps, and return its results."""
    options = ("train", f"configs/{name}/config.json", "--workdir", f"runs/{name}", *SMALL)
    run("-m", "clip_jax", *options, *flags, folder=folder)
    return json.loads((folder / "runs" / name / "result.json").read_text())


def test_a_ladder_of_two_sizes_is_measured_on_held_out_sets(prepared):
    write_configs(prepared, "ladder.py", "w*-seed0")
    names = [min(prepared.glob(f"configs/ladder/w{width}@*")).name for width in (64, 128)]
    small, large = (train(prepared, f"ladder/{name}") for name in names)
    measured = {"val/acc1", "classes/acc1", "classes/acc5", "validation/info_nce"}
    assert large.keys() >= measured | {"test/text_retrieval_recall@1"}
    collect = ("scale", "collect", "runs/ladder", "--output", "ladder.csv")
    run("-m", "clip_jax", *collect, folder=prepared)
    losses = {row["width"]: float(row["test/info_nce"]) for row in table(prepared / "ladder.csv")}
    assert losses == {"64": small["test/info_nce"], "128": large["test/info_nce"]}

    images = f"runs/ladder/{names[1]}/evals/classes/images.csv"
    output = run(STUDY / "accuracy.py", images, images, folder=prepared)
    assert f"{images} acc1: {large['classes/acc1']:.1%} (" in output
    assert f"minus {images} acc5: 0.0% (0.0% to 0.0%)" in output
    picture = ("classes", images, "classes.png", "--count", 2, "--fewest", 1)
    assert "classes.png: " in run(STUDY / "pictures.py", *picture, folder=prepared)
    shipped = prepared / "shipped"
    run_folder = f"runs/ladder/{names[1]}"
    run(STUDY / "ship.py", run_folder, shipped, "--command", "clip-jax train", folder=prepared)
    assert f"| {large['classes/acc1']:.1%} (" in (shipped / "README.md").read_text()
    assert str(STUDY) not in (shipped / "training.json").read_text()
    code = f"import clip_jax; print(clip_jax.load('{shipped}').config.vision.width)"
    assert run("-c", code, folder=prepared).split()[-1] == "128"


def test_the_dearest_points_are_predicted_and_compared(tmp_path):
    samples, rows = load_ladder(STUDY / "ladder.py").samples, []
    for width, pairs, seed in itertools.product((64, 96, 128), samples, (0, 1)):
        error = 0.2 + 2 / width + 0.3 * (pairs / samples[0]) ** -0.5 + 0.001 * seed
        scores = {"classes/acc1": 1 - error, "val/acc1": 1 - error}
        losses = {"test/info_nce": 5 * error, "validation/info_nce": 5 * error}
        size = {"arch": f"w{width}", "width": width, "gmacs_per_sample": width**2 / 1e6}
        rows.append({**size, "samples_seen": pairs, "seed": seed, **losses, **scores})
    dear = [row for row in rows if row["width"] > 64 and row["samples_seen"] == samples[-1]]
    write(tmp_path / "ladder_small.csv", [row for row in rows if row not in dear])
    write(tmp_path / "ladder.csv", rows)
    run(STUDY / "predictions.py", "predict", tmp_path, folder=tmp_path)
    run(STUDY / "predictions.py", "compare", tmp_path, folder=tmp_path)
    compared = table(tmp_path / "ladder_measured.csv")
    assert len(compared) == 2 * (4 + 2)
    for row in compared:
        rel = 0.1 if row["law of"] == "odds" else 0.02  # the errors follow a law of the error
        assert float(row["predicted"]) == pytest.approx(float(row["measured"]), rel=rel)


def test_variants_are_compared_with_the_fixed_setting(prepared):
    write_configs(prepared, "variants.py", "*-seed0")
    assert (prepared / "configs/variants/small_first-seed0/config.json").exists()
    last = ("--checkpoint.also", "2", "3")
    base = train(prepared, "variants/base-seed0", *last)
    parts = ("--import", STUDY / "variants.py")
    train(prepared, "variants/no_style-seed0", *last, *parts)
    tower = ("--init-from", "runs/variants/base-seed0")
    train(prepared, "variants/locked_text-seed0", *last, *tower)
    output = run(STUDY / "what_helps.py", "runs/variants", "results", folder=prepared)
    names = [row["variant"] for row in table(prepared / "results/variants.csv")]
    assert names == ["base", "no_style", "locked_text", "checkpoints"]
    assert f"| {base['classes/acc1']:.1%} |" in output
    assert (prepared / "results/what_helps.svg").exists()
    files = sorted((prepared / "results").iterdir())
    before = [path.read_bytes() for path in files]
    again = run(STUDY / "what_helps.py", "of_another_machine", "results", folder=prepared)
    assert output.endswith(again)
    assert [path.read_bytes() for path in files] == before

    train(prepared, "variants/widths-seed0", *last)
    output = run(STUDY / "at_widths.py", "runs/variants", "results", folder=prepared)
    rows = table(prepared / "results/at_widths.csv")
    assert [(row["variant"], row["width"]) for row in rows] == [
        (name, width) for name in ("base", "widths") for width in ("32", "64", "128")
    ]
    assert f"| 128 | zero-shot top-1 | {base['classes/acc1']:.1%} |" in output


def write(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
