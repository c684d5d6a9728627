"""Tars: what an index holds, what is refused and why, and what a block reads."""

import itertools
import json
import tarfile
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.data.augment import Augmentation
from clip_jax.data.reinforced import Reinforcement, to_features, to_members
from clip_jax.data.sources import SampleError, tar_index
from clip_jax.data.sources.array_record import ArrayRecordConfig, ArrayRecordSource, encode_example
from clip_jax.data.sources.shards import warn_once
from clip_jax.data.sources.tar import TarConfig, TarSource
from clip_jax.data.sources.tar_members import IMAGES, TEXTS, members
from clip_jax.errors import InputError
from clip_jax.storage import files
from tests.clock import HandClock
from tests.data.conftest import outcome, write_records, write_tar

RNG = np.random.default_rng(0)


def pair(name, image=b"image", text=b"text"):
    return [(f"{name}.jpg", image), (f"{name}.txt", text)]


def open_tar(path, **fields):
    return TarSource(TarConfig(path=str(path), **fields))


def reason(source, index):
    return outcome(lambda: source.load(index, RNG))


FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("format", FORMATS)
def test_members_become_pairs_in_order_whatever_their_names(format, tmp_path):
    names = ["1", "d/2", "n" * 90, "folder/" * 15 + "x", "ü" * 40]
    if format != tarfile.USTAR_FORMAT:
        names.append("m" * 300)
    members = [member for name in names for member in pair(name, name.encode())]
    write_tar(tmp_path / "a.tar", members, format=format)
    extensions = ["JPEG", "png", "webp", "avif", "gif", "bmp", "tiff", "jp2", "ppm"]
    members = [*pair("1", b"1"), ("1.npy", b"not ours"), *pair("._1"), (".DS_Store", b"macOS's")]
    for name in extensions:
        members += [(f"{name}.txt", b"text"), (f"{name}.{name}", name.encode())]
    write_tar(tmp_path / "b.tar", members, format=format)
    source = open_tar(tmp_path / "*.tar")
    wanted = [*(f"a.tar:{name}" for name in names), *(f"b.tar:{x}" for x in ("1", *extensions))]
    assert [source.key(i) for i in range(len(source))] == [f"{tmp_path}/{x}" for x in wanted]
    images = [x.split(":")[1].encode() for x in wanted]
    assert [source.load(i, RNG) for i in range(len(source))] == [(x, "text") for x in images]


def test_captions_from_json_and_cls(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n", encoding="utf-8-sig")
    members = [("1.jpg", b"x"), ("1.json", json.dumps({"alt": ["a", "b"]}).encode())]
    members += [("1.cls", b"0\n"), ("2.jpg", b"x"), ("2.json", b"[1]"), ("2.cls", b"7")]
    write_tar(tmp_path / "a.tar", members)
    source = open_tar(tmp_path / "a.tar", caption="json", caption_key="alt")
    drawn = {source.load(0, np.random.default_rng(i))[1] for i in range(20)}
    assert drawn == {"a", "b"}
    assert reason(source, 1) == ".json is a list, not an object"
    assert open_tar(tmp_path / "a.tar", caption="cls").load(0, RNG)[1] == "0"
    named = open_tar(tmp_path / "a.tar", caption="cls", class_names=str(tmp_path / "names.txt"))
    assert named.load(0, RNG)[1] == "cat"
    assert reason(named, 1) == ".cls is '7', not a number below 2"


def test_missing_members_and_bad_text_are_samples_with_a_reason(tmp_path):
    members = [("1.jpg", b"x"), ("2.txt", b"x"), ("3.jpg", b"x"), ("3.txt", b"\xff")]
    members += [("4.jpg", b"x"), *pair("4", b"y")]  # two images of one name are two samples
    write_tar(tmp_path / "a.tar", members)
    source = open_tar(tmp_path / "a.tar")
    assert len(source) == 5
    assert reason(source, 0) == reason(source, 3) == "no .txt member"
    assert reason(source, 1).startswith("no .jpg/.jpeg")
    assert reason(source, 2).startswith("caption is not UTF-8")
    assert source.load(4, RNG) == (b"y", "text")


def test_members_of_other_endings_are_counted(tmp_path, caplog):
    """Those whose names have dots of their own, too."""
    write_tar(tmp_path / "a.tar", [*pair("1"), *pair("a.b"), ("1.seg.png", b"another stream")])
    write_tar(tmp_path / "b.tar", [*pair("2"), ("2.npy", b""), ("d.ir/3.jpg", b"x")])
    for _ in range(2):  # from the tars, and from the index
        caplog.clear()
        warn_once.cache_clear()
        assert len(open_tar(tmp_path / "*.tar")) == 3
        assert "4 members of 2 shards, such as a.b.jpg, are ignored" in caplog.text


def test_of_a_photo_and_a_mask_the_photo_counts(tmp_path):
    members = [("1.jpg", b"photo"), ("1.tif", b"mask"), ("1.txt", b"text")]
    members += [("2.bmp", b"mask"), ("2.jpg", b"photo"), ("2.txt", b"text")]
    write_tar(tmp_path / "a.tar", members)
    source = open_tar(tmp_path / "a.tar")
    assert [source.load(i, RNG) for i in range(len(source))] == [(b"photo", "text")] * 2


def test_a_size_of_thousands_of_digits_and_gzip_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as file:
        member = tarfile.TarInfo("1.jpg")
        member.pax_headers = {"size": "9" * 5000}
        file.addfile(member)
    with pytest.raises(InputError, match="size in an extended header is not a number"):
        open_tar(tmp_path / "a.tar")
    tarfile.open(tmp_path / "packed.tar", "w:gz").close()
    with pytest.raises(InputError, match=r"packed\.tar .*gzip, which has no random access"):
        open_tar(tmp_path / "packed.tar")


@pytest.mark.parametrize("size", [0, 511, 2**33, 2**36, 2**45])
def test_members_of_any_size_are_passed_by(size):
    """Above 8 GiB, the size stands in an extended header."""
    content, at = {}, 0
    for name, length in (("1.bin", size), ("1.jpg", 3)):
        member = tarfile.TarInfo(name)
        member.size = length
        content[at] = member.tobuf(tarfile.PAX_FORMAT)
        at += len(content[at]) + -(-length // 512) * 512
    content[at] = bytes(1024)

    def read(offset, count):
        begin = max(x for x in content if x <= offset)
        return content[begin][offset - begin :][:count].ljust(count, b"\0")

    listed = [*members(read, 0, at + 1024, at + 1024, 512)]
    assert [(member.name, member.size) for member in listed] == [(b"1.bin", size), (b"1.jpg", 3)]


def test_missing_and_truncated_shards_are_named_or_skipped(tmp_path, caplog):
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", pair("a", b"x" * 3000) + pair("b"))
    (tmp_path / "1.tar").unlink()
    pattern = tmp_path / "{0..3}.tar"
    with pytest.raises(ValueError, match=r"1 shards of .* are missing: .*1\.tar.*bad_shards=skip"):
        open_tar(pattern)
    whole = (tmp_path / "2.tar").read_bytes()
    for size in (100, 512, 1000, 4096, 4608):
        (tmp_path / "2.tar").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"2\.tar \(truncated"):
            open_tar(tmp_path / "{0,2,3}.tar")
    assert len(open_tar(pattern, bad_shards="skip")) == 4
    assert "1.tar; skipped" in caplog.text
    assert "2.tar (truncated" in caplog.text
    (tmp_path / "2.tar").write_bytes(whole[:600] + b"\xff" * 3000 + whole[3600:])
    with pytest.raises(ValueError, match=r"2\.tar \(damaged: no tar header at byte 3584"):
        open_tar(tmp_path / "2.tar")


def test_files_of_img2dataset_count_the_samples_and_score_them_by_name(tmp_path):
    write_tar(tmp_path / "0.tar", pair("a") + pair("b") + pair("c"))
    rows = {"key": ["c", "a", "d", "e", "f"], "score": [0.5, 0.25, 1, 1, 1]}
    status = pa.array(["success"] * 4 + ["failed"])
    pq.write_table(pa.table(rows).append_column("status", status), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match="has 3 samples, but img2dataset counted 4"):
        open_tar(tmp_path / "0.tar")
    (tmp_path / "0_stats.json").write_text('{"successes": 3}')
    np.testing.assert_array_equal(open_tar(tmp_path / "0.tar").scores("score"), [0.25, np.nan, 0.5])


@pytest.fixture
def indexed():
    """A function: the shards whose headers were read, in turn."""
    read = tar_index.index_shard
    with mock.patch.object(tar_index, "index_shard", autospec=True, side_effect=read) as function:
        yield lambda: [call.args[0] for call in function.call_args_list]


def test_the_index_is_built_once_and_follows_changes(tmp_path, indexed):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", pair("a", b"old"))
    index_folder = tmp_path / "elsewhere"
    for _ in range(2):
        assert len(open_tar(tmp_path / "{0..2}.tar", index=str(index_folder))) == 3
    assert len(indexed()) == 3
    write_tar(tmp_path / "1.tar", pair("a", b"new") + pair("b"))
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:700])
    for _ in range(2):  # a bad one is read each time
        with pytest.raises(InputError, match=r"1\.tar \(truncated"):
            open_tar(tmp_path / "{0..2}.tar", index=str(index_folder))
    (tmp_path / "1.tar").write_bytes(whole)
    source = open_tar(tmp_path / "{0..2}.tar", index=str(index_folder))
    assert (len(source), source.load(1, RNG)[0]) == (4, b"new")
    assert indexed()[3:] == [f"{tmp_path}/1.tar"] * 3
    (summary,) = index_folder.glob("*.arrow")
    rows = sorted(index_folder.glob("*/*.arrow"))
    assert len(rows) == 3
    for file in (summary, rows[2]):
        file.write_bytes(file.read_bytes()[:-100])  # not whole: built again
    assert len(open_tar(tmp_path / "{0..2}.tar", index=str(index_folder))) == 4
    assert indexed()[6:] == [f"{tmp_path}/2.tar"]
    other = tar_index._SHARDS.with_metadata({b"endings": b"jpg txt"})  # of what is read
    with (
        mock.patch.object(tar_index, "_SHARDS", other),
        mock.patch.object(tar_index, "_ENDINGS", other.metadata),
    ):
        open_tar(tmp_path / "{0..2}.tar", index=str(index_folder))
    assert len(indexed()) == 7 + 3


@pytest.mark.parametrize(
    ("format", "caption"), [*zip(FORMATS, ("txt", "json", "txt"), strict=True)]
)
@mock.patch.object(tar_index, "_BLOCK_BYTES", 20_000)
def test_a_block_holds_what_its_samples_are(format, caption, tmp_path):
    """Read in one go, whole or in part, samples are as those read one by one, faults included."""
    long = "m" * 120 if format != tarfile.USTAR_FORMAT else "m"
    for shard in range(2):
        members = [("readme.md", b"x" * 700)]
        for i in range(20):
            fields = json.dumps({"caption": [f"{shard}", f"{i}"]}).encode()
            members += [(f"{long}{i}.npy", b"z"), (f"{long}{i}.json", fields)]
            members += pair(f"{long}{i}", bytes([i]) * (1 + 300 * i), f"{shard} {i}".encode())
            members += [(f"only-{i}.jpg", b"y")] * (i % 7 == 0)
        write_tar(tmp_path / f"{shard}.tar", members, format=format)
    source = open_tar(tmp_path / "*.tar", caption=caption)
    counts = source.blocks()
    assert counts.sum() == len(source)
    assert len(counts) >= 8
    spans = [*itertools.pairwise([0, *np.cumsum(counts).tolist()])]
    spans += [(first + 1, last) for first, last in spans if last - first > 1]
    for first, last in spans:
        for index, record in zip(range(first, last), source.fetch(first, last), strict=True):
            assert record.key == source.key(index)
            rngs = [np.random.default_rng(index) for _ in range(2)]
            wanted = outcome(lambda: source.load(index, rngs[0]))  # noqa: B023
            assert wanted == outcome(lambda: record.load(rngs[1]))  # noqa: B023
    assert source.size(0, len(source)) == sum(source.size(*span) for span in spans[: len(counts)])


@pytest.mark.parametrize(("is_remote", "size"), [(False, 2_000), (True, 200_000)])
def test_an_index_reads_little_of_a_bucket_and_seldom_from_a_disk(is_remote, size, tmp_path):
    """In a bucket bytes are what costs, on a disk the calls."""
    path, count = tmp_path / "a.tar", 100_000 // size + 20
    write_tar(path, [member for i in range(count) for member in pair(f"{i}", bytes(size))])
    read = []

    def read_ranges(path, ranges):
        read.extend(size for _, size in ranges)
        return files.read_ranges(path, ranges)

    storage = SimpleNamespace(
        read_ranges=read_ranges, is_remote=lambda _: is_remote, open_file=files.open_file
    )
    with mock.patch.object(tar_index, "files", storage):
        rows, _ = tar_index.index_shard(str(path), path.stat().st_size)
    assert len(rows) == count
    if is_remote:
        assert sum(read) <= 4_096 * (count + 2)
    else:
        assert len(read) <= path.stat().st_size / 2**16 + 3


def reinforce(number):
    """What a sample of this number has beside its pair."""
    augmentations = (Augmentation((0, 0, 1 + number, 1), None, ((1, 0.1),)),)
    row = np.full((1, 8), number + 1, np.float32)
    return Reinforcement(augmentations, 8, row, (f"synthetic {number}",), row, row)


@pytest.fixture
def reinforced(tmp_path):
    """Three shards, of which the second has plain pairs."""
    for shard in range(3):
        members = []
        for number in range(10):
            key = f"{number}" if number < 5 else "m" * 120 + f"{number}"
            more = to_members(reinforce(number)) if shard != 1 else {}
            more = [(f"{key}.{name}", content) for name, content in more.items()]
            members += [*more[: number % 4], *pair(key), *more[number % 4 :]]
            members += [(f"alone{number}.npz", b"of nothing")] * (number % 3 == 0)
        write_tar(tmp_path / f"{shard}.tar", members)
    return tmp_path


def test_members_of_reinforced_samples_are_read_alone_and_in_blocks(reinforced):
    """The same as from ArrayRecords."""
    examples = [
        encode_example({"image": [b"image"], "caption": [b"text"], "key": [b"key"]} | features)
        for features in (to_features(reinforce(i), "float16", (4, 4)) for i in range(10))
    ]
    write_records(reinforced / "x.array_record", "group_size:1", examples)
    records = ArrayRecordSource(ArrayRecordConfig(path=str(reinforced / "x.array_record")))
    source = open_tar(reinforced / "{0..2}.tar")
    assert len(source) == 30
    for first, last in ((0, 10), (10, 20), (20, 30), (3, 7), (28, 30), (14, 16)):
        for index, record in zip(range(first, last), source.fetch(first, last), strict=True):
            assert record.load(RNG) == source.load(index, RNG) == (b"image", "text")
            expected = reinforce(index % 10)
            for one in (record.more(), source.record(index).more()):
                if 10 <= index < 20:
                    assert one is None
                    continue
                for other in (expected, records.record(index % 10).more()):
                    assert (one.augmentations, one.size) == (other.augmentations, other.size)
                    assert one.synthetic == other.synthetic
                    for name in ("image", "text", "synthetic_text"):
                        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_an_index_without_reinforced_samples_is_built_again(reinforced, indexed):
    """Where an earlier version ignored their members; that of plain shards stays as small."""
    endings = " ".join((*IMAGES, *TEXTS)).encode()
    older = tar_index._SHARDS.with_metadata({b"endings": endings})
    with (
        mock.patch.object(tar_index, "_SHARDS", older),
        mock.patch.object(tar_index, "_ENDINGS", older.metadata),
    ):
        open_tar(reinforced / "{0..2}.tar")
    assert open_tar(reinforced / "{0..2}.tar").record(3).more() is not None
    assert len(indexed()) == 6
    rows = [pa.ipc.open_file(file).schema.names for file in sorted(reinforced.glob("*/*.arrow"))]
    assert [x[-2:] for x in rows] == [["start", "end"], ["cls_offset", "cls_size"], rows[0][-2:]]


def test_a_shard_that_changed_is_bad_samples(tmp_path):
    path = tmp_path / "0.tar"
    write_tar(path, [m for i in range(4) for m in pair(f"{i}", b"x" * 999)])
    source = open_tar(path)
    write_tar(path, [m for i in range(4) for m in pair(f"{i}")] + pair("5", b"y" * 9999))
    with pytest.raises(SampleError, match="shard changed: truncated"):
        source.fetch(0, 4)
    path.write_bytes(b"x" * 20_000)
    with pytest.raises(SampleError, match="no tar header"):
        source.fetch(0, 4)
    path.unlink()
    with pytest.raises(SampleError, match="No such file"):
        source.fetch(0, 4)


def test_processes_share_the_building_of_an_index(tmp_path, indexed, caplog):
    """Each indexes its shards of a bucket, and waits for the others'."""
    for i in range(5):
        write_tar(tmp_path / f"{i}.tar", pair("a") + pair("b"))
    pattern = f"{tmp_path}/{{0..4}}.tar"
    clock = HandClock()

    def sleep(seconds):
        if clock.now() < 1_061:
            clock.advance(61)
        else:  # the other process does its part
            assert tar_index.open_index(pattern, "", "error", (0, 2), wait=False)

    remote = SimpleNamespace(**vars(files) | {"is_remote": lambda path: True})
    with (
        mock.patch.object(tar_index, "files", remote),
        mock.patch.object(tar_index, "CLOCK", clock),
        mock.patch.object(clock, "sleep", autospec=True, side_effect=sleep),
    ):
        assert tar_index.open_index(pattern, "", "error", (1, 2), wait=False) is None
        assert sorted(indexed()) == [f"{tmp_path}/{i}.tar" for i in (1, 3)]
        index = tar_index.open_index(pattern, "", "error", (1, 2))
    assert index
    assert len(index.places) == 10
    assert sorted(indexed()) == [f"{tmp_path}/{i}.tar" for i in range(5)]
    assert "waiting for 3 shards of other workers" in caplog.text
