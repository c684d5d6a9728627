"""Parquet, Arrow, ArrayRecord, TFDS and folders: what is refused, what is a bad sample."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.data.sources import SampleError, StoredSource
from clip_jax.data.sources.any import PathConfig, open_single
from clip_jax.data.sources.array_record import (
    ArrayRecordConfig,
    ArrayRecordSource,
    decode_example,
    encode_example,
)
from clip_jax.data.sources.folder import FolderConfig, FolderSource
from clip_jax.data.sources.parquet import ParquetConfig, ParquetSource
from clip_jax.data.sources.saved_dataset import SavedDatasetConfig, SavedDatasetSource
from clip_jax.data.sources.tfds import TfdsConfig, TfdsSource

from .. import formats

PAIRS = [(f"{i}.jpg", b"image %d" % i, f"text {i}") for i in range(50)]
OPEN = {
    "parquet": (ParquetConfig, ParquetSource),
    "array_record": (ArrayRecordConfig, ArrayRecordSource),
    "saved_dataset": (SavedDatasetConfig, SavedDatasetSource),
    "images_beside": (FolderConfig, FolderSource),
    "tfds": (TfdsConfig, TfdsSource),
}


@pytest.mark.parametrize("name", ["parquet", "array_record", "saved_dataset"])
def test_every_row_has_its_own_key(name, tmp_path):
    source = OPEN[name][1](formats.FORMATS[name](tmp_path, PAIRS))
    assert [source.load(i, np.random.default_rng(0)) for i in range(50)] == [
        (image, text) for _, image, text in PAIRS
    ]
    assert len({source.key(i) for i in range(50)}) == 50


@pytest.mark.parametrize("name", OPEN)
def test_nothing_there(name, tmp_path):
    config, source = OPEN[name]
    with pytest.raises(ValueError, match=r"data\.source\.path"):
        source(config(path=str(tmp_path / "none")))


@pytest.mark.parametrize("name", ["parquet", "saved_dataset"])
def test_missing_columns_name_those_found(name, tmp_path):
    config, source = OPEN[name]
    path = formats.FORMATS[name](tmp_path, PAIRS).path
    with pytest.raises(ValueError, match=r"no column 'jpg', only 'image', 'caption'.*image_column"):
        source(config(path=path, image_column="jpg"))


def test_several_captions_and_bad_cells(tmp_path):
    rows = {
        "image": [b"x", None, b"x", b"x"],
        "caption": [["one", "two"], ["x"], [], None],
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = ParquetSource(ParquetConfig(path=str(tmp_path / "a.parquet")))
    assert {source.load(0, np.random.default_rng(i))[1] for i in range(20)} == {"one", "two"}
    for row, reason in enumerate(("image is missing", "the list is empty", "caption is missing")):
        with pytest.raises(SampleError, match=reason):
            source.load(row + 1, np.random.default_rng(0))


@pytest.mark.parametrize(("name", "cut"), [("parquet", 7), ("array_record", 70_000)])
def test_a_truncated_shard_is_named_or_skipped(name, cut, tmp_path, caplog):
    config, source = formats.FORMATS[name](tmp_path, PAIRS), OPEN[name][1]
    whole = len(source(config))
    path = tmp_path / f"1.{name}"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=rf"1 shards of .*/1\.{name} \(.*bad_shards to skip"):
        source(config)
    skipping = source(dataclasses.replace(config, bad_shards="skip"))
    assert 0 < len(skipping) < whole
    assert f"1.{name} (" in caplog.text
    for index in range(len(skipping)):
        text = skipping.load(index, np.random.default_rng(0))[1]
        assert text in {text for _, _, text in PAIRS}
        assert f"/1.{name}:" not in skipping.key(index)
    path.unlink()
    there = dataclasses.replace(config, path=str(tmp_path / f"{{0,1}}.{name}"))
    with pytest.raises(ValueError, match=rf"1\.{name} \("):
        source(there)


def test_parquet_in_a_bucket(tmp_path):
    import fsspec

    formats.parquet(tmp_path, PAIRS)
    memory = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        memory.pipe(f"/parquet/{path.name}", path.read_bytes())
    source = open_single(PathConfig(path="memory://parquet/*.parquet"), 1)
    assert len(source) == 50
    assert source.load(49, np.random.default_rng(0)) == (b"image 49", "text 49")


def test_images_and_all_captions_of_every_format(tmp_path):
    for name, write in formats.FORMATS.items():
        (tmp_path / name).mkdir()
        source = open_single(write(tmp_path / name, PAIRS[:3]), 1)
        assert isinstance(source, StoredSource), name
        assert [(source.image(i), source.captions(i)) for i in range(3)] == [
            (image, [text]) for _, image, text in PAIRS[:3]
        ]


def test_of_several_splits_one_must_be_chosen(tmp_path):
    (tmp_path / "train").mkdir()
    formats.saved_dataset(tmp_path / "train", PAIRS)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    with pytest.raises(
        ValueError, match=r"several splits; set data\.source\.path to one of .*train"
    ):
        SavedDatasetSource(SavedDatasetConfig(path=str(tmp_path)))


def test_images_without_a_text_are_samples_with_a_reason(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/1.PNG").write_bytes(b"x")
    (tmp_path / "a.jpg").write_bytes(b"y")
    (tmp_path / "a.txt").write_bytes(b"text")
    source = FolderSource(FolderConfig(path=str(tmp_path)))
    assert [source.key(i) for i in range(len(source))] == ["a.jpg", "b/1.PNG"]
    assert source.load(0, np.random.default_rng(0)) == (b"y", "text")
    with pytest.raises(SampleError, match=r"\.txt: No such file"):
        source.load(1, np.random.default_rng(0))


def test_examples_are_those_of_tensorflow():
    """Bytes by hand from example.proto: Example{1: Features{1: map entry{1: key, 2: Feature}}}."""
    entry = b"\x0a\x01k" + b"\x12\x05" + b"\x0a\x03" + b"\x0a\x01v"
    expected = b"\x0a" + bytes([len(entry) + 2]) + b"\x0a" + bytes([len(entry)]) + entry
    assert encode_example({"k": [b"v"]}) == expected
    assert decode_example(expected) == {"k": [b"v"]}
    with pytest.raises(ValueError, match="not a tf"):
        decode_example(b"\xff\xff")
