"""The same pairs in every format are the same samples; what is refused, what is a bad sample;
mutated files."""

import dataclasses
import itertools
import json
import os
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.data.batch_plan import BatchKind
from clip_jax.data.pipeline import DataConfig, _Loader
from clip_jax.data.sources import BlockSource, SampleError, StoredSource
from clip_jax.data.sources.any import (
    PathConfig,
    SingleConfig,
    _by_suffix,
    open_images,
    open_single,
)
from clip_jax.data.sources.array_record import ArrayRecordConfig, decode_example, encode_example
from clip_jax.data.sources.image_folder import FolderConfig, FolderSource
from clip_jax.data.sources.parquet import ParquetConfig, ParquetSource
from clip_jax.data.sources.saved_dataset import SavedDatasetConfig, SavedDatasetSource
from clip_jax.data.sources.tfds import TfdsBucketSource, TfdsConfig
from clip_jax.errors import InputError
from clip_jax.evals.datasets import open_folder
from clip_jax.models.images import Square
from tests.data.conftest import COLUMNS, FORMATS, make_pairs

PAIRS = [(f"{i:02d}.jpg", b"image %d" % i, f"text {i}") for i in range(80)]
RNG = np.random.default_rng(0)
BLOCKS = {  # of formats whose records lie together: each shard, or its row groups
    "tar": [27, 27, 26],
    "tar_json": [40, 40],
    "parquet": [30, 10, 30, 10],
    "img2dataset": [80],
    "array_record": [27, 27, 26],
}


@pytest.mark.parametrize("format", FORMATS)
def test_pairs_are_the_same_samples_in_every_format(format, tmp_path):
    config = FORMATS[format](tmp_path, PAIRS)
    expected = [(image, text) for _, image, text in PAIRS]
    for one in (config, PathConfig(path=config.path, **COLUMNS.get(format, {}))):
        source = open_single(one, 16)
        assert isinstance(source, StoredSource)
        assert [source.load(i, RNG) for i in range(len(source))] == expected
    assert [(source.image(i), *source.record(i).captions()) for i in range(80)] == expected
    assert len({source.key(i) for i in range(80)}) == 80
    assert isinstance(source, BlockSource) == (format in BLOCKS)
    if isinstance(source, BlockSource):
        assert source.blocks().tolist() == BLOCKS[format]
        spans = [*itertools.pairwise([0, *np.cumsum(BLOCKS[format]).tolist()])]
        sizes = [source.size(*span) for span in spans]
        assert min(sizes) > 0
        assert sum(sizes) == source.size(0, 80)
        for first, last in [*spans, *((first + 2, last - 3) for first, last in spans)]:
            records = source.fetch(first, last)
            assert [record.load(RNG) for record in records] == expected[first:last]
            assert [record.key for record in records] == [*map(source.key, range(first, last))]


def test_a_tfds_set_in_a_bucket_that_is_no_array_record_is_refused(tmp_path):
    config = FORMATS["tfds"](tmp_path, PAIRS[:3])
    info = Path(config.path) / "dataset_info.json"
    info.write_text(re.sub("array_?record", "parquet", info.read_text()))
    with pytest.raises(InputError, match=r"is stored as parquet; in a bucket only array_record"):
        TfdsBucketSource(config)


# ------------------------------------------------------------------ refused, or a bad sample


@pytest.mark.parametrize(
    "kind", [ParquetConfig, ArrayRecordConfig, SavedDatasetConfig, FolderConfig, TfdsConfig]
)
def test_nothing_there(kind, tmp_path):
    with pytest.raises(ValueError, match=r"^data\.source: .*none"):
        open_single(kind(path=str(tmp_path / "none")), 16)


@pytest.mark.parametrize("name", ["parquet", "saved_dataset"])
def test_missing_columns_name_those_found(name, tmp_path):
    config = dataclasses.replace(FORMATS[name](tmp_path, PAIRS), image_column="jpg")
    with pytest.raises(ValueError, match=r"no column 'jpg', only 'image', .*; set image_column to"):
        open_single(config, 16)


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"_data_files": [{}]}', '{"_data_files": 3}'])
def test_foreign_states_of_save_to_disk_and_several_splits_are_refused(state, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/state.json").write_text(state)
    with pytest.raises(InputError, match="not a usable folder of save_to_disk"):
        SavedDatasetSource(SavedDatasetConfig(path=str(tmp_path / "train")))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    with pytest.raises(InputError, match=r"several splits; give one of .*train"):
        SavedDatasetSource(SavedDatasetConfig(path=str(tmp_path)))


def test_several_captions_and_bad_cells(tmp_path):
    captions = [["one", "two"], ["x"], [], None]
    rows = {"image": [b"x", None, b"x", b"x"], "caption": captions}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = ParquetSource(ParquetConfig(path=str(tmp_path / "a.parquet")))
    assert {source.load(0, np.random.default_rng(i))[1] for i in range(20)} == {"one", "two"}
    for row, reason in enumerate(("image is missing", "the list is empty", "caption is missing")):
        with pytest.raises(SampleError, match=reason):
            source.load(row + 1, RNG)


@pytest.mark.parametrize(
    ("name", "lost"), [("parquet", range(40, 80)), ("array_record", range(27, 54))]
)
def test_a_truncated_shard_is_named_with_its_reason_or_skipped(name, lost, tmp_path, caplog):
    config = FORMATS[name](tmp_path, PAIRS)
    path = tmp_path / f"1.{name}"
    content, good = path.read_bytes(), [f"text {i}" for i in range(80) if i not in lost]
    for size in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        message = rf"1 shards of .*/1\.{name} \(.*\w{{3}}.*\).*with bad_shards=skip"
        with pytest.raises(InputError, match=message):
            open_single(config, 16)
        skipping = open_single(dataclasses.replace(config, bad_shards="skip"), 16)
        assert [skipping.load(i, RNG)[1] for i in range(len(skipping))] == good
    assert f"1.{name} (" in caplog.text
    path.unlink()
    there = dataclasses.replace(config, path=str(tmp_path / f"{{0,1}}.{name}"))
    with pytest.raises(InputError, match=rf"1\.{name} \("):
        open_single(there, 16)


def test_each_ending_belongs_to_one_format():
    """Of two formats that claim an ending, the last one would read the other's files."""
    kinds = get_args(SingleConfig)
    endings = [suffix for kind in kinds for suffix in getattr(kind, "suffixes", ())]
    assert len(endings) == len(set(endings)) == len(_by_suffix(kinds)) >= 9
    second = type("SecondConfig", (), {"suffixes": (".new", ".tgz")})
    with pytest.raises(InputError, match=r"TarConfig and SecondConfig both open .* in \.tgz"):
        _by_suffix([*kinds, second])


def test_images_without_a_text_and_pipes_are_samples_with_a_reason(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/1.PNG").write_bytes(b"x")
    (tmp_path / "a.jpg").write_bytes(b"y")
    (tmp_path / "a.txt").write_bytes(b"text")
    os.mkfifo(tmp_path / "c.jpg")
    source = FolderSource(FolderConfig(path=str(tmp_path)))
    assert [source.key(i) for i in range(len(source))] == ["a.jpg", "b/1.PNG", "c.jpg"]
    assert source.load(0, RNG) == (b"y", "text")
    with pytest.raises(SampleError, match=r"caption file .*: No such file"):
        source.load(1, RNG)
    with pytest.raises(SampleError, match=r"\.jpg: a pipe or a device"):
        source.image(2)


def test_class_folders_are_captioned_by_templates_and_their_names(tmp_path):
    for name in ("red_fox/0.png", "cat/b/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    config = PathConfig(path=str(tmp_path), templates=("a photo of a {}", "a {}"))
    source = FolderSource(FolderConfig(path=str(tmp_path), templates=config.templates))
    assert source.record(0).captions() == ["a photo of a cat", "a cat"]
    assert source.record(1).captions() == ["a photo of a red fox", "a red fox"]
    assert {source.load(1, np.random.default_rng(i))[1] for i in range(9)} == {
        *source.record(1).captions()
    }
    (tmp_path / "classnames.txt").write_text("tabby\nvulpes\n")
    assert open_single(config, 16).load(1, RNG)[1].endswith("a vulpes")
    (tmp_path / "classnames.txt").write_text("tabby\n")
    with pytest.raises(InputError, match="has 1 lines for 2 class folders"):
        open_single(config, 16)
    (tmp_path / "loose.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"loose\.png is in no class folder"):
        open_single(config, 16)
    with pytest.raises(InputError, match=r"templates='a cat' has no \{\}"):
        FolderConfig(path=str(tmp_path), templates=("a cat",))
    without = FolderSource(FolderConfig(path=str(tmp_path)))
    with pytest.raises(SampleError, match=r"need --data\.source\.templates in training; prepare"):
        without.load(0, RNG)
    with pytest.raises(InputError, match="does not take templates"):
        open_single(dataclasses.replace(config, path="pairs.csv"), 16)


def test_splits_or_a_file_in_the_position_of_class_folders_are_refused(tmp_path):
    for name in ("pets/test/cat/0.png", "pets/train/cat/1.png", "vehicles/train/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    config = FolderConfig(path=str(tmp_path / "pets"), templates=("a {}",))
    with pytest.raises(InputError, match=r"has the splits test, train, .* such as .*pets/train"):
        FolderSource(config)
    vehicles = dataclasses.replace(config, path=str(tmp_path / "vehicles"))
    assert FolderSource(vehicles).classes == ("train",)
    with pytest.raises(InputError, match=r"0\.png is not a folder, .* such as pairs"):
        FolderSource(FolderConfig(path=str(tmp_path / "pets/test/cat/0.png")))
    with pytest.raises(InputError, match="there is no folder nowhere"):
        FolderSource(FolderConfig(path="nowhere"))


def test_all_readers_take_the_same_files_for_images_and_count_the_others(tmp_path, caplog):
    """Dot files, which macOS puts beside each file, are neither."""
    images = ["0.JPG", "1.gif", "2.tiff", "3.jp2", "4.ppm"]
    wanted = [f"{folder}/{name}" for folder in "ab" for name in images]
    for name in (*images, "._0.JPG", ".DS_Store", "a.heic", "b.HEIC", "README", "0.txt"):
        for folder in (tmp_path / "a", tmp_path / "b"):
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x")
    for source in (FolderSource(FolderConfig(path=str(tmp_path))), open_images(str(tmp_path))):
        assert [source.key(i) for i in range(len(source))] == wanted
    assert "6 files in" in caplog.text
    assert "4 .heic, 2 without" in caplog.text
    assert list(open_folder(tmp_path)) == [(tmp_path / x, int(x[0] == "b")) for x in wanted]


def test_examples_are_those_of_tensorflow():
    """Bytes by hand from example.proto: Example{1: Features{1: map entry{1: key, 2: Feature}}}."""
    entry = b"\x0a\x01k" + b"\x12\x05" + b"\x0a\x03" + b"\x0a\x01v"
    expected = b"\x0a" + bytes([len(entry) + 2]) + b"\x0a" + bytes([len(entry)]) + entry
    assert encode_example({"k": [b"v"]}) == expected
    assert decode_example(expected) == {"k": [b"v"]}
    with pytest.raises(SampleError, match="no tf"):
        decode_example(b"\xff\xff")


# ------------------------------------------------------------------ mutated files


IMAGES = ("jpg", "png", "webp")
CASES = ("tar", "table", "parquet", *IMAGES)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Change, cut out or repeat bytes, or now and then cut off the rest."""
    for _ in range(rng.integers(1, 6)):
        at, size = int(rng.integers(len(data) or 1)), int(rng.integers(1, 64))
        changed = ((1, rng.bytes(1)), (8, b"\xff" * 8), (size, b""), (0, data[at : at + size]))
        removed, new = (*changed, (len(data), b""))[rng.choice(5, p=[0.24] * 4 + [0.04])]
        data = data[:at] + new + data[at + removed :]
    return data


@pytest.mark.parametrize("case", CASES)
def test_mutated_files(case, tmp_path):
    """Containers, or images in a sound one: a set is refused with its name, or a sample skipped."""
    pairs = make_pairs(6)
    config = FORMATS["images_beside" if case in IMAGES else case](tmp_path, pairs)
    suffix = {"table": "csv"}.get(case, case)
    files = {path: path.read_bytes() for path in sorted(tmp_path.glob(f"*.{suffix}"))}
    messages, skips = [], 0
    for number in range(48):
        rng = np.random.default_rng([CASES.index(case), number])
        path = list(files)[number % len(files)]
        path.write_bytes(mutate(files[path], rng))
        try:
            load = _Loader(DataConfig(source=config), 16)
            samples = [
                load(i, i % len(load.source), BatchKind(8, Square(16))) for i in range(len(pairs))
            ]
        except InputError as error:
            messages.append(str(error))
        else:
            skipped = [event for sample in samples for event in sample.skipped]
            assert all(event["key"] and event["reason"] for event in skipped)
            assert all(sample.arrays["image"].shape == (1, 16, 16, 3) for sample in samples)
            skips += bool(skipped)
        path.write_bytes(files[path])
    assert len(messages) + skips > 6
    assert all(str(tmp_path) in one or "samples in a row" in one for one in messages)


def test_a_pipe_in_the_place_of_a_file_is_refused_without_opening_it(tmp_path):
    """To open one would wait for a writer."""
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    for name in ("a.arrow", "a.parquet"):
        os.mkfifo(tmp_path / name)
    for open_source in (
        lambda: SavedDatasetSource(SavedDatasetConfig(path=str(tmp_path))),
        lambda: ParquetSource(ParquetConfig(path=str(tmp_path / "a.parquet"))),
    ):
        with pytest.raises(InputError, match=r"a pipe or a device, not a file: .*a\."):
            open_source()
