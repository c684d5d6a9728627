"""Paths on disk and in buckets: the same calls, the same results, on real servers."""

import errno
import functools
import time
from pathlib import Path

import pytest

from clip_jax import bucket, files
from clip_jax.refused import Refused
from clip_jax.unreachable import Unreachable


@pytest.fixture(params=["disk", "gs", "s3"])
def folder(request, tmp_path):
    """An empty folder, as a person would write it."""
    if request.param == "disk":
        return str(tmp_path)
    return f"{request.getfixturevalue(request.param).url}/some/folder"


def test_a_file_is_written_listed_and_read(folder):
    for name in ("b 1.bin", "a.bin", "sub/c.bin", "a.txt"):
        files.write_whole(f"{folder}/{name}", name.encode())
    assert files.expand(f"{folder}/*.bin") == [f"{folder}/a.bin", f"{folder}/b 1.bin"]
    assert files.expand(f"{folder}/?.{{txt,bin}}") == [f"{folder}/a.txt", f"{folder}/a.bin"]
    assert files.expand(f"{folder}/*/*.bin") == [f"{folder}/sub/c.bin"]
    assert files.expand(f"{folder}/**/c.bin") == [f"{folder}/sub/c.bin"]
    assert list(files.walk(folder)) == [
        f"{folder}/{name}" for name in ("a.bin", "a.txt", "b 1.bin", "sub/c.bin")
    ]
    assert files.read(f"{folder}/b 1.bin") == b"b 1.bin"
    assert files.stat(f"{folder}/a.bin")[0] == 5
    with pytest.raises(FileNotFoundError):
        files.stat(f"{folder}/nothing")
    with pytest.raises(FileNotFoundError):
        files.read(f"{folder}/nothing")
    assert files.exists(f"{folder}/sub")
    files.remove(f"{folder}/a.bin")
    files.remove(f"{folder}/a.bin")
    assert not files.exists(f"{folder}/a.bin")


def test_ranges_and_reading_on(folder):
    content = bytes(range(256)) * 1000
    files.write_whole(f"{folder}/x", functools.partial(_write, content))
    assert files.read_ranges(f"{folder}/x", [(1024, 2), (4, 3)]) == [b"\0\1", b"\4\5\6"]
    assert files.read_ranges(f"{folder}/x", [(0, 2), (255_999, 9)]) == [b"\0\1", b"\xff"]
    assert files.read_ranges(f"{folder}/x", [(300_000, 9)]) == [b""]
    with files.open_file(f"{folder}/x") as file:
        assert file.seek(-3, 2) == 255_997
        assert file.read() == b"\xfd\xfe\xff"
        file.seek(10)
        assert file.read(2) == b"\x0a\x0b"


def _write(content, file):
    file.write(content)


def test_ranges_near_each_other_cost_one_request(bucket):
    path = f"{bucket.url}/x"
    files.write_whole(path, bytes(1 << 20))
    bucket.server.requests()
    files.read_ranges(path, [(1024, 2000), (4, 300)])
    assert len(bucket.server.requests()) == 1


def test_many_objects_of_a_folder_cost_one_request(bucket):
    names = [f"{bucket.url}/d/{i}" for i in range(12)]
    for name in names[1:]:
        files.write_whole(name, b"xy")
    bucket.server.requests()
    found = files.stats(names)
    assert [stat and stat[0] for stat in found] == [None] + [2] * 11
    assert len(bucket.server.requests()) == 1


def test_what_fails_while_it_is_written_leaves_what_was_there(folder):
    files.write_whole(f"{folder}/x", "before")

    def fail(file):
        file.write(b"half")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        files.write_whole(f"{folder}/x", fail)
    assert files.read(f"{folder}/x") == b"before"
    assert list(files.walk(folder)) == [f"{folder}/x"]


def test_a_folder_and_a_file_with_its_ending_are_written_whole(folder):
    with files.written_whole(f"{folder}/out") as partial:
        (partial / "sub").mkdir(parents=True)
        (partial / "sub/a").write_text("a")
        (partial / "b").write_text("b")
        assert list(files.walk(f"{folder}/out")) == []
    with files.written_whole(f"{folder}/out/c.png") as partial:
        assert partial.suffix == ".png"
        partial.write_text("c")
    assert list(files.walk(f"{folder}")) == [f"{folder}/out/{n}" for n in ("b", "c.png", "sub/a")]


def test_a_file_read_to_its_end_is_few_requests(bucket):
    files.write_whole(f"{bucket.url}/x", bytes(range(256)) * 512)
    bucket.server.requests()
    with files.open_file(f"{bucket.url}/x") as file:
        file.seek(1 << 16)
        assert file.read() == bytes(range(256)) * 256
        assert file.read() == b""
    assert len(bucket.server.requests()) <= 3


def test_of_several_who_create_a_file_one_wins(folder):
    assert files.create(f"{folder}/lock", b"first")
    assert not files.create(f"{folder}/lock", b"second")
    assert files.read(f"{folder}/lock") == b"first"


@pytest.mark.parametrize("fault", ["503", "429", "cut", "reset"])
def test_a_faulty_bucket_is_asked_again(gs, fault):
    content = bytes(range(256)) * 4096
    files.write_whole(f"{gs.url}/x", content)
    gs.server.behave(faults={fault: 0.3}, only="GET")
    for start in range(0, 1 << 20, 1 << 16):
        assert files.read_ranges(f"{gs.url}/x", [(start, 1 << 16)]) == [content[:65536]]


def test_a_request_without_an_answer_is_made_again(gs, monkeypatch):
    """Soon: nobody waits until the client gives up."""
    monkeypatch.setattr(bucket, "_LATE", (1.0, 4.0))
    files.write_whole(f"{gs.url}/x", bytes(1 << 16))
    gs.server.behave(faults={"hang": 0.3}, only="GET", seed=1)
    start = time.monotonic()
    for _ in range(4):
        assert files.read_ranges(f"{gs.url}/x", [(0, 1 << 16)]) == [bytes(1 << 16)]
    assert len(gs.server.requests()) > 4
    assert time.monotonic() - start < 20


def test_a_bucket_that_went_away_is_no_bad_file(gs, monkeypatch):
    monkeypatch.setattr(bucket, "RETRY_SECONDS", 1)
    files.write_whole(f"{gs.url}/x", bytes(100))
    bucket._bucket.cache_clear()
    with pytest.raises(FileNotFoundError):
        files.read_ranges(f"{gs.url}/y", [(0, 10)])
    assert files.read_ranges(f"{gs.url}/x", [(90, 20), (200, 9)]) == [bytes(10), b""]
    gs.server.behave(faults={"503": 1.0})
    with pytest.raises(Unreachable, match=rf"{gs.url}/x cannot be read: no good answer"):
        files.read_ranges(f"{gs.url}/x", [(0, 10)])


def test_a_place_is_joined_and_opened(folder):
    files.write_whole(files.place(folder) / "a" / "b.txt", "text")
    assert (files.place(folder) / "a").is_dir()
    assert [path.name for path in (files.place(folder) / "a").iterdir()] == ["b.txt"]
    files.write_whole(files.place(folder) / "a" / "deep" / "c.txt", "below")
    with files.local(files.place(folder) / "a") as here:
        assert (here / "b.txt").read_text() == "text"
        assert (here / "deep/c.txt").read_text() == "below"
    with files.local(files.place(folder) / "a" / "b.txt") as here:
        assert here.read_text() == "text"


def test_what_others_write_is_seen(folder):
    there = files.place(folder)
    files.write_whole(there / "a", "1")
    assert [path.name for path in there.iterdir()] == ["a"]
    other = files.place(folder)
    files.write_whole(other / "b", "2")
    assert (there / "b").exists()
    assert sorted(path.name for path in there.iterdir()) == ["a", "b"]


def test_a_url_of_another_kind_is_refused():
    with pytest.raises(Refused, match="ftp:// is not read"):
        files.place("ftp://a/b")


def test_a_full_disk_is_one_message_that_names_the_path(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    files.write_whole(tmp_path / "a", "before")
    with pytest.raises(Refused, match=rf"no space left for {tmp_path}/a"):
        files.write_whole(tmp_path / "a", full)
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(Refused, match=rf"no space left for {tmp_path}/a"):
        files.write_whole(tmp_path / "a", "after")
    assert (tmp_path / "a").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_real_full_disk(tmp_path):
    message = pytest.raises(Refused, match="no space left for")
    with message, files.writing(tmp_path / "a"), open("/dev/full", "wb") as full:
        full.write(b"x")


def test_other_errors_are_bugs(tmp_path):
    with pytest.raises(ValueError, match="unpack"), files.writing(tmp_path / "a"):
        raise ValueError("not enough values to unpack")


def test_a_destination_is_checked(tmp_path):
    (tmp_path / "file").write_text("")
    files.check_destination(tmp_path / "new/folder", "--output")
    assert not (tmp_path / "new").exists()
    with pytest.raises(Refused, match=rf"{tmp_path}/file is a file; --output needs a folder"):
        files.check_destination(tmp_path / "file", "--output")
    with pytest.raises(Refused, match=r"file is a file, and .*file/below is below it; --output"):
        files.check_destination(tmp_path / "file/below", "--output")
    with pytest.raises(Refused, match="is a folder; --output takes a file"):
        files.check_destination(tmp_path, "--output", folder=False)
    with pytest.raises(Refused, match=r"/proc cannot be written .*choose another --output"):
        files.check_destination(Path("/proc/new"), "--output")


def test_a_link_that_leads_back_is_followed_once(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/1.png").touch()
    (tmp_path / "a/b/back").symlink_to(tmp_path / "a")
    (tmp_path / "a/also").symlink_to(tmp_path / "a/b/1.png")
    assert list(files.walk(tmp_path / "a")) == [f"{tmp_path}/a/also", f"{tmp_path}/a/b/1.png"]


def test_braces_that_mean_too_many_files_are_refused_at_once():
    for pattern in ("{0..99999999999}.tar", "{0..99999}/{0..99999}.tar"):
        with pytest.raises(Refused, match=r"stands for 1\d\d?,000,000,000 files"):
            files.expand(pattern)
    assert len(files.expand("{00..41}/{a,b}.tar")) == 84
