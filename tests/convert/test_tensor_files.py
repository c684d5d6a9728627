"""Files and folders that are no model, or a damaged one: one clear message, memory bounded."""

import json
import os
import struct
from pathlib import Path

import pytest

from clip_jax.convert.formats import read_weights
from clip_jax.convert.tensor_files import read_tensors
from clip_jax.convert.tokenizer_files import is_clip_tokenizer
from tests.convert.conftest import refuse


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.pt", b"", "empty"),
        ("x.safetensors", bytes(1 << 16), "neither"),
        ("x.pt", b"\x80", "neither"),
        ("x.pt", b"\x80\x02\x8a", "is a pickle .* before 1.6"),
        ("x.safetensors", struct.pack("<Q", 1 << 60) + b'{"a"', "damaged or truncated"),
    ],
)
def test_files_of_something_else(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, match)
    refuse(tmp_path / name, match, read_weights)


def test_no_file_where_a_file_was_expected(tmp_path):
    refuse(tmp_path, "is a directory")
    refuse(tmp_path / "nothing.pt", "there is no")
    refuse(tmp_path, "0 files of weights", read_weights)
    (tmp_path / "checkpoints").mkdir()
    refuse(tmp_path, r"has checkpoints but no config\.json", read_weights)
    (tmp_path / "manifest.json").write_text('{"format": "clip-jax", "version": 2}')
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json is a directory"):
        read_weights(tmp_path)
    os.mkfifo(tmp_path / "pipe.pt")
    refuse(tmp_path / "pipe.pt", "is a pipe or a device", read_weights)  # it is not waited for
    (tmp_path / "vocab.json").symlink_to("/dev/zero")
    refuse(tmp_path, r"vocab\.json is a pipe or a device", lambda x: is_clip_tokenizer(x, 600))


def safetensors(path: Path, header: bytes | dict, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": entry([2], 0, 8)}, 4),  # truncated
        ({"a": entry([1 << 40], 0, 8)}, 8),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12),  # overlap
        ({"a": entry([2], 8, 16)}, 16),
        ({"a": entry([-2], 0, 8)}, 8),
        ({"a": entry([2], 0, 8, "F99")}, 8),
        ({"a": [1]}, 0),
        (b"{" + b"[" * 100_000, 0),
        (b'{"a": ' + b'{"a":' * 100_000, 0),
        (b"{not json}", 0),
    ],
)
def test_damaged_safetensors(tmp_path, header, size):
    path = safetensors(tmp_path / "x.safetensors", header, bytes(size))
    refuse(path, "damaged or truncated")


@pytest.mark.parametrize(("dtype", "size"), [("F8_E4M3", 2), ("F8_E5M2", 2), ("F4", 1)])
def test_types_that_numpy_does_not_have(tmp_path, dtype, size):
    path = safetensors(tmp_path / "x", {"a": entry([2], 0, size, dtype)}, bytes(size))
    refuse(path, rf"holds tensors of type {dtype}; float32, float16 and bfloat16 are supported")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[1]", "holds a list"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b" " * (17 << 20), "no configuration is that long"),
        (b'{"model_type": "bert"}', "model_type='bert'"),
        (b'{"model_type": "clip"}', "none of model.safetensors"),
    ],
)
def test_damaged_configurations(tmp_path, content, match):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_weights(tmp_path)


def test_shards_stay_in_their_folder_and_have_every_tensor(tmp_path):
    safetensors(tmp_path / "one.safetensors", {"a": entry([1], 0, 4)}, bytes(4))
    path = tmp_path / "model.safetensors.index.json"
    for file in ("../secret.safetensors", "/etc/passwd", "a/b.safetensors", ".."):
        path.write_text(json.dumps({"weight_map": {"a": file}}))
        refuse(path, "not a file beside it")
    path.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    refuse(path, r"lack 1 tensors, first \['b'\]")
    path.write_text(json.dumps({"weight_map": {"a": "two.safetensors"}}))
    with pytest.raises(ValueError, match=r"there is no file .*two\.safetensors"):
        read_tensors(path)
