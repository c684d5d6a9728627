"""What prepare keeps: by score, by caption, and of equal images one."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.data.filters import FilterConfig, repeated
from clip_jax.data.sources.array_record import ArrayRecordConfig, ArrayRecordSource
from clip_jax.data.writer import PrepareConfig, prepare

from . import formats
from .test_writer import encoded

PAIRS = [(f"{i:02d}.png", encoded(20 + i, 20), f"text {i}") for i in range(12)]
SCORES = [i / 10 for i in range(11)] + [None]


def kept(folder):
    source = ArrayRecordSource(ArrayRecordConfig(path=str(folder / "*.array_record")))
    return [source.captions(i) for i in range(len(source))]


def run(tmp_path, source, **fields):
    config = {"source": str(source), "destination": tmp_path / "out", "samples_per_shard": 5}
    report = prepare(PrepareConfig(**(config | fields)))
    return report, kept(tmp_path / "out")


def with_scores(pairs, scores=SCORES):
    return formats.hugging_face(pairs).append_column("similarity", pa.array(scores))


def beside_tars(folder):
    path = formats.tar(folder, PAIRS).path
    keys = [name.split(".")[0] for name, _, _ in PAIRS]
    for number, part in enumerate(formats.parts(list(zip(keys, SCORES, strict=True)), 3)):
        table = {"key": [key for key, _ in part], "similarity": [score for _, score in part]}
        rows = pa.table(table).append_column("status", pa.array(["success"] * len(part)))
        failed = pa.table({"key": ["none"], "similarity": [1.0], "status": ["failed"]})
        both = pa.concat_tables([failed, rows], promote_options="permissive")
        pq.write_table(both, folder / f"{number:05d}.parquet")
    return path


def in_parquet(folder):
    pq.write_table(with_scores(PAIRS), folder / "a.parquet", row_group_size=4)
    return folder / "a.parquet"


def in_saved_dataset(folder):
    formats.saved_dataset(folder, PAIRS)
    state = json.loads((folder / "state.json").read_text())
    parts = formats.parts(list(zip(PAIRS, SCORES, strict=True)), 2)
    for file, part in zip(state["_data_files"], parts, strict=True):
        rows = with_scores(*zip(*part, strict=True))
        with (
            pa.OSFile(str(folder / file["filename"]), "wb") as sink,
            pa.ipc.new_stream(sink, rows.schema) as writer,
        ):
            writer.write_table(rows)
    return folder


@pytest.mark.parametrize("write", [beside_tars, in_parquet, in_saved_dataset])
def test_a_score_decides(write, tmp_path):
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in")
    report, captions = run(tmp_path, path, score_column="similarity", min_score=0.3, max_score=0.8)
    assert captions == [[f"text {i}"] for i in range(3, 9)]
    assert report["counts"] == {"kept": 6, "score": 5, "score is missing": 1}
    assert report["examples"]["score"].endswith("score: similarity 0")
    with pytest.raises(ValueError, match=r"has no column 'none', only .*'similarity'"):
        run(tmp_path, path, score_column="none", destination=tmp_path / "other")


def test_a_source_without_scores_says_so(tmp_path):
    path = formats.table(tmp_path, PAIRS).path
    with pytest.raises(ValueError, match="TableSource has no columns beside its pairs"):
        run(tmp_path, path, score_column="similarity")
    formats.tar(tmp_path, PAIRS)
    with pytest.raises(ValueError, match=r"'similarity' is to be read from .*00000\.parquet: .*No"):
        run(tmp_path, tmp_path / "*.tar", score_column="similarity")


def test_of_several_captions_those_that_pass_are_kept(tmp_path):
    rows = {
        "image": [image for _, image, _ in PAIRS[:3]],
        "caption": [["one", "two words", "three more words"], ["x"], ["four", "", "fünf"]],
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    report, captions = run(tmp_path, tmp_path / "a.parquet", min_caption=3, max_caption=9)
    assert captions == [["one", "two words"], ["four", "fünf"]]
    assert report["counts"] == {"kept": 2, "caption length": 1}
    assert sum(report["histograms"]["caption, characters"]) == 4


@pytest.mark.parametrize("parts", [1, 3])
def test_of_equal_images_the_first_that_passes_is_kept(parts, tmp_path):
    """Across shards and parts, whichever part comes first."""
    images = [PAIRS[i][1] for i in (0, 1, 2, 0, 3, 1, 0, 4, 2, 5, 0)]
    texts = ["", *(f"text {i}" for i in range(1, 11))]
    pairs = [
        (f"{i:02d}.png", x, text) for i, (x, text) in enumerate(zip(images, texts, strict=True))
    ]
    pairs += [(f"{i}.png", b"broken", "x") for i in (11, 12)]
    (tmp_path / "in").mkdir()
    path = formats.images_beside(tmp_path / "in", pairs).path
    how = {"source": path, "destination": tmp_path / "out", "samples_per_shard": 5}
    for part in range(parts, 0, -1):
        report = prepare(PrepareConfig(**how, drop_duplicates=True, part=f"{part}/{parts}"))
    assert kept(tmp_path / "out") == [[f"text {i}"] for i in (1, 2, 3, 4, 7, 9)]
    assert report["counts"] == {
        "kept": 6,
        "duplicate image": 5,  # one of them broken
        "caption length": 1,
        "not an image": 1,
    }


def test_repeated_marks_all_but_the_first():
    marks = repeated(np.array([5, 0, 3, 5, 0, 3, 3, 2**64 - 1], np.uint64))
    assert np.flatnonzero(marks).tolist() == [3, 5, 6]
    assert not repeated(np.zeros(0, np.uint64)).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_caption": 5, "max_caption": 4}, "min_caption=5 and max_caption=4 leave nothing"),
        ({"score_column": "x", "min_score": 1.0, "max_score": 0.0}, "leave nothing"),
        ({"min_score": 0.3}, "need score_column"),
    ],
)
def test_wrong_config(wrong, message):
    with pytest.raises(ValueError, match=message):
        FilterConfig(**wrong)
    assert FilterConfig(score_column="x", min_score=0.3).max_score == math.inf
