"""Hostile files of PyTorch's: one clear message, nothing executed, memory bounded."""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from clip_jax.convert.tensor_files import read_tensors
from clip_jax.storage import torch_pickle
from clip_jax.storage.torch_pickle import read_torch
from tests.convert.conftest import refuse

# ------------------------------------------------------------------ writing PyTorch's files by hand


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    raw = value.to_bytes(10, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(integer(v) for v in values) + b"t"


def tensor(shape=(2, 3), strides=(3, 1), *, offset=0, numel=6, key="0", kind="FloatStorage"):
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + integer(numel)
        + b"tQ"
        + integer(offset)
        + numbers(shape)
        + numbers(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def state_dict(*values: bytes) -> bytes:
    items = b"".join(text(f"weight{i}") + value for i, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u."


def packed(content: bytes, storage: bytes = bytes(24)) -> bytes:
    """Put a pickle and one storage into an archive."""
    entries = {"data.pkl": content, "byteorder": b"little", "data/0": storage, "version": b"3\n"}
    return zipped((f"archive/{name}", data) for name, data in entries.items())


def zipped(entries: Iterable[tuple[str, bytes]], compressed: Iterable[str] = ()) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries:
            method = zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED
            archive.writestr(name, data, compress_type=method)
    return file.getvalue()


def refuse_bytes(folder: Path, data: bytes, match: str) -> None:
    path = folder / "x.pt"
    path.write_bytes(data)
    refuse(path, match)


# ------------------------------------------------------------------ what is right is read


def test_an_honest_file_is_read(tmp_path):
    values = np.arange(6, dtype=np.float32)
    content = state_dict(tensor(), tensor((2,), (2,), offset=1, numel=6))
    # Two tensors in one storage of 24 bytes claim 32: padded by the container's own bytes.
    (tmp_path / "x.pt").write_bytes(packed(content, values.tobytes()))
    tensors = read_tensors(tmp_path / "x.pt")
    np.testing.assert_array_equal(tensors["weight0"], values.reshape(2, 3))
    np.testing.assert_array_equal(tensors["weight1"], [1, 3])


# ------------------------------------------------------------------ code in pickles


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_executed(tmp_path, protocol):
    marker = tmp_path / "executed"
    for payload in (Attack(marker), {"state_dict": {"a": [Attack(marker)]}}):
        content = pickle.dumps(payload, protocol)
        pickle.loads(content)  # the attack works …
        marker.rmdir()
        for data in (content, content[:-1] + b"Q."):  # the second describes a storage
            refused = "not allowed|which files of tensors do not need|storage"
            refuse_bytes(tmp_path, packed(data), refused)
            assert not marker.exists()  # … and is not run


def many(count: int, opener: bytes, levels: bytes) -> bytes:
    return b"}" + b"".join(b"q\x01" + opener + levels for _ in range(count)) + b"."


_STATE = b"}q\x01(" + b"".join(text(f"k{i}") + b"N" for i in range(1000)) + b"u"
PICKLES: list[tuple[bytes, str]] = [
    # what would run, or set something
    (b"ctorch.storage\n_load_from_bytes\n(C\x01atR.", "torch.storage._load_from_bytes"),
    (b"cbuiltins\ngetattr\n(ctorch\nFloatStorage\n" + text("x") + b"tR.", "builtins.getattr"),
    (b"ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
    (b"c__torch__\nA\n)\x81}(" + text("a") + b"cos\nsystem\nub.", "os.system"),
    (b"(ios\nsystem\n.", "INST"),
    (b"(cos\nsystem\no.", "asks for os.system"),
    (b"\x82\x01.", "EXT1|code"),
    (b"c__torch__\nA\n)}\x92.", "NEWOBJ_EX"),
    (b"ccollections\nOrderedDict\n)R" + text("append") + b"b.", "no tensors"),
    (b"]" + text("x") + b"b.", "sets the state of a list"),
    (b"}(]Nu.", "a dict with a list as key"),
    (b"}((tNu.", "a dict with a tuple as key"),
    (b"N(NtR.", "'NoneType' object is not callable"),
    (text("a") + text("b") + b"a.", "no attribute 'append'"),
    # no pickle
    (b"\x93.", "not a PyTorch file"),
    (b"h\x05.", "not a PyTorch file"),
    (b"N", "end|exhausted|opcode"),
    (b"\xff\xff", "opcode"),
    (b"N0" * (9 << 19) + b".", "POP"),
    # claimed lengths, which allocate nothing
    (b"\x96" + struct.pack("<Q", 1 << 40) + b".", "x.pt"),  # BYTEARRAY8 allocates, then reads
    (b"\x8d" + struct.pack("<Q", 1 << 62) + b".", "x.pt"),  # BINUNICODE8
    (b"Nr" + struct.pack("<I", 0xFFFFFFFF) + b"0.", "x.pt"),  # LONG_BINPUT into a huge memo
    (b"\x8b" + struct.pack("<i", 0x7FFFFFFF) + b".", "x.pt"),  # LONG4
    # structures that grow: every level holds the one below twice; one within itself; deep ones
    (many(60, b"}(", text("a") + b"h\x01" + text("b") + b"h\x01u"), "too many"),
    (b"}q\x01(" + text("") + b"h\x01u.", "too deep|too many|recursion"),
    (b"}q\x01(" + text("a") + b"h\x01u.", "too deep|too many|recursion"),
    (many(1_000, b"}(", text("") + b"h\x01u"), "too deep|too many|recursion"),
    (_STATE + b"(" + b"c__torch__\nA\n)\x81h\x01b" * 1000 + b"l.", "no tensors"),  # one for all
]


@pytest.mark.parametrize("at", range(len(PICKLES)))
def test_other_pickles_are_refused(tmp_path, at):
    content, match = PICKLES[at]
    refuse_bytes(tmp_path, packed(b"\x80\x02" + content), match)


def test_a_pickle_without_end(tmp_path):
    content = b"\x80\x02" + b"N" * 9_000 + b"."
    with mock.patch.object(torch_pickle, "_MAX_PICKLE", 8_000):
        refuse_bytes(tmp_path, packed(content), "does not end within 8000")
    refuse_bytes(tmp_path, packed(content), "no tensors")


# ------------------------------------------------------------------ tensors


KINDS = {
    "None": b"N",
    "True": b"\x88",
    "float": b"G" + struct.pack(">d", 1.0),
    "text": text("31"),
    "list": b"](" + integer(1) + integer(1) + b"e",
    "dict": b"}(" + integer(1) + b"N" + integer(0) + b"Nu",
    "tuple of texts": b"(" + text("3") + text("1") + b"t",
    "tuple of tuples": b"(" + numbers([3]) + numbers([1]) + b"t",
    "tensor": tensor(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_argument_of_another_kind_is_refused(tmp_path, kind):
    """Each of the storage, offset, shape and strides, in turn."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    honest = [storage + integer(6) + b"tQ", integer(0), numbers((2, 3)), numbers((3, 1))]
    for number in range(len(honest)):
        arguments = [*honest]
        arguments[number] = KINDS[kind]
        call = b"ctorch._utils\n_rebuild_tensor\n(" + b"".join(arguments) + b"tR"
        refuse_bytes(tmp_path, packed(state_dict(call)), "impossible|x.pt")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"shape": (2, 4), "strides": (4, 1)}, "exceeds its storage"),
        ({"offset": 1}, "exceeds its storage"),
        ({"strides": (1 << 40, 1)}, "exceeds its storage"),
        ({"shape": (1 << 40,), "strides": (0,)}, "claims|exceeds its storage"),
        ({"shape": (7,), "strides": (0,)}, "exceeds its storage"),
        ({"strides": (-3, 1), "offset": 5}, "impossible"),
        ({"offset": -1}, "impossible"),
        ({"strides": (3,)}, "impossible"),
        ({"shape": (1,) * 17, "strides": (1,) * 17}, "impossible"),
        ({"shape": (1 << 61,), "strides": (1,)}, "impossible"),
        ({"numel": 1 << 50}, "bytes for it"),
        ({"kind": "DoubleStorage"}, "claims|bytes for it|truncated"),
        ({"kind": "EvilStorage"}, "torch.EvilStorage"),
        ({"key": "1"}, "lacks"),
        ({"key": "../../data.pkl"}, "lacks"),
    ],
)
def test_a_view_that_leaves_its_storage(tmp_path, changes, match):
    content = state_dict(tensor(**changes))
    refuse_bytes(tmp_path, packed(content), match)


def test_many_tensors_of_one_storage(tmp_path):
    """Names for the same bytes would be as many copies."""
    content = state_dict(*[tensor((262144,), (1,), numel=262144)] * 200)
    refuse_bytes(tmp_path, packed(content, bytes(1 << 20)), "share storage")


# ------------------------------------------------------------------ containers


def test_damaged_files():
    """Cut at any byte, a file is refused; whatever byte is damaged, the answer is tensors or so."""
    data = bytearray(packed(state_dict(tensor())))
    for length in range(4, len(data)):
        with pytest.raises(ValueError, match=r"cut\.pt"):
            read_torch(memoryview(bytes(data[:length])), "cut.pt")
    for at in range(len(data)):
        for bit in (1, 128):
            data[at] ^= bit
            try:
                read_torch(memoryview(bytes(data)), "x.pt")
            except ValueError as error:
                assert "x.pt" in str(error)  # noqa: PT017
            data[at] ^= bit


def patched(data: bytes, *changes: tuple[int, bytes]) -> bytes:
    """Bytes of a zip written over, counted from the last entry of its directory or from the end."""
    changed = bytearray(data)
    last = data.rfind(b"PK\x01\x02")
    for at, value in changes:
        start = last + at if at >= 0 else len(data) + at
        changed[start : start + len(value)] = value
    return bytes(changed)


def twins() -> bytes:
    """Two names in the directory for the same bytes, as zip bombs have them."""
    entries = [("a/data.pkl", state_dict().ljust(1000)), ("a/data/0", b"0"), ("a/data/1", b"1")]
    data = zipped(entries)
    first = data.find(b"PK\x01\x02")
    return patched(data, (42, data[first + 42 : first + 46]), (20, data[first + 20 : first + 28]))


_ONE = zipped([("a/data.pkl", state_dict())])
_TWO = {"a/data.pkl": state_dict(tensor()), "a/data/0": bytes(24)}
_FOUR = _TWO | {"a/other": b"x", "a/code/x": b""}
ZIPS: dict[str, tuple[bytes, str]] = {
    **{
        f"{name} compressed": (zipped(_FOUR.items(), (name, "a/code/x")), f"{name} is compressed")
        for name in ("a/data.pkl", "a/data/0", "a/other")
    },
    "entries that overlap": (twins(), "overlap"),
    "a directory longer than the file": (patched(_ONE, (-10, b"\xff\xff")), "damaged"),
    "an encrypted entry": (patched(_ONE, (8, b"\x01")), "encrypted"),
    "two of a name": (zipped([("a/data.pkl", b"N."), ("b/data.pkl", b"N.")]), "two entries"),
    "a document": (zipped([("word/document.xml", b"x")]), "data.pkl"),
    "the other byte order": (zipped((_TWO | {"a/byteorder": b"big"}).items()), "big-endian"),
}


@pytest.mark.parametrize("name", ZIPS)
def test_other_zips(tmp_path, name):
    refuse_bytes(tmp_path, *ZIPS[name])


def test_code_may_be_compressed(tmp_path):
    (tmp_path / "x.pt").write_bytes(zipped(_FOUR.items(), ["a/code/x"]))
    assert list(read_tensors(tmp_path / "x.pt")) == ["weight0"]
