"""JSON files of a command, whatever is at their path."""

import os

import pytest

from clip_jax.errors import InputError
from clip_jax.storage import json_files
from clip_jax.storage.json_files import parse, read_json, read_rows, recover_json


@pytest.mark.parametrize("read", [read_json, read_rows, recover_json])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "cannot be read: a pipe or a device, not a file. Restore"),
        (lambda path: path.symlink_to("/dev/zero"), "cannot be read: a pipe or a device"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory. Restore"),
        (lambda path: os.close(os.open(path, os.O_CREAT)) or os.truncate(path, 1 << 40), "1,099,"),
    ],
)
def test_what_is_no_file_or_too_long_is_refused_without_reading_it(make, says, read, tmp_path):
    """A pipe would block, a device or a sparse file fill the memory."""
    make(path := tmp_path / "result.json")
    with pytest.raises(InputError, match=f"{path} .*{says}"):
        read(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_json_that_nests_too_deeply_is_damaged(text, tmp_path):
    """The parser raises RecursionError for it, which is no ValueError."""
    assert parse(text.encode()) is None
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(InputError, match=f"{path} is damaged: it is not a JSON object. Restore"):
        read_json(path)
    assert json_files.recover_json(path, saves=False) == {}
