"""Paths on disk: what stands between a person's path and a file. Buckets: see tests/contract."""

import errno
import os
from pathlib import Path
from unittest import mock

import pytest
from obstore.store import LocalStore

from clip_jax.errors import InputError
from clip_jax.storage import bucket, files


def test_a_url_of_another_kind_is_refused():
    with pytest.raises(InputError, match="ftp:// is not supported"):
        files.as_path("ftp://a/b")


def test_a_full_disk_is_one_message_that_names_the_path(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    files.write_whole(tmp_path / "a", "before")
    message = pytest.raises(InputError, match=rf"no space left for {tmp_path}/a")
    with message, mock.patch.object(os, "fsync", autospec=True, side_effect=full):
        files.write_whole(tmp_path / "a", "after")
    with message, files.writing(tmp_path / "a"), open("/dev/full", "wb") as really_full:
        really_full.write(b"x")
    assert (tmp_path / "a").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_other_errors_are_bugs(tmp_path):
    with pytest.raises(ValueError, match="unpack"), files.writing(tmp_path / "a"):
        raise ValueError("not enough values to unpack")


def test_a_destination_is_checked(tmp_path):
    (tmp_path / "file").write_text("")
    files.check_destination(tmp_path / "new/folder", "--output")
    assert not (tmp_path / "new").exists()
    for path, folder, message in (
        (tmp_path / "file", True, rf"{tmp_path}/file is a file; --output needs a folder"),
        (tmp_path / "file/below", True, r"file is a file, and .*file/below is below it; --output"),
        (tmp_path, False, "is a folder; --output takes a file"),
        (Path("/proc/new"), True, r"/proc cannot be written .*choose another --output"),
    ):
        with pytest.raises(InputError, match=message):
            files.check_destination(path, "--output", folder=folder)


def test_a_link_that_leads_back_is_followed_once(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/1.png").touch()
    (tmp_path / "a/b/back").symlink_to(tmp_path / "a")
    (tmp_path / "a/also").symlink_to(tmp_path / "a/b/1.png")
    assert list(files.walk(tmp_path / "a")) == [f"{tmp_path}/a/also", f"{tmp_path}/a/b/1.png"]


def test_a_pattern_leaves_dot_files_out_in_a_bucket_as_on_a_disk():
    entries = [(f"gs://b/{name}.tar", (1, 1.0)) for name in ("._1", "1")]
    with mock.patch.object(bucket, "listed", autospec=True, return_value=entries):
        assert files.expand("gs://b/*.tar") == ["gs://b/1.tar"]


PATHS = ("a/0.tar", "a/1.tar", "a/5.tar", "a/[0-3].tar", "b[1]/2.tar", "b{1}/3.tar", "c/d/e/4.tar")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a/[0-3].tar", ["a/[0-3].tar"]),  # the file of that name
        ("a/[0-4].tar", ["a/0.tar", "a/1.tar"]),
        ("a/[!01].tar", ["a/5.tar"]),
        ("?/[15]*", ["a/1.tar", "a/5.tar"]),
        ("a/{0,[15]}.tar", ["a/0.tar", "a/1.tar", "a/5.tar"]),
        ("[c]/**/*.tar", ["c/d/e/4.tar"]),
        (f"{files.escape('b[1]')}/*.tar", ["b[1]/2.tar"]),
        (f"{files.escape('b{1}')}/*.tar", ["b{1}/3.tar"]),
        ("a/[5-0].tar", None),
        ("a/[01.tar", None),  # no pattern: the bracket is not closed
    ],
)
def test_a_pattern_matches_the_same_files_on_a_disk_and_in_a_bucket(pattern, expected, tmp_path):
    """`[0-3]` was a name for tars, and a pattern where the format was guessed."""
    for path in PATHS:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    for root in (str(tmp_path), f"gs://b/{tmp_path.name}"):
        store = LocalStore(tmp_path.parent)
        with mock.patch.object(bucket, "_bucket", autospec=True, return_value=store):
            if expected is None:
                with pytest.raises(InputError, match="nothing matches"):
                    files.expand(f"{root}/{pattern}")
            else:
                assert files.expand(f"{root}/{pattern}") == [f"{root}/{x}" for x in expected]


def test_a_folder_with_signs_of_a_pattern_in_its_name_is_itself(tmp_path):
    """`odd[1]/*.tar` matched nothing beside the folder `odd[1]`."""
    (tmp_path / "odd[1]").mkdir()
    (tmp_path / "odd[1]" / "0.tar").write_bytes(b"x")
    assert files.expand(f"{tmp_path}/odd[1]/*.tar") == [f"{tmp_path}/odd[1]/0.tar"]


@mock.patch.object(files, "_MOST_FILES", 1_000)  # a million in earnest
def test_braces_that_mean_too_many_files_are_refused():
    for pattern in ("{0..99999999999}.tar", "{0..99999}/{0..99999}.tar"):
        with pytest.raises(InputError, match="stands for more than 1,000 files"):
            files.expand(pattern)
    assert files.expand("{08..10}/{a,b}") == ["08/a", "08/b", "09/a", "09/b", "10/a", "10/b"]


def test_subfolders_are_those_of_a_disk_in_a_bucket_too(tmp_path):
    """Class folders in a bucket take one request; one for each of ImageNet's takes a minute."""
    for name in ("a/0.png", "b/c/1.png", "2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    store = LocalStore(tmp_path.parent)
    with mock.patch.object(bucket, "_bucket", autospec=True, return_value=store):
        names = files.subfolders(files.as_path(f"gs://b/{tmp_path.name}/"))
    assert sorted(names) == sorted(files.subfolders(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes("café".encode("latin-1")), "byte 3 is not UTF-8; save the"),
        (os.mkfifo, "a pipe or a device, not a file"),
        (Path.mkdir, "cannot be read as text: .* correct the path"),
    ],
)
def test_what_is_no_text_file_is_one_message(tmp_path, make, message):
    """A pipe would be waited for without end."""
    make(tmp_path / "classnames.txt")
    with pytest.raises(InputError, match=message):
        files.read_text(tmp_path / "classnames.txt")


def test_folders_move_into_one_that_exists_or_does_not(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        files.move_folder(tmp_path / name, tmp_path / "new/inner" / name)
        assert (tmp_path / "new/inner" / name / "file").read_text() == name
        assert not (tmp_path / name).exists()
