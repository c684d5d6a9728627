"""The study on icons in miniature: its scripts on a few hundred icons, with two sizes of models."""

import csv
import importlib
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
from tests.conftest import ROOT

STUDY = ROOT / "studies/icons"
GOLDEN = ROOT / "tests/golden"
SMALL = (
    *("--steps", "4", "--batch-size", "32", "--optim.warmup-steps", "2", "--report-every", "2"),
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


@pytest.mark.parametrize("width", [48, 192])
def test_the_fixed_setting_trains_and_is_measured_on_held_out_sets(prepared, width):
    run_folder = f"runs/{width}"
    size = ("--model.vision.width", width)
    train = ("-m", "clip_jax", "train", STUDY / "base.py", "--workdir", run_folder, *size, *SMALL)
    run(*train, folder=prepared)
    result = json.loads((prepared / run_folder / "result.json").read_text())
    measured = {"val/acc1", "classes/acc1", "classes/acc5", "validation/info_nce"}
    assert result.keys() >= measured | {"test/text_retrieval_recall@1"}
    images = f"{run_folder}/evals/classes/images.csv"
    output = run(STUDY / "accuracy.py", images, images, folder=prepared)
    assert f"{images} acc1: {result['classes/acc1']:.1%} (" in output
    assert f"minus {images} acc5: 0.0% (0.0% to 0.0%)" in output
    picture = ("classes", images, "classes.png", "--count", 2, "--fewest", 1)
    assert "classes.png: " in run(STUDY / "pictures.py", *picture, folder=prepared)
