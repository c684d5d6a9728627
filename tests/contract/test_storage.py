"""What is true of a path wherever it is: on disk, on fake-gcs-server (gs://), on moto (s3://).

There is no place in memory to test: obstore reads a bucket and gcsfs or s3fs writes it, and the
three share none.
"""

import pytest

from clip_jax.errors import InputError
from clip_jax.storage import bucket as bucket_client
from clip_jax.storage import files

CONTENT = bytes(range(256)) * 1000


def test_files_are_written_listed_read_and_removed(folder):
    for name in ("b 1.bin", "a.bin", "sub/c.bin", "a.txt"):
        files.write_whole(f"{folder}/{name}", name.encode())
    for pattern, names in {
        "*.bin": ["a.bin", "b 1.bin"],
        "?.{txt,bin}": ["a.txt", "a.bin"],
        "*/*.bin": ["sub/c.bin"],
        "**/c.bin": ["sub/c.bin"],
        "**/a.*": ["a.bin", "a.txt"],
        "{a,z}.bin": ["a.bin", "z.bin"],  # it need not exist
    }.items():
        assert files.expand(f"{folder}/{pattern}") == [f"{folder}/{name}" for name in names]
    with pytest.raises(InputError, match="nothing matches"):
        files.expand(f"{folder}/*.png")
    names = ["a.bin", "a.txt", "b 1.bin", "sub/c.bin"]
    assert list(files.walk(folder)) == [f"{folder}/{name}" for name in names]
    assert files.read(f"{folder}/b 1.bin") == b"b 1.bin"
    assert files.stat(f"{folder}/a.bin")[0] == 5
    assert files.exists(f"{folder}/sub")
    files.write_whole(f"{folder}/a.bin", "another")
    assert files.read(f"{folder}/a.bin") == b"another"
    files.remove(f"{folder}/a.bin")
    assert not files.exists(f"{folder}/a.bin")


def test_a_path_that_is_missing(folder):
    for ask in (files.stat, files.read):
        with pytest.raises(FileNotFoundError):
            ask(f"{folder}/nothing")
    with pytest.raises(FileNotFoundError):
        files.read_ranges(f"{folder}/nothing", [(0, 10)])
    assert not files.exists(f"{folder}/nothing")
    assert list(files.walk(f"{folder}/nothing")) == []
    assert files.stats([f"{folder}/nothing"]) == [None]
    files.remove(f"{folder}/nothing")


def test_ranges_and_reading_on(folder):
    path = f"{folder}/x"
    files.write_whole(path, lambda file: file.write(CONTENT))
    assert files.read_ranges(path, [(1024, 2), (4, 3)]) == [b"\0\1", b"\4\5\6"]
    assert files.read_ranges(path, [(0, 2), (255_999, 9)]) == [b"\0\1", b"\xff"]
    assert files.read_ranges(path, [(300_000, 9)]) == [b""]
    with files.open_file(path) as file:
        assert file.seek(-3, 2) == 255_997
        assert file.read() == b"\xfd\xfe\xff"
        file.seek(10)
        assert file.read(2) == b"\x0a\x0b"
        file.seek(255_744)
        assert (file.read(), file.read()) == (CONTENT[:256], b"")


def test_a_write_that_fails_leaves_what_was_there(folder):
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


def test_of_several_who_create_a_file_one_wins(folder):
    assert files.create(f"{folder}/lock", b"first")
    assert not files.create(f"{folder}/lock", b"second")
    assert files.read(f"{folder}/lock") == b"first"
    assert list(files.walk(folder)) == [f"{folder}/lock"]


def test_folders_are_copied_moved_and_taken_to_disk(folder, tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    (source / "deep").mkdir()
    (source / "b.txt").write_text("text")
    (source / "deep/c.txt").write_text("below")
    start = files.as_path(folder)
    files.write_whole(start / "x", "x")
    assert [path.name for path in start.iterdir()] == ["x"]
    files.copy_tree(source, files.as_path(folder) / "a")  # as another process may
    assert sorted(path.name for path in start.iterdir()) == ["a", "x"]
    assert (start / "a").is_dir()
    files.move_folder(start / "a", start / "moved" / "b")
    assert not (start / "a").exists()
    names = [f"{folder}/moved/b/{name}" for name in ("b.txt", "deep/c.txt")]
    assert list(files.walk(f"{folder}/moved")) == names
    files.move_folder(start / "moved" / "b", start / "moved" / "c")  # beside others
    files.move_folder(start / "moved" / "c", start / "moved" / "b")
    assert list(files.walk(f"{folder}/moved")) == names
    with files.local(start / "moved" / "b") as here:
        assert (here / "b.txt").read_text() == "text"
        assert (here / "deep/c.txt").read_text() == "below"
    with files.local(start / "moved" / "b" / "b.txt") as here:
        assert here.read_text() == "text"


# ------------------------------------------------------------------ what a bucket alone does


def test_what_is_near_each_other_costs_one_request(bucket):
    path, many = f"{bucket.url}/x", [f"{bucket.url}/d/{i}" for i in range(12)]
    files.write_whole(path, bytes(1 << 20))
    for name in many[1:]:
        files.write_whole(name, b"xy")
    bucket.server.requests()
    files.read_ranges(path, [(1024, 2000), (4, 300)])
    assert len(bucket.server.requests()) == 1
    assert [stat and stat[0] for stat in files.stats(many)] == [None] + [2] * 11
    assert len(bucket.server.requests()) == 1
    with files.open_file(path) as file:
        file.seek(1 << 16)
        assert len(file.read()) == (1 << 20) - (1 << 16)
    assert len(bucket.server.requests()) <= 3


@pytest.mark.parametrize("fault", ["503", "429", "cut", "reset"])
def test_what_fails_is_asked_for_again(bucket, fault):
    files.write_whole(f"{bucket.url}/x", CONTENT)
    bucket.server.requests()
    bucket.server.behave(faults={fault: 1.0}, only="GET", times=2)
    assert files.read_ranges(f"{bucket.url}/x", [(256, 1 << 16)]) == [CONTENT[: 1 << 16]]
    assert len(bucket.server.requests()) == 3


def test_whoever_is_not_let_in_is_told_where_credentials_come_from(bucket):
    bucket.server.behave(faults={"403": 1.0})
    with pytest.raises(
        InputError, match=rf"{bucket.url}/x cannot be read: .*Credentials come from"
    ):
        files.read(f"{bucket.url}/x")
    with pytest.raises(InputError, match=rf"{bucket.url}/x cannot be written: .*Credentials come"):
        files.write_whole(f"{bucket.url}/x", "x")


def test_a_bucket_that_does_not_exist_is_refused_at_once(bucket):
    with pytest.raises(InputError, match=r"there is no bucket 'test-\d+-none'; correct"):
        files.check_destination(files.as_path(f"{bucket.url}-none/run"), "--workdir")
    assert len(bucket.server.requests()) == 1
    if bucket.url.startswith("s3://"):  # fake-gcs-server answers 500 instead of 404
        with pytest.raises(InputError, match="-none/x cannot be read: there is no such bucket"):
            files.expand(f"{bucket.url}-none/x/*.tar")


def test_without_credentials_nothing_is_sent(bucket, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(bucket_client, "_may_write", bucket_client._may_write.__wrapped__)
    with pytest.raises(
        InputError, match=rf"^{bucket.url}/out cannot be written: no credentials\. Cr"
    ):
        files.check_destination(files.as_path(f"{bucket.url}/out"), "--output")
    assert bucket.server.requests() == []
