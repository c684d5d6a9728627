"""The same pairs in every format are the same batches; what is refused, what is a bad sample;
mutated files."""

import dataclasses
import glob
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clip_jax import files
from clip_jax.data.pipeline import DataConfig, build
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
from clip_jax.data.tokenizers.clip import ClipTokenizer
from clip_jax.refused import Refused
from tests.data.conftest import FORMATS, make_pairs

TOKENIZER = ClipTokenizer(1024)


def read(config, steps, batch_size):
    pipeline = build(
        DataConfig(source=config),
        tokenizer=TOKENIZER,
        image_size=16,
        context_length=16,
        batch_size=batch_size,
    )
    batches = pipeline.batches(0)
    taken = list(itertools.islice(batches, steps))
    batches.close()
    return pipeline.num_samples, taken


@pytest.fixture(scope="module")
def reference(photographs, tmp_path_factory):
    pairs = make_pairs(photographs, 200)
    config = FORMATS["table"](tmp_path_factory.mktemp("table"), pairs)
    return pairs, read(config, 5, 100)


def assert_same(format, pairs, expected, folder, steps, batch_size):
    folder.mkdir()
    config = FORMATS[format](folder, pairs)
    count, batches = read(config, steps, batch_size)
    assert count == len(pairs) == expected[0]
    for wanted, found in zip(expected[1], batches, strict=True):
        for name in ("image", "text", "index"):
            assert getattr(wanted, name).tobytes() == getattr(found, name).tobytes(), name
        assert found.skipped == []
        seen = set(zip(found.index // count, found.keys, strict=True))
        assert len(seen) == len(found.keys)  # once an epoch


@pytest.mark.parametrize("format", FORMATS)
def test_two_hundred_pairs_are_the_same_batches_in_every_format(format, reference, tmp_path):
    assert_same(format, *reference, tmp_path / "set", 5, 100)


@pytest.mark.slow
def test_two_thousand_pairs_are_the_same_batches_in_every_format(photographs, tmp_path):
    pairs = make_pairs(photographs, 2000)
    (tmp_path / "reference").mkdir()
    expected = read(
        FORMATS["table"](tmp_path / "reference", pairs), 17, 256
    )  # some batches lie in two epochs
    for format in FORMATS:
        assert_same(format, pairs, expected, tmp_path / format, 17, 256)


def test_tfds_is_read_without_tensorflow(reference, tmp_path):
    config = FORMATS["tfds"](tmp_path, reference[0][:4])
    code = f"""
import sys, numpy
from clip_jax.data.sources.tfds import TfdsConfig, TfdsSource
source = TfdsSource(TfdsConfig(path={config.path!r}))
print(len(source), repr(source.load(0, numpy.random.default_rng(0))[1]))
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"4 {reference[0][0][2]!r}\n", done.stderr


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read_from_a_bucket(format, bucket, tmp_path):
    pairs = [(f"{i}.jpg", b"image %d" % i, f"text {i}") for i in range(10)]
    config = FORMATS[format](tmp_path, pairs)
    place = os.path.commonpath([config.path, str(tmp_path)])
    for path in files.walk(place):
        files.write_whole(f"{bucket.url}/set{path.removeprefix(place)}", files.read(path))
    remote = dataclasses.replace(config, path=config.path.replace(place, f"{bucket.url}/set"))
    rng = np.random.default_rng(0)
    named = {"caption_column": "caption"} if format == "tar_json" else {}
    if format == "img2dataset":
        named = {"image_column": "jpg"}
    for found in (remote, PathConfig(path=remote.path, **named)):
        source = open_single(found, 16)
        assert [source.load(i, rng) for i in range(len(source))] == [x[1:] for x in pairs]
        assert isinstance(source, StoredSource)
        assert source.captions(9) == ["text 9"]


def test_a_table_on_a_disk_names_images_in_a_bucket(bucket, tmp_path):
    files.write_whole(f"{bucket.url}/1.jpg", b"image")
    rows = f"image,caption\n{bucket.url}/1.jpg,one\n{bucket.url}/2.jpg,two\n"
    (tmp_path / "pairs.csv").write_text(rows)
    source = open_single(PathConfig(path=str(tmp_path / "pairs.csv")), 16)
    assert source.load(0, np.random.default_rng(0)) == (b"image", "one")
    with pytest.raises(SampleError, match=rf"image file: no such object: '{bucket.url}/2\.jpg'"):
        source.load(1, np.random.default_rng(0))


def test_a_tfds_set_in_a_bucket_that_is_no_array_record_is_refused(gs, tmp_path):
    config = FORMATS["tfds"](tmp_path, PAIRS[:3])
    for path in files.walk(config.path):
        content = files.read(path).replace(b'"array_record"', b'"parquet"')
        files.write_whole(f"{gs.url}/set/{os.path.basename(path)}", content)
    with pytest.raises(Refused, match=r"set is stored as parquet; in a bucket .* as array_record"):
        open_single(TfdsConfig(path=f"{gs.url}/set"), 16)


# ------------------------------------------------------------------ refused, or a bad sample


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
    source = OPEN[name][1](FORMATS[name](tmp_path, PAIRS))
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
    path = FORMATS[name](tmp_path, PAIRS).path
    with pytest.raises(ValueError, match=r"no column 'jpg', only 'image', 'caption'.*image_column"):
        source(config(path=path, image_column="jpg"))


def test_two_columns_of_one_name_are_refused(tmp_path):
    rows = pa.table([[b"x"], ["a"], ["b"]], names=["image", "caption", "caption"])
    pq.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(Refused, match=r"2 columns 'caption' among 'image', 'caption', 'caption'"):
        ParquetSource(ParquetConfig(path=str(tmp_path / "a.parquet")))


def test_the_reason_of_a_truncated_array_record_is_never_empty(tmp_path):
    path = FORMATS["array_record"](tmp_path, PAIRS).path
    file, *_ = sorted(glob.glob(path))
    whole = Path(file).read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        Path(file).write_bytes(whole[:size])
        with pytest.raises(Refused) as raised:
            ArrayRecordSource(ArrayRecordConfig(path=path))
        assert re.search(r"array_record \(.*\w{3}.*\)", str(raised.value)), raised.value


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"_data_files": [{}]}', '{"_data_files": 3}'])
def test_a_foreign_state_of_save_to_disk_is_refused(state, tmp_path):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(Refused, match="no usable folder of save_to_disk"):
        SavedDatasetSource(SavedDatasetConfig(path=str(tmp_path)))


def test_pipes_in_a_folder_are_bad_samples(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a text")
    with pytest.raises(SampleError, match=r"\.jpg: a pipe or a device"):
        FolderSource(FolderConfig(path=str(tmp_path))).image(0)


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
    config, source = FORMATS[name](tmp_path, PAIRS), OPEN[name][1]
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


def test_parquet_in_a_bucket(tmp_path, bucket):
    FORMATS["parquet"](tmp_path, PAIRS)
    files.copy_tree(tmp_path, files.place(bucket.url))
    source = open_single(PathConfig(path=f"{bucket.url}/*.parquet"), 1)
    assert len(source) == 50
    assert source.load(49, np.random.default_rng(0)) == (b"image 49", "text 49")


def test_images_and_all_captions_of_every_format(tmp_path):
    for name, write in FORMATS.items():
        (tmp_path / name).mkdir()
        source = open_single(write(tmp_path / name, PAIRS[:3]), 1)
        assert isinstance(source, StoredSource), name
        assert [(source.image(i), source.captions(i)) for i in range(3)] == [
            (image, [text]) for _, image, text in PAIRS[:3]
        ]


def test_of_several_splits_one_must_be_chosen(tmp_path):
    (tmp_path / "train").mkdir()
    FORMATS["saved_dataset"](tmp_path / "train", PAIRS)
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
    with pytest.raises(SampleError, match="no tf"):
        decode_example(b"\xff\xff")


# ------------------------------------------------------------------ mutated files


IMAGES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
CASES = ("tar", "table", "parquet", *IMAGES)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Change, cut out, repeat or cut off bytes."""
    content = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(len(content) or 1))
        match rng.integers(5):
            case 0:
                content[at : at + 1] = rng.bytes(1)
            case 1:
                content[at : at + 8] = b"\xff" * 8
            case 2:
                del content[at : at + int(rng.integers(1, 64))]
            case 3:
                content[at:at] = content[at : at + int(rng.integers(1, 64))]
            case _:
                if rng.random() < 0.2:
                    del content[at:]
    return bytes(content)


@pytest.fixture(scope="module")
def pairs(photographs):
    found = []
    for i, (name, image) in enumerate(photographs.items()):
        suffix = list(IMAGES)[i % 3]
        file = io.BytesIO()
        Image.fromarray(image[:32, :32]).save(file, IMAGES[suffix])
        found.append((f"{i}.{suffix}", file.getvalue(), f"a photo of {name}"))
    return found


def fuzz(case, count, pairs, folder):
    """Mutate a container, or images in a sound one, `count` times; how many did what."""
    folder.mkdir()
    format = FORMATS["images_beside" if case in IMAGES else case]
    config = format(folder, pairs)
    suffix = {"table": "csv"}.get(case, case)
    victims = {path: path.read_bytes() for path in sorted(folder.glob(f"*.{suffix}"))}
    assert victims
    outcomes: Counter[str] = Counter()
    for number in range(count):
        rng = np.random.default_rng([CASES.index(case), number])
        path = list(victims)[number % len(victims)]
        path.write_bytes(mutate(victims[path], rng))
        try:
            pipeline = build(
                DataConfig(source=config, threads=0, max_bad_share=1.0),
                tokenizer=TOKENIZER,
                image_size=16,
                context_length=8,
                batch_size=len(pairs),
            )
            batches = pipeline.batches(0)
            (batch,) = itertools.islice(batches, 1)
            batches.close()
        except ValueError as error:  # the set as a whole; with its name
            named = str(folder) in str(error) or "samples in a row" in str(error)
            outcomes["refused" if named else str(error)] += 1
        else:
            assert all(event["key"] and event["reason"] for event in batch.skipped)
            assert batch.image.shape == (len(pairs), 16, 16, 3)
            outcomes["skipped" if batch.skipped else "fine"] += 1
        path.write_bytes(victims[path])
    return outcomes


@pytest.mark.parametrize("case", CASES)
def test_five_hundred_mutated_files(case, pairs, tmp_path):
    outcomes = fuzz(case, 84, pairs, tmp_path / "set")
    assert sum(outcomes.values()) == 84
    assert outcomes.keys() <= {"refused", "skipped", "fine"}
    assert outcomes["refused"] + outcomes["skipped"] > 8


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES)
def test_ten_thousand_mutated_files(case, pairs, tmp_path):
    assert fuzz(case, 1_670, pairs, tmp_path / "set").keys() <= {"refused", "skipped", "fine"}
